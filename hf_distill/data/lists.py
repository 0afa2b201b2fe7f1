"""List columns of row sets: made from arrays in blocks, and read row by row without copying."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import InputError
from .arrow import BLOCK_ROWS


def list_column(values: Any, kind: pa.DataType, name: str, lengths: np.ndarray | None = None) -> pa.ChunkedArray:
    """A list column of `kind` in blocks of `BLOCK_ROWS` rows.

    Args:
        values: A 2-D array, a sequence of sequences, an Arrow list array, or (only with `lengths`) all rows' entries
            one after the other in a 1-D array.
        kind: The type of an entry.
        name: The column's name, for messages.
        lengths: `int64[n]`, the entries of each row, for flat values.
    """
    target = pa.list_(kind)
    if isinstance(values, (pa.Array, pa.ChunkedArray)) and not (pa.types.is_primitive(values.type)):
        array = values.cast(target)
        chunks = array.chunks if isinstance(array, pa.ChunkedArray) else [array]
        parts = [chunk.slice(start, BLOCK_ROWS) for chunk in chunks for start in range(0, len(chunk), BLOCK_ROWS)]
    elif lengths is not None and _is_flat(values, lengths):
        parts = list(_flat_blocks(values, kind, name, lengths))
    else:
        rows = len(values)
        parts = [_block(values[start : start + BLOCK_ROWS], kind, name) for start in range(0, rows, BLOCK_ROWS)]
    return pa.chunked_array(parts, target)


def _is_flat(values: Any, lengths: np.ndarray) -> bool:
    return isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype != object


def _flat_blocks(values: np.ndarray, kind: pa.DataType, name: str, lengths: np.ndarray) -> Iterator[pa.Array]:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if len(values) != offsets[-1]:
        raise InputError(
            f"{len(values)} values for {offsets[-1]} documents",
            where=f"column {name!r}",
            cure="Give one value for each document of each row",
        )
    for start in range(0, len(lengths), BLOCK_ROWS):
        part = offsets[start : start + BLOCK_ROWS + 1]
        yield _from_offsets(part - part[0], values[part[0] : part[-1]], kind)


def _block(rows: Any, kind: pa.DataType, name: str) -> pa.Array:
    if isinstance(rows, np.ndarray) and rows.ndim == 2:
        return _from_offsets(np.arange(len(rows) + 1) * rows.shape[1], rows.reshape(-1), kind)
    rows = list(rows)
    if rows and all(isinstance(row, np.ndarray) and row.ndim == 1 for row in rows):
        return _from_offsets(np.concatenate([[0], np.cumsum([len(row) for row in rows])]), np.concatenate(rows), kind)
    plain = [row.tolist() if isinstance(row, np.ndarray) else row if row is None else list(row) for row in rows]
    try:
        return pa.array(plain, pa.list_(kind))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise InputError(
            f"not lists of {kind} ({error})", where=f"column {name!r}", cure="Convert the values"
        ) from None


def _from_offsets(offsets: np.ndarray, values: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values).cast(kind, safe=False))


def list_offsets(lists: pa.Array) -> np.ndarray:
    """Where each list begins among the entries of `lists.flatten()`, and where the last one ends."""
    if len(lists) == 0:
        return np.zeros(1, dtype=np.int32)
    offsets = lists.offsets.to_numpy()
    return offsets - offsets[0]


class ListView:
    """Rows of a list column as NumPy views of the Arrow buffers."""

    def __init__(self, column: pa.ChunkedArray):
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._ends = np.cumsum([len(chunk) for chunk in chunks]).tolist()
        self._parts: list[tuple[np.ndarray, Any]] = []
        for chunk in chunks:
            values = chunk.values
            plain = pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
            self._parts.append((chunk.offsets.to_numpy(), values.to_numpy() if plain else values))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def lengths(self) -> np.ndarray:
        """Number (`int64[n]`) of entries in each row."""
        parts = [np.diff(offsets) for offsets, _ in self._parts]
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def __getitem__(self, row: int) -> np.ndarray:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} outside of 0..{len(self) - 1}")
        chunk = bisect_right(self._ends, row)
        offsets, values = self._parts[chunk]
        local = row - (self._ends[chunk - 1] if chunk else 0)
        found = values[int(offsets[local]) : int(offsets[local + 1])]
        return found if isinstance(found, np.ndarray) else _object_array(found.to_pylist())


def _object_array(values: Sequence[Any]) -> np.ndarray:
    if values and isinstance(values[0], list):
        return np.array(values, dtype=np.float32)
    return np.array(values)
