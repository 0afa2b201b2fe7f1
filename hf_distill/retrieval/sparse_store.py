"""Sparse vectors on disk: shards of compressed rows, memory-mapped, addressed by position."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_matrix, vstack

from ..errors import InputError
from .shards import write_array
from .store import VectorStore


if TYPE_CHECKING:
    from ..data import TextTable

# The arrays of a shard, each a file of its own in the shard's folder.
_PARTS = ("ends", "terms", "weights")


def write_rows(path: Path, rows: csr_matrix, storage: str) -> None:
    """Writes one shard: row ends `int64[n]`, ascending terms `int32[nnz]`, their weights."""
    rows.sort_indices()
    path.mkdir(parents=True, exist_ok=True)
    arrays = (rows.indptr[1:].astype(np.int64), rows.indices.astype(np.int32), rows.data.astype(storage))
    for name, array in zip(_PARTS, arrays):
        write_array(path / f"{name}.npy", array)


class SparseStore(VectorStore):
    """Term weights of each row of a table; only what is asked for is read from disk.

    Args:
        folder: A folder that `encode_table` made.
        table: The queries or the corpus that the vectors stand for, to check that they fit.

    Raises:
        InputError: If the folder is incomplete or of other texts than those of `table`.
    """

    suffix = ""

    def __init__(self, folder: str | os.PathLike, table: TextTable | None = None):
        self.folder = Path(folder)
        self._shards = [_open(path) for path in self._read_manifest()]
        self._row_ends = np.cumsum([len(ends) for ends, _, _ in self._shards])
        self.dim = int(self.key["terms"])
        if table is not None:
            self._check(table)

    def __len__(self) -> int:
        return int(self._row_ends[-1])

    @property
    def dtype(self) -> np.dtype:
        """float32 or float16: how the weights are stored."""
        return self._shards[0][2].dtype

    @property
    def nnz(self) -> int:
        """Weights in all rows together."""
        return sum(len(terms) for _, terms, _ in self._shards)

    def rows(self, start: int, stop: int) -> csr_matrix:
        """Rows `start` to `stop` as `scipy.sparse.csr_matrix[n, V]` of float32."""
        start, stop = max(0, start), min(stop, len(self))
        parts = []
        for (ends, terms, weights), end in zip(self._shards, self._row_ends.tolist()):
            begin = end - len(ends)
            if end <= start or begin >= stop:
                continue
            first, last = max(0, start - begin), min(len(ends), stop - begin)
            offset = int(ends[first - 1]) if first else 0
            indptr = np.concatenate([[0], np.asarray(ends[first:last]) - offset])
            cells = slice(offset, offset + int(indptr[-1]))
            data = np.array(weights[cells], dtype=np.float32)
            parts.append(csr_matrix((data, np.array(terms[cells]), indptr), shape=(last - first, self.dim)))
        if not parts:
            return csr_matrix((0, self.dim), dtype=np.float32)
        return parts[0] if len(parts) == 1 else vstack(parts, format="csr")

    def take_sparse(self, positions: Sequence[int] | np.ndarray) -> csr_matrix:
        """Rows at `positions`, in their order; `IndexError` outside of the store."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= len(self)):
            raise IndexError(f"positions {positions.min()}..{positions.max()} outside of 0..{len(self) - 1}")
        owner = np.searchsorted(self._row_ends, positions, side="right")
        order = np.argsort(owner, kind="stable")
        parts = []
        for number in np.unique(owner).tolist():
            ends, terms, weights = self._shards[number]
            local = positions[order][owner[order] == number] - (self._row_ends[number] - len(ends))
            parts.append(_pick(ends, terms, weights, local, self.dim))
        if not parts:
            return self.rows(0, 0)
        return vstack(parts, format="csr")[np.argsort(order, kind="stable")]

    def take(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Rows at `positions` with their zeros, `float32[n, V]`: for a batch of training, not for a corpus."""
        return self.take_sparse(positions).toarray()

    def blocks(self, rows: int) -> Iterator[tuple[int, csr_matrix]]:
        """All rows as pairs *(first row, at most `rows` rows)*."""
        for start in range(0, len(self), rows):
            yield start, self.rows(start, start + rows)


def _open(folder: Path) -> tuple[np.ndarray, ...]:
    try:
        return tuple(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _PARTS)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot be read ({error})", where=str(folder), cure="Remove it and encode again: it is made anew"
        ) from None


def _pick(ends: np.ndarray, terms: np.ndarray, weights: np.ndarray, rows: np.ndarray, width: int) -> csr_matrix:
    """Rows of one shard."""
    starts = np.where(rows > 0, ends[np.maximum(rows - 1, 0)], 0)
    counts = ends[rows] - starts
    indptr = np.concatenate([[0], np.cumsum(counts)])
    cells = np.repeat(starts - indptr[:-1], counts) + np.arange(indptr[-1])
    return csr_matrix((weights[cells].astype(np.float32), terms[cells], indptr), shape=(len(rows), width))
