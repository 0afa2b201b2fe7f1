"""Relevance judgements, as positions in the queries and the corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from .tables import Corpus, Queries


class PositiveIndex:
    """The relevant documents of every query, in compressed rows: no dictionary, three arrays.

    Args:
        query: `int64[n]`, positions of queries.
        document: `int64[n]`, positions of documents.
    """

    def __init__(self, query: np.ndarray, document: np.ndarray):
        order = np.lexsort((document, query))
        self.queries, starts = np.unique(query[order], return_index=True)
        self.documents = np.ascontiguousarray(document[order], dtype=np.int64)
        self.offsets = np.append(starts, len(order)).astype(np.int64)

    def of(self, query_position: int) -> np.ndarray:
        """Positions (`int64[p]`, ascending) of the query's relevant documents; empty for an unlabelled query."""
        slot = int(np.searchsorted(self.queries, query_position))
        if slot == len(self.queries) or self.queries[slot] != query_position:
            return self.documents[:0]
        return self.documents[self.offsets[slot] : self.offsets[slot + 1]]

    @property
    def max_positives(self) -> int:
        """The greatest number of relevant documents that a query has."""
        return int(np.diff(self.offsets).max(initial=0))


class Qrels:
    """Judgements of documents for queries.

    Args:
        query: `int64[n]`, positions in the queries.
        document: `int64[n]`, positions in the corpus.
        relevance: `int64[n]`, grades as they were given; 1 and more is relevant unless a threshold says otherwise.
    """

    def __init__(self, query: Sequence[int], document: Sequence[int], relevance: Sequence[int]):
        self.query = np.asarray(query, dtype=np.int64)
        self.document = np.asarray(document, dtype=np.int64)
        self.relevance = np.asarray(relevance, dtype=np.int64)
        if not len(self.query) == len(self.document) == len(self.relevance):
            raise ValueError("query, document and relevance have different lengths")

    def __len__(self) -> int:
        return len(self.query)

    def __repr__(self) -> str:
        return f"Qrels({len(self)} judgements of {len(np.unique(self.query))} queries)"

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the judgements; their order does not count."""
        order = np.lexsort((self.relevance, self.document, self.query))
        content = hashlib.sha256()
        for values in (self.query, self.document, self.relevance):
            content.update(values[order].astype("<i8").tobytes())
        return content.hexdigest()[:16]

    def query_positions(self, threshold: int = 1) -> np.ndarray:
        """Positions (`int64`, ascending) of the queries with a document of at least grade `threshold`."""
        return np.unique(self.query[self.relevance >= threshold])

    def positives(self, threshold: int = 1) -> PositiveIndex:
        """The documents of at least grade `threshold`, by query."""
        relevant = self.relevance >= threshold
        return PositiveIndex(self.query[relevant], self.document[relevant])

    def subset(self, query_positions: Sequence[int] | np.ndarray) -> Qrels:
        """The judgements of these queries only."""
        keep = np.isin(self.query, np.asarray(query_positions, dtype=np.int64))
        return Qrels(self.query[keep], self.document[keep], self.relevance[keep])

    def as_dict(self, queries: Queries, corpus: Corpus) -> dict[str, dict[str, int]]:
        """`{query id: {document id: grade}}`, the form of pytrec_eval."""
        result: dict[str, dict[str, int]] = {}
        for query, document, grade in zip(
            queries.ids_at(self.query), corpus.ids_at(self.document), self.relevance.tolist()
        ):
            result.setdefault(query, {})[document] = grade
        return result
