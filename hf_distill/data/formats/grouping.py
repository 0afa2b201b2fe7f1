"""Lines of one query brought together, however they lie in a file, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ...errors import InputError
from ...files import cache_folder, fingerprint, write_json
from ..arrow import build_once
from ..readers import Block
from ..values import id_array
from .seen import hashes_of


# Text of a file that is put in order in memory at once.
_BUCKET_BYTES = 16 * 2**20
_MOST_BUCKETS = 512

# Lines of the groups that are handed on together.
_LINES = 2**16

_NUMBER = "__line"


@dataclass
class Groups:
    """Lines of some queries, each query's together.

    Attributes:
        queries: The identifier of each group's query.
        origin: Where each group's first line is.
        table: The lines.
        offsets: `int64[groups + 1]`, where each group begins.
    """

    queries: list[str]
    origin: Block
    table: pa.Table
    offsets: np.ndarray

    def has(self, name: str) -> bool:
        """Whether the file has such a column."""
        return name in self.table.column_names

    def lists(self, name: str) -> list[list[str]]:
        """The values of a column for each group, in the order of the file."""
        values = self.table.column(name).to_pylist()
        return [values[start:end] for start, end in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist())]


def grouped(
    blocks: Iterator[Block], names: Sequence[str], key: Any, path: Path, cache_dir: str | os.PathLike | None
) -> Iterator[Groups]:
    """Groups the lines of a file by their first column.

    The lines are first spread over files by a hash of that column, each small enough to be put in order in memory.
    Queries come in the order of these files and, within one, of their first lines.

    Args:
        blocks: The file's lines as strings.
        names: The columns to keep, those of them that there are; the first is the one to group by.
        key: Identifies the file.
        path: The file, whose size decides into how many the lines are spread.
        cache_dir: Where they are kept.
    """
    size = path.stat().st_size * (6 if path.name.endswith(".gz") else 1)
    buckets = int(min(_MOST_BUCKETS, max(1, -(-size // _BUCKET_BYTES))))
    folder = cache_folder(cache_dir) / "data" / f"grouped-{fingerprint([key, list(names), buckets])}"
    build_once(folder, lambda temporary: _spread(blocks, names, buckets, temporary, str(path)))
    for bucket in range(buckets):
        file = folder / f"{bucket:05d}.arrow"
        if file.exists():
            yield from _in_order(file, str(path))


def _spread(blocks: Iterator[Block], names: Sequence[str], buckets: int, folder: Path, where: str) -> None:
    total = 0
    with ExitStack() as stack:
        writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        for block in blocks:
            if not len(block):
                continue
            columns = {name: id_array(block, name) for name in names if name in block.columns}
            if names[0] not in columns:
                raise InputError(f"no column {names[0]!r}", where=where, cure=f"Its columns are: {', '.join(names)}")
            numbers = np.arange(block.first, block.first + len(block)) if block.lines is None else block.lines
            columns[_NUMBER] = pa.array(np.asarray(numbers, dtype=np.int64))
            table = pa.table(columns)
            owner = (hashes_of(columns[names[0]]) % np.uint64(buckets)).astype(np.int64)
            order = np.argsort(owner, kind="stable")
            present, starts = np.unique(owner[order], return_index=True)
            for bucket, rows in zip(present.tolist(), np.split(order, starts[1:])):
                if bucket not in writers:
                    sink = stack.enter_context(pa.OSFile(str(folder / f"{bucket:05d}.arrow"), "wb"))
                    writers[bucket] = stack.enter_context(pa.ipc.new_stream(sink, table.schema))
                writers[bucket].write_table(table.take(rows))
            total += len(block)
    write_json(folder / "info.json", {"lines": total, "file": where})


def _in_order(file: Path, where: str) -> Iterator[Groups]:
    with pa.memory_map(str(file)) as mapped:
        table = pa.ipc.open_stream(mapped).read_all()
    codes = table.column(0).combine_chunks().dictionary_encode()
    code = codes.indices.to_numpy(zero_copy_only=False)
    order = np.argsort(code, kind="stable")
    starts = np.searchsorted(code[order], np.arange(len(codes.dictionary) + 1))
    queries = codes.dictionary.to_pylist()
    first = 0
    while first < len(queries):
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + _LINES, side="right")) - 1)
        part = table.take(order[starts[first] : starts[last]])
        offsets = starts[first : last + 1] - starts[first]
        numbers = part.column(_NUMBER).to_numpy()[offsets[:-1]]
        yield Groups(
            queries[first:last], Block({}, where, int(numbers[0]), "line", numbers), part.drop_columns([_NUMBER]),
            offsets,
        )  # fmt: skip
        first = last
