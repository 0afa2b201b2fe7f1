"""Checks on the way into files: identifiers that come twice or point nowhere, lists that do not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from ...errors import InputError
from .. import schema
from ..notes import Notes
from ..readers import Block
from ..rows_io import clean_rows, id_rows
from ..tables import Corpus, Queries
from ..values import find_column, id_array, integer_array
from .seen import Seen, hashes_of


NOUNS = {schema.QUERIES: "queries", schema.CORPUS: "documents"}


class Cleaner:
    """Blocks as checked tables of the stored schema.

    Args:
        role: `corpus`, `queries`, `qrels` or `rows`.
        blocks: Reads the blocks from the start; what is passed over goes to the notes.
        notes: Takes what is passed over here.
        known: The identifiers of corpus and queries, by role; those of this part are added.
        drop: Whether unknown identifiers are left out instead of being an error.
    """

    def __init__(
        self,
        role: str,
        blocks: Callable[[Notes], Iterator[Block]],
        notes: Notes,
        known: dict[str, Seen],
        *,
        drop: bool,
    ):
        self.role, self.blocks, self.notes, self.known, self.drop = role, blocks, notes, known, drop
        self.where = ""
        self.columns: list[str] = []

    def tables(self) -> Iterator[pa.Table]:
        """The tables; none is empty."""
        make = {
            schema.CORPUS: self._texts,
            schema.QUERIES: self._texts,
            schema.QRELS: self._judgements,
            "rows": self._rows,
        }[self.role]
        for block in self.blocks(self.notes):
            self.where = self.where or block.where
            if len(block):
                table = make(block)
                if self.columns and table.column_names != self.columns:
                    raise InputError(
                        f"the columns {', '.join(table.column_names)} where the first rows have "
                        f"{', '.join(self.columns)}",
                        where=block.place(0),
                        cure="All rows of a set need the same columns",
                    )
                self.columns = table.column_names
                if table.num_rows:
                    yield table

    def _texts(self, block: Block) -> pa.Table:
        kind = Corpus if self.role == schema.CORPUS else Queries
        table = kind.clean(block)
        fresh, _ = self.known.setdefault(self.role, Seen()).add(hashes_of(table.column(0)))
        if not fresh.all():
            row = int(np.argmin(fresh))
            identifier = table.column(0)[row].as_py()
            raise InputError(
                f"the identifier {identifier!r} is used twice, also in {self._first_place(identifier, kind)}",
                where=f"{block.place(row)}, field {kind.id_column!r}",
                cure="Identifiers must be unique; rename or remove one of the two rows",
            )
        return table

    def _first_place(self, identifier: str, kind: type[Corpus] | type[Queries]) -> str:
        for block in self.blocks(Notes()):
            if len(block):
                ids = id_array(block, find_column(block, kind.id_names)).to_pylist()
                if identifier in ids:
                    return block.place(ids.index(identifier))
        raise AssertionError("unreachable: the identifier was read before")

    def _judgements(self, block: Block) -> pa.Table:
        sides = [
            (schema.QUERIES, id_array(block, find_column(block, schema.QRELS_QUERY_NAMES)), schema.QUERY_ID),
            (schema.CORPUS, id_array(block, find_column(block, schema.QRELS_DOCUMENT_NAMES)), schema.DOCUMENT_ID),
        ]
        grades = pa.array(integer_array(block, find_column(block, schema.RELEVANCE_NAMES)))
        keep = np.ones(len(block), dtype=bool)
        for role, ids, column in sides:
            found = self._known(role, ids)
            self._unknown(role, ~found & keep, ids, block, column, block.place)
            keep &= found
        table = pa.Table.from_arrays([sides[0][1], sides[1][1], grades], schema=schema.QRELS_SCHEMA)
        return table if keep.all() else table.filter(pa.array(keep))

    def _rows(self, block: Block) -> pa.Table:
        table = id_rows(block)
        queries, documents = table.column(0).combine_chunks(), table.column(1).combine_chunks()
        flat = documents.flatten()
        owner = np.repeat(np.arange(len(documents)), np.asarray(documents.value_lengths()))
        good = self._known(schema.QUERIES, queries)
        self._unknown(schema.QUERIES, ~good, queries, block, schema.QUERY_ID, block.place)
        found = self._known(schema.CORPUS, flat)
        if not found.all():
            place = lambda index: block.place(int(owner[index]))  # noqa: E731
            self._unknown(schema.CORPUS, ~found & good[owner], flat, block, schema.DOCUMENT_IDS, place)
            table = _without(table, found, owner)
            good &= np.asarray(table.column(1).combine_chunks().value_lengths()) > 0
        table = table if good.all() else table.filter(pa.array(good))
        numbers = np.flatnonzero(good).tolist()
        clean_rows(_coded(table), lambda row: block.place(numbers[row]))
        return table

    def _known(self, role: str, ids: pa.Array) -> np.ndarray:
        if role not in self.known:
            return np.ones(len(ids), dtype=bool)
        # Candidates repeat within a block: each distinct one is looked up once.
        encoded = ids.dictionary_encode()
        return self.known[role].holds(hashes_of(encoded.dictionary))[encoded.indices.to_numpy()]

    def _unknown(self, role: str, missing: np.ndarray, ids: pa.Array, block: Block, column: str, place) -> None:
        if not missing.any():
            return
        index, noun = int(np.argmax(missing)), NOUNS[role]
        if not self.drop:
            raise InputError(
                f"{ids[index].as_py()!r} is not among the {len(self.known[role])} {noun}",
                where=f"{place(index)}, field {column!r}",
                cure="Add it there or remove the line; --unknown_ids drop passes over such identifiers",
            )
        what = "entries" if column == schema.DOCUMENT_IDS else "rows"
        self.notes.add(f"{what} name unknown {noun} and were left out", int(missing.sum()), place(index))


def _without(table: pa.Table, keep: np.ndarray, owner: np.ndarray) -> pa.Table:
    """Rows with only the documents that are kept, and the number of positives among them."""
    rows = table.num_rows
    lengths = np.bincount(owner[keep], minlength=rows)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    starts = np.searchsorted(owner, np.arange(rows))
    is_positive = np.arange(len(owner)) - starts[owner] < table.column(schema.NUM_POSITIVES).to_numpy()[owner]
    columns = []
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if name == schema.NUM_POSITIVES:
            column = pa.array(np.bincount(owner[keep & is_positive], minlength=rows).astype(np.int64))
        elif pa.types.is_list(column.type):
            column = pa.ListArray.from_arrays(offsets, column.flatten().filter(pa.array(keep)))
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=table.schema)


def _coded(table: pa.Table) -> pa.Table:
    """The rows with numbers for documents, which is what `clean_rows` compares."""
    documents = table.column(schema.DOCUMENT_IDS).combine_chunks()
    codes = documents.flatten().dictionary_encode().indices.cast(pa.int64())
    offsets = np.concatenate([[0], np.cumsum(np.asarray(documents.value_lengths()))]).astype(np.int32)
    coded = pa.ListArray.from_arrays(pa.array(offsets), codes)
    return table.append_column(schema.DOCUMENTS, coded)
