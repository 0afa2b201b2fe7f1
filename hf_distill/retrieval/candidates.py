"""A run as mining sees it: blocks of queries with their results, positives and scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..data.run import Run
from .shards import digest


if TYPE_CHECKING:
    from ..data import Collection
    from .mining import MiningOptions

_BLOCK_QUERIES = 4096


class KnownPositives:
    """Which documents are relevant for a query: by its split (they become the row's positives), and by any split.

    Args:
        collection: The collection.
        split: The split of the rows; None for rows without positives.
        threshold: The lowest grade of a positive.
    """

    def __init__(self, collection: Collection, split: str | None, threshold: int):
        self.size = len(collection.corpus)
        keys = [np.empty(0, np.int64)]
        for qrels in collection.qrels.values():
            relevant = qrels.relevance >= threshold
            keys.append(qrels.query[relevant] * self.size + qrels.document[relevant])
        self.keys = np.unique(np.concatenate(keys))
        self.query = self.document = np.empty(0, np.int64)
        if split is not None:
            qrels = collection.split(split)
            relevant = np.flatnonzero(qrels.relevance >= threshold)
            # The highest grades first, as in `RowSet.from_qrels`.
            order = relevant[np.lexsort((qrels.document[relevant], -qrels.relevance[relevant], qrels.query[relevant]))]
            self.query, self.document = qrels.query[order], qrels.document[order]

    @property
    def fingerprint(self) -> str:
        return digest(self.keys, self.query, self.document)

    def contains(self, query: np.ndarray, document: np.ndarray) -> np.ndarray:
        """Whether `document` is relevant for `query`, element by element, after broadcasting."""
        keys = query * self.size + document
        if not len(self.keys):
            return np.zeros(keys.shape, dtype=bool)
        slots = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return (self.keys[slots] == keys) & (document >= 0)

    def of(self, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The split's positives of several queries: which of the queries `int64[p]`, and the documents `int64[p]`."""
        starts, ends = np.searchsorted(self.query, query, "left"), np.searchsorted(self.query, query, "right")
        counts = ends - starts
        rows = np.repeat(np.arange(len(query)), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        return rows, self.document[np.repeat(starts, counts) + within]


@dataclass
class Block:
    """Some queries, their results and their positives.

    Attributes:
        query: `int64[b]`.
        documents: `int64[b, d]`, by rank; -1 where there is none.
        scores: `float32[b, d]`, the retriever's.
        judged: `float32[b, d]`, the scores that filters look at: the teacher's where there is one (NaN outside of the
            window), else the retriever's.
        is_positive: `bool[b, d]`.
        eligible: `bool[b, d]`: in the window, found, and not positive.
        positive_row: `int64[p]`, which query a positive belongs to, ascending.
        positive_document: `int64[p]`.
        positive_rank: `int64[p]`, 0 if it was not retrieved.
        positive_score: `float32[p]`, the retriever's.
        positive_judged: `float32[p]`, the teacher's, or None.
        reference: `float32[b]`, the lowest known score of a positive, of the kind of `judged`; NaN if there is none.
    """

    query: np.ndarray
    documents: np.ndarray
    scores: np.ndarray
    judged: np.ndarray
    is_positive: np.ndarray
    eligible: np.ndarray
    positive_row: np.ndarray
    positive_document: np.ndarray
    positive_rank: np.ndarray
    positive_score: np.ndarray
    positive_judged: np.ndarray | None
    reference: np.ndarray

    @property
    def num_positives(self) -> np.ndarray:
        """`int64[b]`."""
        return np.bincount(self.positive_row, minlength=len(self.query))

    def passes(self, options: MiningOptions) -> np.ndarray:
        """Whether a candidate's score lets it be a negative; where no positive has a score, margins let all pass."""
        passed = np.ones(self.judged.shape, dtype=bool)
        reference = self.reference[:, None]
        unknown = np.isnan(reference)
        if options.margin is not None:
            passed &= unknown | (self.judged <= reference - options.margin)
        if options.relative_margin is not None:
            # The share is of the score's size, so that negative scores move down too.
            passed &= unknown | (self.judged <= reference - options.relative_margin * np.abs(reference))
        if options.max_score is not None:
            passed &= self.judged <= options.max_score
        if options.min_score is not None:
            passed &= self.judged >= options.min_score
        return passed


class Candidates:
    """A run with what is known of its documents.

    Args:
        run: The results, sorted.
        known: The positives.
        window: First and last rank of negatives.
        scorer: Scores pairs *(query `int64[n]`, document `int64[n]`)* as the retriever does, for positives that the
            run lacks; None if that is not possible.
    """

    def __init__(
        self,
        run: Run,
        known: KnownPositives,
        window: tuple[int, int],
        scorer: Callable[[np.ndarray, np.ndarray], np.ndarray] | None,
    ):
        self.run, self.known, self.window = run, known, window
        rows, documents = known.of(run.query)
        self._positive_offsets = np.searchsorted(rows, np.arange(len(run) + 1))
        self._positive_scores: np.ndarray | None = None
        if scorer is not None and len(rows):
            self._positive_scores = scorer(run.query[rows], documents)
        self._teacher: np.ndarray | None = None
        self._teacher_offsets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.run)

    @property
    def fingerprint(self) -> str:
        """Of the scores of positives that do not come from the run."""
        return digest(np.empty(0) if self._positive_scores is None else self._positive_scores)

    def masks(self) -> list[np.ndarray]:
        """Packed masks of all eligible documents of each block."""
        return [np.packbits(block.eligible, axis=1) for block in self.blocks()]

    def judge(self, scores: np.ndarray) -> None:
        """Takes a teacher's scores: for each query with an eligible document its positives', then those of its
        eligible documents by rank, all in one `float32[n]`."""
        counts = []
        for block in self.blocks():
            eligible = block.eligible.sum(axis=1)
            counts.append(np.where(eligible > 0, eligible + block.num_positives, 0))
        self._teacher_offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        if self._teacher_offsets[-1] != len(scores):
            raise ValueError(f"{len(scores)} scores for {self._teacher_offsets[-1]} documents")
        self._teacher = scores

    def blocks(self) -> Iterator[Block]:
        """All queries, some at a time."""
        for start in range(0, len(self.run), _BLOCK_QUERIES):
            yield self._block(start, min(start + _BLOCK_QUERIES, len(self.run)))

    def _block(self, start: int, stop: int) -> Block:
        query = self.run.query[start:stop]
        documents, scores = self.run.documents[start:stop], self.run.scores[start:stop]
        is_positive = self.known.contains(query[:, None], documents)
        ranks = np.arange(1, documents.shape[1] + 1)
        first, last = self.window
        eligible = (documents >= 0) & ~is_positive & (ranks >= first) & (ranks <= last)
        row, document = self.known.of(query)
        rank = _ranks(documents, row, document)
        found = rank > 0
        in_run = scores[row, rank - 1]
        if self._positive_scores is not None:
            score = self._positive_scores[self._positive_offsets[start] : self._positive_offsets[stop]]
            known = np.ones(len(row), dtype=bool)
        else:
            # Not retrieved: not above the last result.
            worst = np.where(documents >= 0, scores, np.inf).min(axis=1, initial=np.inf)
            worst = np.where(np.isfinite(worst), worst, 0.0).astype(np.float32)
            score, known = np.where(found, in_run, worst[row]).astype(np.float32), found
        judged, positive_judged, reference_scores = scores, None, np.where(known, score, np.nan)
        if self._teacher is not None:
            judged, positive_judged = self._judged(start, stop, eligible, row)
            reference_scores = positive_judged
        reference = np.full(len(query), np.inf, dtype=np.float32)
        usable = ~np.isnan(reference_scores)
        np.minimum.at(reference, row[usable], reference_scores[usable])
        reference[np.isinf(reference)] = np.nan
        return Block(
            query, documents, scores, judged, is_positive, eligible, row, document, rank, score, positive_judged,
            reference,
        )  # fmt: skip

    def _judged(self, start: int, stop: int, eligible: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's scores of a block's results (NaN where not eligible) and positives."""
        offsets = self._teacher_offsets[start : stop + 1]
        scores = self._teacher[offsets[0] : offsets[-1]]
        positives = np.bincount(row, minlength=stop - start)
        positives = np.where(np.diff(offsets) > 0, positives, 0)
        within = np.arange(len(scores)) - np.repeat(offsets[:-1] - offsets[0], np.diff(offsets))
        is_positive = within < np.repeat(positives, np.diff(offsets))
        judged = np.full(eligible.shape, np.nan, dtype=np.float32)
        judged[eligible] = scores[~is_positive]
        positive_judged = np.full(len(row), np.nan, dtype=np.float32)
        positive_judged[np.isin(row, np.flatnonzero(positives))] = scores[is_positive]
        return judged, positive_judged


def _ranks(documents: np.ndarray, row: np.ndarray, document: np.ndarray) -> np.ndarray:
    """The rank (from 1) of `document[i]` among the results `documents[row[i]]`; 0 where it is not there."""
    if not len(row):
        return np.zeros(0, dtype=np.int64)
    found = documents[row] == document[:, None]
    return np.where(found.any(axis=1), found.argmax(axis=1) + 1, 0)
