"""Exact search of sparse vectors: an inverted index, in floats or in the whole numbers of an impact index."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit
from scipy.sparse import csr_matrix

from ..errors import InputError
from ..files import read_json
from .inference import InferenceModel
from .shards import MANIFEST, ShardedJob, write_array
from .sparse_store import SparseStore


# Raised by hand when the same key would give another index.
INVERTED_VERSION = 1

IMPACT = "Impact"
# The same impacts, searched by another engine, see `pisa`.
PISA = "Pisa"
# What learned weights are multiplied by before they are rounded to impacts.
SCALE = 100
# Documents of a segment: their scores stay in a core's cache, and two bytes say which one is meant.
SEGMENT_ROWS = 2**16
_QUERY_BLOCK = 4096
_BINS = 512
_PARTS = ("starts", "documents", "weights")


def quantise(rows: csr_matrix, scale: int = SCALE) -> csr_matrix:
    """Impacts: weights times `scale`, rounded to whole numbers (halves to the even one); those below 1 are dropped.

    Args:
        rows: Float[n, V].
        scale: The factor.

    Returns:
        `int32[n, V]`.
    """
    impacts = rows.copy()
    impacts.data = np.maximum(np.rint(np.asarray(rows.data, np.float32) * scale), 0).astype(np.int32)
    impacts.eliminate_zeros()
    return impacts


def parse_factory(factory: str) -> int | None:
    """The scale that an index's description stands for: None for floats.

    Args:
        factory: `"Flat"` for weights as they are; `"Impact"` for whole numbers, or `"Impact;scale=1000"`; `"Pisa"`,
            also with a scale, for these in PISA.

    Raises:
        InputError: For anything else.
    """
    name, _, option = factory.partition(";")
    if name == "Flat" and not option:
        return None
    key, _, value = option.partition("=")
    if name in (IMPACT, PISA) and (
        not option or (key.strip() == "scale" and value.strip().isdigit() and int(value) > 0)
    ):
        return int(value) if option else SCALE
    raise InputError(
        f"{factory!r} is no index of a lexical model",
        where="index",
        cure="Use Flat (exact, weights as they are), Impact (exact, weights times 100 as whole numbers), or Pisa (the "
        "same in that engine)",
    )


class InvertedIndex:
    """The sparse vectors of a corpus, searched by inner product.

    Build one with [`InvertedIndex.build`]. Search is exact: every document that shares a term with a query is scored,
    segment by segment, and the k best are kept.

    Attributes:
        scale: What weights were multiplied by before rounding, or None where they are as they are.
        dim: Number of terms.
        key: What the index was made from.
    """

    def __init__(self, segments: list[tuple[np.ndarray, ...]], rows: int, dim: int, scale: int | None):
        self._segments, self._rows, self.dim, self.scale = segments, rows, dim, scale
        self.key: dict[str, Any] = {}

    @classmethod
    def build(
        cls,
        vectors: SparseStore | csr_matrix,
        scale: int | None = None,
        *,
        cache_dir: str | os.PathLike | None = None,
    ) -> InvertedIndex:
        """Makes an index; that of a store is kept in the cache and found again.

        Segments are made by accelerate's processes, all of which must call this for a store; a killed job goes on
        where it stopped.

        Args:
            vectors: Float[n, V].
            scale: Turn weights into impacts with this factor; None for weights as they are.
            cache_dir: Instead of the default cache folder.
        """
        rows, dim = vectors.shape
        if not rows:
            raise InputError("no vectors to search", where="InvertedIndex.build", cure="Encode a corpus first")
        bounds = range(0, rows, SEGMENT_ROWS)
        if not isinstance(vectors, SparseStore):
            return cls([_segment(vectors[first : first + SEGMENT_ROWS], scale) for first in bounds], rows, dim, scale)
        key = {
            "version": INVERTED_VERSION,
            "vectors": vectors.fingerprint,
            "weights": vectors.key.get("weights"),
            "rows": rows,
            "terms": dim,
            "scale": scale,
        }
        job = ShardedJob.cached("inverted", key, len(bounds), cache_dir, suffix="")

        def write(number: int, path: Path) -> None:
            first = number * SEGMENT_ROWS
            path.mkdir(parents=True)
            for name, array in zip(_PARTS, _segment(vectors.rows(first, first + SEGMENT_ROWS), scale)):
                write_array(path / f"{name}.npy", array)

        job.run(write, "index", sizes=[min(SEGMENT_ROWS, rows - first) for first in bounds], unit="passage")
        return cls.open(job.folder)

    @classmethod
    def open(cls, folder: str | os.PathLike, model: InferenceModel | None = None) -> InvertedIndex:
        """Opens an index that was built before.

        Args:
            folder: Its folder.
            model: The model that is to search in it.

        Raises:
            InputError: If it is incomplete, or was built by other weights than the model's.
        """
        folder = Path(folder)
        try:
            key = read_json(folder / MANIFEST)["key"]
            paths = [folder / f"shard-{number:05d}" for number in range(key["num_shards"])]
            segments = [
                tuple(np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _PARTS)
                for path in paths
            ]
            index = cls(segments, key["rows"], key["terms"], key["scale"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"no inverted index, or not all of it ({error})",
                where=str(folder),
                cure="Build it again: finished segments are kept",
            ) from None
        index.key = key
        if model is not None and key.get("weights") != model.key()["weights"]:
            raise InputError(
                f"the index was built by other weights ({key.get('weights')}) than those of the model "
                f"({model.key()['weights']})",
                where=str(folder),
                cure="Encode and index the corpus with this model",
            )
        return index

    def __len__(self) -> int:
        return self._rows

    @property
    def num_bytes(self) -> int:
        """Size of the index."""
        return sum(array.nbytes for segment in self._segments for array in segment)

    def search(self, queries: csr_matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents of each query.

        Args:
            queries: Float[n, V].
            k: How many.

        Returns:
            Scores `float32[n, k]`, descending, and positions `int64[n, k]`; where scores are equal, ascending
            positions. Documents that share no term with the query are not found: -inf and -1 stand at the end.
        """
        if queries.shape[1] != self.dim:
            raise InputError(
                f"queries over {queries.shape[1]} terms for an index over {self.dim}",
                where="InvertedIndex.search",
                cure="Encode both with the same model",
            )
        if k < 1:
            raise InputError(f"k is {k}", where="InvertedIndex.search", cure="Ask for one result at least")
        k = min(k, len(self))
        queries = csr_matrix(queries, dtype=np.float32) if self.scale is None else quantise(queries, self.scale)
        scores = np.empty((queries.shape[0], k), np.float32)
        positions = np.empty((queries.shape[0], k), np.int64)
        with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
            for start in range(0, queries.shape[0], _QUERY_BLOCK):
                block = slice(start, start + _QUERY_BLOCK)
                scores[block], positions[block] = self._search_block(queries[block], k, pool)
        return scores, positions

    def _search_block(self, queries: csr_matrix, k: int, pool: ThreadPoolExecutor) -> tuple[np.ndarray, np.ndarray]:
        count = queries.shape[0]
        best = np.zeros((count, k), np.float32 if self.scale is None else np.int64)
        found = np.full((count, k), -1, np.int64)
        ends, terms = queries.indptr.astype(np.int64), queries.indices.astype(np.int32)
        # Many small parts: queries differ in cost.
        parts = np.array_split(np.arange(count), min(count, 8 * torch.get_num_threads()))
        for number, segment in enumerate(self._segments):
            first = number * SEGMENT_ROWS
            size = min(SEGMENT_ROWS, len(self) - first)

            def search(part: np.ndarray, segment: Any = segment, first: int = first, size: int = size) -> None:
                _search_segment(
                    *segment, size, first, ends, terms, queries.data, int(part[0]), int(part[-1]) + 1, best, found
                )

            for _ in pool.map(search, parts):
                pass
        scores = best.astype(np.float32) if self.scale is None else (best / self.scale**2).astype(np.float32)
        return np.where(found < 0, np.float32(-np.inf), scores), found

    def document_frequencies(self) -> np.ndarray:
        """`int64[V]`, in how many documents each term is active."""
        return sum((np.diff(starts) for starts, _, _ in self._segments), np.zeros(self.dim, np.int64))

    def postings(self, term: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of a term in ascending order, `int64[n]`, and their weights."""
        documents, weights = [], []
        for number, (starts, local, values) in enumerate(self._segments):
            cells = slice(starts[term], starts[term + 1])
            documents.append(local[cells].astype(np.int64) + number * SEGMENT_ROWS)
            weights.append(values[cells])
        return np.concatenate(documents), np.concatenate(weights)

    def document_sums(self) -> np.ndarray:
        """`float64[rows]` (whole numbers for impacts), the sum of each document's weights."""
        sums = [
            np.bincount(local, weights=values, minlength=min(SEGMENT_ROWS, len(self) - number * SEGMENT_ROWS))
            for number, (_, local, values) in enumerate(self._segments)
        ]
        totals = np.concatenate(sums)
        return totals if self.scale is None else totals.astype(np.int64)


def _segment(rows: csr_matrix, scale: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Postings of at most SEGMENT_ROWS documents: where each term's begin, the documents, their weights."""
    if scale is not None:
        rows = quantise(rows, scale)
        if rows.nnz and rows.data.max() > np.iinfo(np.uint16).max:
            raise InputError(
                f"a weight of {rows.data.max() / scale:.1f} times {scale} is too large for an impact",
                where="InvertedIndex.build",
                cure="Use a smaller scale, or Flat",
            )
    columns = rows.tocsc()
    weights = columns.data.astype(np.float32 if scale is None else np.uint16)
    return columns.indptr.astype(np.int64), columns.indices.astype(np.uint16), weights


@njit(nogil=True, cache=True)
def _search_segment(
    starts, documents, weights, size, first, query_ends, query_terms, query_weights, begin, end, best, found
):  # pragma: no cover - compiled
    """Scores one segment for the queries `begin` to `end` and merges what is better into `best` and `found`."""
    scores = np.zeros(size, best.dtype)
    k = best.shape[1]
    new_scores = np.empty(size + k, best.dtype)
    new_places = np.empty(size + k, np.int64)
    histogram = np.empty(_BINS, np.int64)
    for query in range(begin, end):
        for cell in range(query_ends[query], query_ends[query + 1]):
            term, weight = query_terms[cell], best.dtype.type(query_weights[cell])
            for posting in range(starts[term], starts[term + 1]):
                scores[documents[posting]] += weight * weights[posting]
        # A later document has to be strictly better than the k-th so far.
        threshold = best[query, k - 1]
        count, largest = 0, threshold
        for score in scores:
            if score > threshold:
                count += 1
                largest = max(largest, score)
        if count:
            # Where far more than k could enter, a histogram finds a level that k of them reach.
            level, factor = 0, 0.0
            if count > 2 * k:
                factor = (_BINS - 1) / (largest - threshold)
                histogram[:] = 0
                for score in scores:
                    if score > threshold:
                        histogram[int((score - threshold) * factor)] += 1
                level, reached = _BINS, 0
                while reached < k:
                    level -= 1
                    reached += histogram[level]
            held = 0
            while held < k and found[query, held] >= 0:
                new_scores[held], new_places[held] = best[query, held], found[query, held]
                held += 1
            for document in range(size):
                score = scores[document]
                if score > threshold and int((score - threshold) * factor) >= level:
                    new_scores[held], new_places[held] = score, first + document
                    held += 1
            # Stable, and equal scores stand in the order of their positions already.
            order = np.argsort(-new_scores[:held], kind="mergesort")
            for rank in range(min(k, held)):
                best[query, rank], found[query, rank] = new_scores[order[rank]], new_places[order[rank]]
        scores[:] = 0
