"""Small tools on memory-mapped Arrow columns: taking rows, lazy strings, content hashes, files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..files import atomic_path, remove_leftovers


# Rows per record batch: large enough for vectorised work, small enough that a block of long documents stays modest.
BLOCK_ROWS = 4096


def write_arrow(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Writes `tables` one after the other as an Arrow stream that `datasets` memory-maps; returns the rows."""
    total = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for table in tables:
            writer.write_table(table, max_chunksize=BLOCK_ROWS)
            total += table.num_rows
    return total


def open_arrow(path: Path) -> Any:
    """The memory-mapped `datasets.Dataset` of a file of `write_arrow`."""
    import datasets

    return datasets.Dataset.from_file(str(path))


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Makes a cache folder by `build(temporary folder)` unless it is there; one process at a time.

    Under a launcher every process asks for the same folder in the same moment; the others wait for the first.
    """
    from filelock import FileLock

    if not (folder / "info.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not (folder / "info.json").exists():
                remove_leftovers(folder)
                with atomic_path(folder) as temporary:
                    temporary.mkdir()
                    build(temporary)
    return folder


class Column:
    """A chunked column that fetches rows chunk by chunk.

    Arrow's own `take` joins all chunks of a variable-length column first, which would read a whole corpus into memory
    to fetch 64 passages.
    """

    def __init__(self, column: pa.ChunkedArray):
        self.type = column.type
        self.chunks = [chunk for chunk in column.chunks if len(chunk)]
        self.ends = np.cumsum([len(chunk) for chunk in self.chunks], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.chunks else 0

    def take(self, positions: Sequence[int] | np.ndarray) -> pa.Array:
        """The rows at `positions`, in their order; `IndexError` outside of the column."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size == 0:
            return pa.array([], type=self.type)
        if positions.min() < 0 or positions.max() >= len(self):
            raise IndexError(f"positions {positions.min()}..{positions.max()} outside of 0..{len(self) - 1}")
        if len(self.chunks) == 1:
            return self.chunks[0].take(pa.array(positions))
        owner = np.searchsorted(self.ends, positions, side="right")
        order = np.argsort(owner, kind="stable")
        chunks, starts = np.unique(owner[order], return_index=True)
        parts = []
        for chunk, group in zip(chunks.tolist(), np.split(order, starts[1:])):
            array = self.chunks[chunk]
            parts.append(array.take(pa.array(positions[group] - (self.ends[chunk] - len(array)))))
        joined = parts[0] if len(parts) == 1 else pa.concat_arrays(parts)
        if len(order) > 1 and (np.diff(order) != 1).any():
            inverse = np.empty_like(order)
            inverse[order] = np.arange(len(order))
            joined = joined.take(pa.array(inverse))
        return joined


class ArrowStrings(Sequence):
    """A sequence of strings that stays in Arrow; `rows` selects and orders."""

    def __init__(self, column: Column, rows: np.ndarray | None = None):
        self.column, self.rows = column, rows

    def __len__(self) -> int:
        return len(self.column) if self.rows is None else len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.at(np.arange(*index.indices(len(self))))
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"position {index} outside of 0..{len(self) - 1}")
        index %= len(self)
        return self.take([index])[0].as_py()

    def __iter__(self) -> Iterator[str]:
        for block in self.blocks():
            yield from block.to_pylist()

    def __eq__(self, other) -> bool:
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other))

    __hash__ = None

    def at(self, positions: Sequence[int] | np.ndarray) -> list[str]:
        """The strings at `positions`."""
        return self.take(positions).to_pylist()

    def take(self, positions: Sequence[int] | np.ndarray) -> pa.Array:
        """The Arrow array of the strings at `positions`."""
        positions = np.asarray(positions, dtype=np.int64)
        if self.rows is not None:
            if positions.size and positions.min() < 0:
                raise IndexError(f"position {int(positions.min())} is negative")
            positions = self.rows[positions]
        return self.column.take(positions)

    def blocks(self) -> Iterator[pa.Array]:
        """All strings, a block of at most `BLOCK_ROWS` at a time."""
        if self.rows is None:
            for chunk in self.column.chunks:
                for start in range(0, len(chunk), BLOCK_ROWS):
                    yield chunk.slice(start, BLOCK_ROWS)
        else:
            for start in range(0, len(self.rows), BLOCK_ROWS):
                yield self.column.take(self.rows[start : start + BLOCK_ROWS])


class ContentHash:
    """A streaming hash of columns that does not depend on how they are cut into blocks.

    Every column has one stream of lengths and one of bytes, so that equal content gives equal digits whatever file
    or block size it came in.
    """

    def __init__(self, names: Sequence[str]):
        self._streams = {name: [] for name in names}
        self._rows = 0

    def update(self, table: pa.Table) -> None:
        """Adds the rows of `table`, which must have the columns named at construction."""
        for name, streams in self._streams.items():
            for chunk in table.column(name).chunks:
                for level, values in enumerate(_plain_buffers(chunk)):
                    if level == len(streams):
                        streams.append(hashlib.sha256())
                    streams[level].update(values)
        self._rows += table.num_rows

    def hexdigest(self) -> str:
        """16 hexadecimal digits."""
        total = hashlib.sha256(str(self._rows).encode())
        for name, streams in self._streams.items():
            total.update(name.encode() + b"\0")
            for stream in streams:
                total.update(stream.digest())
        return total.hexdigest()[:16]


def _plain_buffers(array: pa.Array) -> Iterator[memoryview | np.ndarray]:
    """The lengths and values of an array without nulls, free of offsets into larger buffers."""
    if pa.types.is_list(array.type):
        yield np.ascontiguousarray(np.diff(_offsets(array)).astype(np.int64))
        yield from _plain_buffers(array.flatten())
    elif pa.types.is_string(array.type):
        offsets = _offsets(array)
        yield np.ascontiguousarray(np.diff(offsets).astype(np.int64))
        data = array.buffers()[2]
        yield memoryview(b"" if data is None else data)[offsets[0] : offsets[-1]]
    else:
        yield np.ascontiguousarray(array.to_numpy(zero_copy_only=False))


def _offsets(array: pa.Array) -> np.ndarray:
    if len(array) == 0:
        return np.zeros(1, dtype=np.int32)
    return np.frombuffer(array.buffers()[1], dtype=np.int32)[array.offset : array.offset + len(array) + 1]
