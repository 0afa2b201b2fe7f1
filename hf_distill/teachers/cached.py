"""Teachers that are data: scores in a column of the row set, or one embedding a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..data.examples import moved_example
from ..data.rows_io import are_other_texts
from ..errors import InputError
from ..models.bi_encoder import KINDS
from ..models.candidates import CANDIDATES, arrange, candidate_scores
from ..models.layer_scores import vector_layer_scores
from .base import Teacher


if TYPE_CHECKING:
    from ..data.rows import RowSet
    from ..retrieval.encode import EmbeddingStore


class CachedScores(Teacher):
    """A teacher whose scores stand in the row set.

    Args:
        name: By which loss terms name it.
        column: The column: `"scores"` for the primary teacher, `"scores_<name>"` for others.
        origin: The column's entry in the row set's metadata, for the card.
        layer_column: The column with its layers' scores, `"layer_scores_<name>"`.
        layers: The layers that stand in that column, numbered from 1.
    """

    def __init__(
        self,
        name: str,
        column: str | None = "scores",
        origin: Mapping[str, Any] | None = None,
        *,
        layer_column: str | None = None,
        layers: Sequence[int] = (),
    ):
        super().__init__(name)
        self.score_column, self.origin = column, dict(origin or {})
        self.layer_column, self.layers = layer_column, tuple(layers)
        self.num_layers = self.origin.get("num_layers") or max(self.layers, default=None)
        self.more_live = self.origin.get("kind") != "cross-encoder"

    @classmethod
    def from_rows(
        cls, name: str, rows: RowSet, column: str | None = "scores", layer_column: str | None = None, model: Any = None
    ) -> CachedScores:
        """The teacher that wrote columns of a row set, after a look at where they come from.

        Args:
            name: By which loss terms name it.
            rows: The row set.
            column: Its scores.
            layer_column: Its layers' scores.
            model: The teacher itself, where it is known: the columns must be of its weights.

        Raises:
            InputError: If a column is not there, was made for other texts, or by other weights than `model`'s, or
                does not stand in the order of the rows' documents.
        """
        origins = [check_column(rows, one, model) for one in (column, layer_column) if one is not None]
        layers = origins[-1].get("layers", ()) if layer_column is not None else ()
        return cls(name, column, {**origins[0], **origins[-1]}, layer_column=layer_column, layers=layers)

    def check_layers(self, layers: Sequence[int]) -> None:
        if self.layer_column is None:
            super().check_layers(layers)
        _check_stored(
            layers, self.layers, f"the column {self.layer_column!r}", "score the rows again with --layers all"
        )

    def layer_scores(self, batch: Mapping[str, Any], layers: Sequence[int], candidates: str) -> torch.Tensor:
        places = [self.layers.index(number) for number in layers]
        return batch["teacher_scores"][self.layer_column].float().permute(2, 0, 1)[places]

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
        layer_stores: The vectors of its layers, of queries and of passages, as [`encode_table`] wrote them with
            `layers`; with them its layers teach with any candidates too.

    Raises:
        InputError: If `layer_stores` are not of the same layers.
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
        layer_stores: tuple[EmbeddingStore, EmbeddingStore] | None = None,
    ):
        self.vectors = queries, passages
        super().__init__(name)
        self.similarity, self.temperature = similarity, temperature
        self.stores = {name: (queries, passages)}
        self.embedding_size = queries.dim
        self.origin = dict(origin or {})
        self.layers: tuple[int, ...] = ()
        if layer_stores is not None:
            self.layers = tuple(layer_stores[0].key.get("layers", ()))
            if not self.layers or layer_stores[1].key.get("layers") != list(self.layers):
                raise InputError(
                    "these are no vectors of the same layers of queries and of passages",
                    where=f"{layer_stores[0].folder} and {layer_stores[1].folder}",
                    cure="Make both with encode_table(..., layers=[...])",
                )
            self.stores[self._of_layers] = layer_stores
            self.origin["layers"] = list(self.layers)
            self.num_layers = self.origin.get("num_layers") or max(self.layers)

    @property
    def _of_layers(self) -> str:
        """Under which name a batch has the vectors of layers."""
        return f"{self.name} layers"

    def check_layers(self, layers: Sequence[int]) -> None:
        if not self.layers:
            super().check_layers(layers)
        _check_stored(layers, self.layers, f"the cache of the teacher {self.name!r}", "encode with these layers too")

    def layer_scores(self, batch: Mapping[str, Any], layers: Sequence[int], candidates: str) -> torch.Tensor:
        vectors, places = batch["embeddings"][self._of_layers], [self.layers.index(number) for number in layers]
        chosen = (vectors[kind].float().unflatten(-1, (len(self.layers), -1))[:, places] for kind in KINDS)
        return vector_layer_scores(*arrange(*chosen, batch), candidates)

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


def _check_stored(layers: Sequence[int], stored: Sequence[int], where: str, cure: str) -> None:
    missing = [number for number in layers if number not in stored]
    if missing:
        raise InputError(
            f"{where} has the layers {', '.join(map(str, stored))}, not {missing[0]}",
            where="layers",
            cure=f"Pair these layers (--layer_pairing), or {cure}",
        )


def check_column(rows: RowSet, column: str, model: Any = None) -> dict[str, Any]:
    """The provenance of a column of scores, after a look whether it belongs to these texts and to this model.

    Args:
        rows: The row set.
        column: A column of scores, or of layers' scores.
        model: The model that should have made it, or None.

    Raises:
        InputError: If the column is not there, was made for other texts or by other weights, or stands in another
            order than the rows' documents.
    """
    from ..data import RowSet

    if column not in rows.columns:
        raise InputError(
            f"the rows have no column {column!r}",
            where="teacher",
            cure=f"Their columns are: {', '.join(rows.columns) or 'none'}; hf-distill score writes one",
        )
    origin = dict(rows.metadata.get("teachers", {}).get(column, {}))
    again = f"Score the rows again: hf-distill score --column {column}"
    for what, table in (("queries", rows.queries), ("corpus", rows.corpus)):
        if are_other_texts(rows.metadata, what, origin.get(f"{what}_fingerprint"), table.fingerprint):
            raise InputError(
                f"the column {column!r} was made for other {what} than those of {table.where} "
                "(the fingerprints differ)",
                where="teacher",
                cure=again,
            )
    weights = model.weights_fingerprint() if model is not None else None
    if weights is not None and origin.get("weights", weights) != weights:
        raise InputError(
            f"the column {column!r} was made by {origin.get('model')} (weights {origin['weights']}), not by the "
            f"teacher {model.name_or_path} (weights {weights})",
            where="teacher",
            cure=f"{again}, or give the revision of the teacher that it was made with",
        )
    moved = moved_example(rows, column) if isinstance(rows, RowSet) else None
    if moved is not None:
        raise InputError(
            f"the scores of the column {column!r} do not stand in the order of the rows' documents: document "
            f"{moved[1]!r} of query {moved[0]!r} was given {moved[2]:.6g} and has another score now",
            where="teacher",
            cure=f"{again}, or reorder the column as the documents were",
        )
    return origin
