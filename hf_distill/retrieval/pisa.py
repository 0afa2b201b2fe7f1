"""PISA as the engine behind a lexical model's search: dynamic pruning over impacts, through pyterrier-pisa (an extra).

Mallia et al., "PISA: Performant Indexes and Search for Academia" (2019). The impacts are those of [`quantise`], so the
scores are those of an `Impact` index; which of the documents with equal scores come last is the engine's choice.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from ..errors import InputError
from .inverted import PISA, SCALE, quantise
from .shards import ShardedJob
from .sparse_store import SparseStore


# Raised by hand when the same key would give another index.
PISA_VERSION = 1

# A result is a Python string inside the engine, so few queries at a time.
_BLOCK = 1024


def is_pisa(factory: str) -> bool:
    """Whether an index's description names this engine."""
    return factory.partition(";")[0] == PISA


def check_pisa() -> None:
    """Raises [`InputError`] if the engine is not installed."""
    if importlib.util.find_spec("pyterrier_pisa") is None:
        raise InputError(
            "PISA is not installed",
            where="index",
            cure="pip install 'hf_distill[pisa]', or use Impact, which gives the same scores",
        )


class PisaIndex:
    """The impacts of a corpus in PISA's own files, searched by inner product like an [`InvertedIndex`].

    Args:
        folder: What [`write_pisa`] wrote.
        rows: Number of documents.
        dim: Number of terms.
        scale: What weights are multiplied by before they are rounded.
    """

    def __init__(self, folder: str | os.PathLike, rows: int, dim: int, scale: int = SCALE):
        self.folder, self._rows, self.dim, self.scale = Path(folder), rows, dim, scale
        self._engines: dict[int, Any] = {}

    @classmethod
    def build(
        cls, vectors: SparseStore, scale: int | None = SCALE, *, cache_dir: str | os.PathLike | None = None
    ) -> PisaIndex:
        """Makes the index of a store, or finds it in the cache; all of accelerate's processes must call this.

        Args:
            vectors: Float[n, V].
            scale: What weights are multiplied by before they are rounded.
            cache_dir: Instead of the default cache folder.
        """
        check_pisa()
        key = {"version": PISA_VERSION, "vectors": vectors.fingerprint, "scale": scale}
        job = ShardedJob.cached("pisa", key, 1, cache_dir, suffix="")
        job.run(lambda _, path: write_pisa(path, vectors, scale), "PISA index", sizes=[len(vectors)], unit="passage")
        return cls(job.path(0), *vectors.shape, scale)

    def __len__(self) -> int:
        return self._rows

    def search(self, queries: csr_matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents of each query.

        Args:
            queries: Float[n, V].
            k: How many.

        Returns:
            Scores `float32[n, k]`, descending, and positions `int64[n, k]`; where scores are equal, ascending
            positions. Documents that share no term with the query are not found: -inf and -1 stand at the end.
        """
        k = min(k, len(self))
        impacts = quantise(queries, self.scale)
        scores = np.full((queries.shape[0], k), -np.inf, np.float32)
        positions = np.full((queries.shape[0], k), -1, np.int64)
        asked = np.flatnonzero(np.diff(impacts.indptr))
        for start in range(0, len(asked), _BLOCK):
            rows = asked[start : start + _BLOCK]
            scores[rows], positions[rows] = self._search_block(impacts[rows], k)
        return scores, positions

    def _search_block(self, impacts: csr_matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
        import pandas as pd

        questions = pd.DataFrame(
            {"qid": [str(row) for row in range(impacts.shape[0])], "query_toks": list(_terms_of(impacts))}
        )
        found = self._engine(k).transform(questions)
        row, document = (found[name].to_numpy().astype(np.int64) for name in ("qid", "docno"))
        score = found["score"].to_numpy().astype(np.float32)
        order = np.lexsort((document, -score, row))
        row, document, score = row[order], document[order], score[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        scores = np.full((impacts.shape[0], k), -np.inf, np.float32)
        positions = np.full((impacts.shape[0], k), -1, np.int64)
        scores[row, rank], positions[row, rank] = score / self.scale**2, document
        return scores, positions

    def _engine(self, k: int) -> Any:
        if k not in self._engines:
            self._engines[k] = _retrieval(self.folder, k)
        return self._engines[k]


def write_pisa(folder: str | os.PathLike, vectors: SparseStore | csr_matrix, scale: int = SCALE) -> None:
    """Writes PISA's index of impacts, with all that it needs for searching.

    Args:
        folder: Receives the files.
        vectors: Float[n, V]; the documents are called by their positions.
        scale: What weights are multiplied by before they are rounded.
    """
    from pyterrier_pisa import PisaIndex as Files

    folder = Path(folder)
    blocks = vectors.blocks(_BLOCK) if isinstance(vectors, SparseStore) else [(0, vectors)]
    Files(str(folder), stemmer="none", stops="none").toks_indexer(scale=1).index(_documents(blocks, scale))
    _retrieval(folder, 1)  # compresses the postings and finds the bounds of their blocks, once and for all


def _retrieval(folder: Path, k: int) -> Any:
    import torch
    from pyterrier_pisa import PisaIndex as Files

    files = Files(str(folder), stemmer="none", stops="none", threads=torch.get_num_threads())
    return files.quantized(num_results=k, query_algorithm="maxscore", toks_scale=1.0)


def _documents(blocks: Any, scale: int) -> Iterator[dict[str, Any]]:
    for first, rows in blocks:
        for number, terms in enumerate(_terms_of(quantise(rows, scale)), start=first):
            yield {"docno": str(number), "toks": terms}


def _terms_of(impacts: csr_matrix) -> Iterator[dict[str, int]]:
    """Every row's terms, by their numbers, and impacts."""
    for start, end in zip(impacts.indptr[:-1].tolist(), impacts.indptr[1:].tolist()):
        terms, weights = impacts.indices[start:end].tolist(), impacts.data[start:end].tolist()
        yield {str(term): weight for term, weight in zip(terms, weights)}
