"""Texts of a column set as numbers: equal texts found by hash, written once, in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from ..errors import InputError
from . import schema
from .readers import Block


@dataclass
class ColumnLayout:
    """Which column means what.

    Attributes:
        query: The column of queries.
        documents: One list column (`listwise`), or the text columns in order, positive first.
        listwise: Whether `documents` is one column of lists.
        labels: The column `label` or `labels`, if there is one.
        scores: The column `score` or `scores`, if there is one.
    """

    query: str
    documents: list[str]
    listwise: bool
    labels: str | None
    scores: str | None


@dataclass
class Ragged:
    """Lists of numbers: `values` float64[t], and `offsets` int64[n + 1] of the rows in them."""

    values: np.ndarray
    offsets: np.ndarray

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]


@dataclass
class HashedRows:
    """What one pass over a column set leaves: hashes in place of texts.

    Attributes:
        queries: `uint64[n, 2]`, the hash of each row's query.
        documents: `uint64[t, 2]`, the hashes of all rows' documents.
        offsets: `int64[n + 1]`, where each row begins in `documents`.
        labels: The numbers of the label column, if there is one.
        scores: The numbers of the score column, if there is one.
        place: Names a row in messages.
    """

    queries: np.ndarray
    documents: np.ndarray
    offsets: np.ndarray
    labels: Ragged | None
    scores: Ragged | None
    place: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.queries)


def read_hashes(blocks: Iterator[Block], layout: ColumnLayout, where: str) -> HashedRows:
    queries, documents, lengths = [], [], []
    labels: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    starts: list[int] = []
    origins: list[Block] = []
    total = 0
    for block in blocks:
        starts.append(total)
        origins.append(block.origin())
        total += len(block)
        texts, lists = _block_texts(block, layout)
        queries.append(_hashes(texts))
        documents.append(_hashes([text for row in lists for text in row]))
        lengths.append([len(row) for row in lists])
        labels += _numbers(block, layout.labels)
        scores += _numbers(block, layout.scores)
    if not total:
        raise InputError("no rows in it", where=where, cure="Choose a split that has rows")

    def place(row: int) -> str:
        owner = int(np.searchsorted(starts, row, side="right")) - 1
        return origins[owner].place(row - starts[owner])

    return HashedRows(
        np.concatenate(queries),
        np.concatenate(documents),
        _offsets(np.concatenate(lengths)),
        _ragged(labels),
        _ragged(scores),
        place,
    )


def _block_texts(block: Block, layout: ColumnLayout) -> tuple[list[str], list[list[str]]]:
    """The queries of a block and each row's documents."""
    queries = _plain(block, layout.query)
    if layout.listwise:
        lists = [row or [] for row in _plain(block, layout.documents[0])]
    else:
        lists = [list(row) for row in zip(*(_plain(block, name) for name in layout.documents))]
    for row, (query, documents) in enumerate(zip(queries, lists)):
        for text, field in ((query, layout.query), *((text, layout.documents[0]) for text in documents[:1] or [None])):
            if not isinstance(text, str) or not text.strip():
                raise InputError(
                    f"{text!r} where a text is expected",
                    where=f"{block.place(row)}, field {field!r}",
                    cure="Fill it in or remove the row",
                )
        for number, text in enumerate(documents):
            if not isinstance(text, str):
                field = layout.documents[0] if layout.listwise else layout.documents[number]
                raise InputError(
                    f"{text!r} where a text is expected",
                    where=f"{block.place(row)}, field {field!r}",
                    cure="Fill it in or remove the row",
                )
    return queries, lists


def _plain(block: Block, name: str | None) -> list[Any]:
    if name is None:
        return []
    if name not in block.columns:
        raise InputError(f"no column {name!r}", where=block.place(0), cure="Every row needs the same columns")
    values = block.columns[name]
    return values.to_pylist() if isinstance(values, (pa.Array, pa.ChunkedArray)) else list(values)


def _numbers(block: Block, name: str | None) -> list[np.ndarray]:
    rows = []
    for row, value in enumerate(_plain(block, name)):
        try:
            numbers = np.atleast_1d(np.asarray(value, dtype=np.float64))
        except (TypeError, ValueError):
            numbers = np.array([np.nan])
        if numbers.ndim != 1 or not np.isfinite(numbers).all():
            raise InputError(
                f"{str(value)[:80]} is no finite number or list of them",
                where=f"{block.place(row)}, field {name!r}",
                cure="Mend the value or remove the row",
            )
        rows.append(numbers)
    return [np.concatenate(rows), np.array([len(numbers) for numbers in rows])] if rows else []


def _ragged(parts: list[np.ndarray]) -> Ragged | None:
    return Ragged(np.concatenate(parts[::2]), _offsets(np.concatenate(parts[1::2]))) if parts else None


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _hashes(texts: Sequence[str]) -> np.ndarray:
    """128-bit hashes (`uint64[n, 2]`) of texts: 16 bytes stand for each, collisions are out of the question."""
    joined = b"".join(xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass")) for text in texts)
    return np.frombuffer(joined, dtype="<u8").reshape(-1, 2)


def distinct(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of each row's text, numbered by first occurrence, and where each text occurs first (ascending)."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    group = np.cumsum(fresh) - 1
    first = order[fresh]  # lexsort is stable, so the first of a group is the earliest
    by_occurrence = np.argsort(first)
    number = np.empty_like(by_occurrence)
    number[by_occurrence] = np.arange(len(first))
    result = np.empty(len(order), dtype=np.int64)
    result[order] = number[group]
    return result, first[by_occurrence]


def text_blocks(blocks: Callable, layout: ColumnLayout, wanted: np.ndarray, *, queries: bool) -> Iterator[Block]:
    """The texts at the occurrences `wanted`, as blocks of a table."""
    start, done = 0, 0
    prefix, id_column = ("q", schema.QUERY_ID) if queries else ("d", schema.DOCUMENT_ID)
    for block in blocks():
        texts, lists = _block_texts(block, layout)
        occurrences = texts if queries else [text for row in lists for text in row]
        end = done + int(np.searchsorted(wanted[done:], start + len(occurrences)))
        chosen = [occurrences[position - start] for position in wanted[done:end].tolist()]
        if chosen:
            ids = [f"{prefix}{number}" for number in range(done, end)]
            yield Block({id_column: ids, schema.TEXT: chosen}, block.where, block.first, block.unit)
        start, done = start + len(occurrences), end


def digest(rows: HashedRows, *arrays: np.ndarray) -> str:
    """32 hexadecimal digits of arrays and of the numbers beside them."""
    content = hashlib.sha256()
    numbers = [part for ragged in (rows.labels, rows.scores) if ragged for part in (ragged.values, ragged.offsets)]
    for array in (*arrays, *numbers):
        content.update(str(array.shape).encode())
        content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()[:32]
