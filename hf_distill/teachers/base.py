"""What a trainer asks of a teacher, wherever the answer comes from: scores for this batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from ..errors import InputError
from ..models.layer_scores import LayerTokens


class Teacher(ABC):
    """A teacher of a distillation.

    Attributes:
        name: By which loss terms name it.
        candidate_sets: The candidates that it can score, see [`hf_distill.models.candidates`].
        processor: The text processor that its batches are tokenised with, or None if it reads no text.
        score_column: The column of the row set with its scores, or None.
        stores: Its cached vectors, *(of queries, of passages)*, by the names under which a batch has them.
        more_live: Whether the model behind it could score more candidates if it read every batch.
        num_layers: How many layers it has, None where nothing is known of them.
        layer_column: The column of the row set with its layers' scores, or None.
        is_joint: Whether it is trained along with the student.
    """

    candidate_sets: tuple[str, ...] = ("own",)
    processor: Any = None
    score_column: str | None = None
    stores: Mapping[str, tuple[Any, Any]] = MappingProxyType({})
    more_live: bool = False
    embedding_size: int | None = None
    num_layers: int | None = None
    layer_column: str | None = None
    is_joint: bool = False

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

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raises [`InputError`] for layers whose scores it cannot give."""
        raise self._no_layers()

    def _no_layers(self) -> InputError:
        return InputError(
            f"nothing is known of the layers of the teacher {self.name!r}",
            where="losses",
            cure="Give the model as a live teacher, or write its layers' scores into the rows "
            "(hf-distill score --layers all)",
        )

    def layer_scores(self, batch: Mapping[str, Any], layers: Sequence[int], candidates: str) -> torch.Tensor:
        """What layers (numbered from 1, ascending) say about a set of candidates, float32 `[K, Q, C]`.

        Raises:
            InputError: If the teacher gives none.
        """
        raise self._no_layers()

    def layer_tokens(self, batch: Mapping[str, Any]) -> LayerTokens:
        """The tokens of the layers that it was asked for at the beginning of the batch."""
        raise self._no_layers()

    def begin_batch(self, layers: Sequence[int] = (), layer_tokens: bool = False) -> None:  # noqa: B027
        """Forgets what was computed for the batch before, and learns which layers will be asked for."""

    def describe(self) -> dict[str, Any]:
        """What a card and a manifest say about it."""
        return {"name": self.name, "kind": type(self).__name__}
