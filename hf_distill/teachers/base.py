"""What a trainer asks of a teacher, wherever the answer comes from: scores for this batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import InputError


class Teacher(ABC):
    """A teacher of a distillation.

    Attributes:
        name: By which loss terms name it.
        candidate_sets: The candidates that it can score, see [`hf_distill.models.candidates`].
        processor: The text processor that its batches are tokenised with, or None if it reads no text.
        score_column: The column of the row set with its scores, or None.
        stores: Its cached embeddings of queries and passages, or None.
    """

    candidate_sets: tuple[str, ...] = ("own",)
    processor: Any = None
    score_column: str | None = None
    stores: tuple[Any, Any] | None = None
    embedding_size: int | None = None

    def __init__(self, name: str):
        self.name = name

    def to(self, device: torch.device) -> None:  # noqa: B027 (most teachers hold no weights)
        """Moves the weights, if there are any."""

    @abstractmethod
    def scores(self, batch: Mapping[str, Any], candidates: str) -> torch.Tensor:
        """Scores of the batch's queries with a set of candidates, float32, in the layout of the student's."""

    def embeddings(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Its embeddings of the batch: `[Q, D]` and `[Q, M, D]`.

        Raises:
            InputError: If the teacher has none.
        """
        raise InputError(
            f"the teacher {self.name!r} has scores but no embeddings",
            where="losses",
            cure="Use a loss on scores (kl, margin_mse), or give a bi-encoder as teacher",
        )

    def begin_batch(self) -> None:  # noqa: B027
        """Forgets what was computed for the batch before."""

    def describe(self) -> dict[str, Any]:
        """What a card and a manifest say about it."""
        return {"name": self.name, "kind": type(self).__name__}
