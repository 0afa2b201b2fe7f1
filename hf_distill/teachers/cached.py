"""Teachers that are data: scores in a column of the row set, or one embedding a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..models.candidates import CANDIDATES, arrange, candidate_scores
from .base import Teacher


if TYPE_CHECKING:
    from ..retrieval.encode import EmbeddingStore


class CachedScores(Teacher):
    """A teacher whose scores stand in the row set.

    Args:
        name: By which loss terms name it.
        column: The column: `"scores"` for the primary teacher, `"scores_<name>"` for others.
        origin: The column's entry in the row set's metadata, for the card.
    """

    def __init__(self, name: str, column: str = "scores", origin: Mapping[str, Any] | None = None):
        super().__init__(name)
        self.score_column, self.origin = column, dict(origin or {})

    def scores(self, batch: Mapping[str, Any], candidates: str) -> torch.Tensor:
        return batch["teacher_scores"][self.score_column].float()

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "column": self.score_column, **self.origin}


class CachedEmbeddings(Teacher):
    """A bi-encoder whose embeddings of all queries and passages were computed once.

    It gives scores with any candidates at the cost of a matrix product, and embeddings to follow.

    Args:
        name: By which loss terms name it.
        queries: One embedding a query, as [`encode_table`] wrote them.
        passages: One embedding a passage.
        similarity: `"dot"` or `"cosine"`.
        temperature: The scores are divided by it.
        origin: What the card says about the teacher.
    """

    candidate_sets = CANDIDATES

    def __init__(
        self,
        name: str,
        queries: EmbeddingStore,
        passages: EmbeddingStore,
        similarity: str = "dot",
        temperature: float = 1.0,
        origin: Mapping[str, Any] | None = None,
    ):
        super().__init__(name)
        self.stores, self.similarity, self.temperature = (queries, passages), similarity, temperature
        self.embedding_size = queries.dim
        self.origin = dict(origin or {})

    def embeddings(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        vectors = batch["embeddings"][self.name]
        return arrange(vectors["query"].float(), vectors["passage"].float(), batch)

    def scores(self, batch: Mapping[str, Any], candidates: str) -> torch.Tensor:
        return candidate_scores(self, *self.embeddings(batch), candidates)

    def similarity_scores(self, query: torch.Tensor, passage: torch.Tensor) -> torch.Tensor:
        """`[Q, D]` and `[C, D]` to scores `[Q, C]`."""
        query, passage = self._scaled(query, passage)
        return query @ passage.T / self.temperature

    def own_scores(self, query: torch.Tensor, passage: torch.Tensor) -> torch.Tensor:
        """`[Q, D]` and `[Q, M, D]` to scores `[Q, M]`."""
        query, passage = self._scaled(query, passage)
        return (passage @ query.unsqueeze(-1)).squeeze(-1) / self.temperature

    def _scaled(self, *vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.similarity == "cosine":
            return tuple(torch.nn.functional.normalize(part, dim=-1) for part in vectors)
        return vectors

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), **self.origin}
