"""Scores of queries and documents out of pickles, kept on disk and joined with rows."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ...errors import InputError
from ...files import cache_folder, fingerprint, write_json
from .. import schema
from ..arrow import ArrowStrings, Column, build_once, open_arrow, write_arrow
from ..lookup import DoubledIdError, IdIndex
from ..notes import Notes
from ..readers import Block
from ..row_columns import plain, pool_rows
from ..values import find_column
from .pickles import CURE, read_pickled_items


if TYPE_CHECKING:
    from .source import FormatSource, Input

# Queries put into one record batch; a query has about 200 scores.
_QUERIES_AT_ONCE = 512

_SCHEMA = pa.schema(
    [
        (schema.QUERY_ID, pa.string()),
        (schema.DOCUMENT_IDS, pa.list_(pa.string())),
        (schema.SCORES, pa.list_(pa.float32())),
    ]
)


def pickled(source: FormatSource, item: Input) -> Iterator[tuple[Any, Any]]:
    """The entries of a pickle, where pickles are allowed."""
    if not source.allow_pickle:
        raise InputError("a pickle, which is not read here", where=str(item.path), cure=CURE)
    return read_pickled_items(item.path)


class ScoreTable:
    """The scores of every query, memory-mapped and found by its identifier.

    Args:
        folder: Where `build` put them.
        where: For messages.
    """

    def __init__(self, folder: Path, where: str):
        self.where = where
        table = open_arrow(folder / "scores.arrow").data
        self._queries, self._documents, self._scores = (Column(table.column(name)) for name in _SCHEMA.names)
        self._ids = ArrowStrings(self._queries)
        self._index = IdIndex.load(folder)

    @classmethod
    def build(
        cls, source: FormatSource, inputs: Sequence[Input], key: Any, cache_dir: str | os.PathLike | None
    ) -> ScoreTable:
        """Reads pickles of `{query: {document: score}}` once; later calls find the table again under `key`."""
        folder = cache_folder(cache_dir) / "data" / f"scores-{fingerprint(key)}"
        where = ", ".join(str(item.path) for item in inputs)

        def make(temporary: Path) -> None:
            entries = (
                _entry(query, scores, str(item.path)) for item in inputs for query, scores in pickled(source, item)
            )
            rows = write_arrow(temporary / "scores.arrow", _SCHEMA, _tables(entries))
            if not rows:
                raise InputError("no scores in it", where=where, cure="Check the file")
            ids = ArrowStrings(Column(open_arrow(temporary / "scores.arrow").data.column(schema.QUERY_ID)))
            try:
                IdIndex.build(ids).save(temporary)
            except DoubledIdError as error:
                raise InputError(
                    f"query {error.identifier!r} has scores twice", where=where, cure="Keep one of the two"
                ) from None
            write_json(temporary / "info.json", {"queries": rows, "source": where})

        build_once(folder, make)
        return cls(folder, where)

    def join(self, blocks: Iterator[Block], notes: Notes) -> Iterator[Block]:
        """Rows with a score for every document; documents without one are left out and counted."""
        for block in blocks:
            if not len(block):
                continue
            lists = [name for name in block.columns if name == schema.DOCUMENT_IDS or schema.per_document_type(name)]
            columns = {name: plain(values) for name, values in block.columns.items()}
            queries = [str(query) for query in columns[find_column(block, schema.QUERY_ID_NAMES)]]
            made: dict[str, list[Any]] = {name: [] for name in (*columns, schema.SCORES)}
            numbers = []
            for row, scores in enumerate(self.of(queries)):
                documents = columns[schema.DOCUMENT_IDS][row]
                kept = [index for index, document in enumerate(documents) if document in scores]
                if len(kept) < len(documents):
                    missing = len(documents) - len(kept)
                    notes.add("documents have no score and were left out", missing, block.place(row))
                if not kept:
                    notes.add("rows have no document with a score and were left out", 1, block.place(row))
                    continue
                numbers.append(block.first + row if block.lines is None else int(block.lines[row]))
                for name, values in columns.items():
                    value = values[row]
                    made[name].append([value[index] for index in kept] if name in lists else value)
                made[schema.NUM_POSITIVES][-1] = sum(index < columns[schema.NUM_POSITIVES][row] for index in kept)
                made[schema.SCORES].append([scores[documents[index]] for index in kept])
            if numbers:
                yield Block(made, block.where, numbers[0], block.unit, numbers)

    def of(self, queries: Sequence[str]) -> Iterator[dict[str, float]]:
        """The scores of each query by document; empty for a query that has none."""
        for position in self._index.find(queries, self._ids).tolist():
            if position < 0:
                yield {}
            else:
                documents, scores = (column.take([position])[0].as_py() for column in (self._documents, self._scores))
                yield dict(zip(documents, scores))


def read_scores_rows(source: FormatSource, item: Input, notes: Notes) -> Iterator[Block]:
    """Pickled scores as rows: those judged positive first, then the others in the order of the file."""
    for part, block in _pickled_blocks(source, item):
        entries = [_entry(query, value, str(item.path)) for query, value in part]
        queries = [entry[0] for entry in entries]
        positives = source.positives().of(queries)
        found = [[p for p in relevant if p in set(entry[1])] for relevant, entry in zip(positives, entries)]
        pools = [[(item.name, documents, {schema.SCORES: scores})] for _, documents, scores in entries]
        yield pool_rows(block, queries, found, pools, notes, among=True)


def read_pickled_rows(source: FormatSource, item: Input, notes: Notes) -> Iterator[Block]:
    """Pickled lists of negatives by query; positives come from the judgements."""
    for part, block in _pickled_blocks(source, item):
        for query, ids in part:
            if not isinstance(ids, list) or not all(type(one) in (str, int) for one in ids):
                raise InputError(
                    f"{str(ids)[:80]} where a list of identifiers is expected",
                    where=f"{item.path}, query {query!r}",
                    cure="The pickle should map queries to lists",
                )
        queries = [str(query) for query, _ in part]
        pools = [[(item.name, [str(one) for one in ids], {})] for _, ids in part]
        yield pool_rows(block, queries, source.positives().of(queries), pools, notes)


def _pickled_blocks(source: FormatSource, item: Input) -> Iterator[tuple[list[tuple[Any, Any]], Block]]:
    entries, first = pickled(source, item), 1
    while part := list(islice(entries, _QUERIES_AT_ONCE)):
        yield part, Block({}, str(item.path), first, "row")
        first += len(part)


def _entry(query: Any, scores: Any, where: str) -> tuple[str, list[str], list[float]]:
    place = f"{where}, query {query!r}"
    if not isinstance(scores, dict):
        raise InputError(
            f"{str(scores)[:80]} where scores by document are expected",
            where=place,
            cure="The pickle should map queries to dictionaries of document and score",
        )
    for document, score in scores.items():
        if type(score) not in (int, float) or not math.isfinite(score):
            raise InputError(
                f"the score of document {document!r} is {score!r}", where=place, cure="Scores must be finite numbers"
            )
    return str(query), [str(document) for document in scores], list(map(float, scores.values()))


def _tables(entries: Iterator[tuple[str, list[str], list[float]]]) -> Iterator[pa.Table]:
    while part := list(islice(entries, _QUERIES_AT_ONCE)):
        yield pa.Table.from_arrays([pa.array(values, kind) for values, kind in zip(zip(*part), _SCHEMA.types)],
                                   schema=_SCHEMA)  # fmt: skip
