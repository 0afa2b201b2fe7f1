"""Row sets on disk: checks, and the way between string identifiers and positions, a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..console import get_logger
from ..errors import InputError
from ..files import atomic_path, write_json
from . import schema
from .arrow import BLOCK_ROWS
from .lists import list_offsets
from .notes import Notes
from .readers import Block
from .row_columns import standard_rows
from .tables import Corpus, Queries
from .values import find_column, id_array, integer_array


if TYPE_CHECKING:
    from .rows import RowSet

logger = get_logger(__name__)

# Documents in one parquet file; about 100 MB with one column of scores.
_DOCUMENTS_PER_FILE = 10_000_000


def foreign_sides(metadata: Mapping[str, Any], queries: Queries, corpus: Corpus) -> list[str]:
    """Which of `"queries"` and `"corpus"` a row set was not made for, by the fingerprints in its metadata."""
    return [
        name
        for name, table in (("queries", queries), ("corpus", corpus))
        if are_other_texts(metadata, name, metadata.get(f"{name}_fingerprint"), table.fingerprint)
    ]


def are_other_texts(metadata: Mapping[str, Any], side: str, recorded: str | None, found: str) -> bool:
    """Whether texts are other ones than those that a fingerprint was recorded of.

    A row set that is shared with its own texts (`hf_distill.data.sharing`) names the fingerprints under which the same
    texts are known: in the collection that it was made for, and beside the rows.

    Args:
        metadata: The row set's.
        side: `"queries"` or `"corpus"`.
        recorded: The fingerprint that was recorded; None if there is none.
        found: That of the texts at hand.
    """
    same = metadata.get("same_texts", {}).get(side, ())
    return recorded is not None and found != recorded and not {found, recorded} <= set(same)


class RowReader:
    """Turns stored rows into rows of positions, checking each.

    Args:
        queries: The queries that `query_id` must name.
        corpus: The corpus that `document_ids` must name.
        foreign: Which of `"queries"`, `"corpus"` the rows were not made for, by their fingerprint; named when an
            identifier is missing, because that is then the likely reason.
        where: For messages.
    """

    def __init__(self, queries: Queries, corpus: Corpus, *, foreign: Sequence[str], where: str):
        self.queries, self.corpus, self.foreign, self.where = queries, corpus, foreign, where

    def tables(self, blocks: Iterator[Block]) -> Iterator[pa.Table]:
        """Arrow tables of the form in memory; columns that a row set does not have are passed over."""
        for block in blocks:
            if not len(block):
                continue
            yield self._table(block)

    def _table(self, block: Block) -> pa.Table:
        table, identifiers = self.coded(block)
        positions = self.corpus.positions(identifiers)
        if (positions < 0).any():
            raise self.unknown_document(block, table, identifiers, int(np.argmax(positions < 0)))
        codes = table.column(schema.DOCUMENTS).combine_chunks()
        documents = pa.ListArray.from_arrays(codes.offsets, pa.array(positions[codes.values.to_numpy()]))
        return table.set_column(table.column_names.index(schema.DOCUMENTS), schema.DOCUMENTS, documents)

    def coded(self, block: Block) -> tuple[pa.Table, pa.Array]:
        """The rows of a block, checked, with codes for documents, and the identifiers that the codes stand for.

        Looking up is the dearest part of reading; whoever needs only some of the documents looks up those.
        """
        notes = Notes()
        block = standard_rows(block, notes)
        notes.log(self.where)
        if schema.NUM_POSITIVES not in block.columns and block.first == 1:
            logger.warning("%s: no column 'num_positives'; its rows count as unlabelled", self.where)
        stored = id_rows(block)
        query_ids = stored.column(schema.QUERY_ID).combine_chunks()
        query = self.queries.positions(query_ids)
        if (query < 0).any():
            row = int(np.argmax(query < 0))
            name = find_column(block, schema.QUERY_ID_NAMES)
            raise self._unknown(block, row, name, query_ids[row].as_py(), self.queries, "queries")
        lists = stored.column(schema.DOCUMENT_IDS).combine_chunks()
        # Mined candidates repeat within a block: each distinct one is looked up once.
        encoded = lists.flatten().dictionary_encode()
        codes = encoded.indices.cast(pa.int64())
        documents = pa.ListArray.from_arrays(pa.array(list_offsets(lists), pa.int32()), codes)
        table = pa.Table.from_arrays(
            [pa.array(query), documents, *stored.columns[2:]],
            schema=schema.rows_schema(stored.column_names[3:], positions=True),
        )
        return clean_rows(table, block.place), encoded.dictionary

    def unknown_document(self, block: Block, table: pa.Table, identifiers: pa.Array, code: int) -> InputError:
        """The error that a document of a `coded` table is not in the corpus, with the first row that has it."""
        lists = table.column(schema.DOCUMENTS).combine_chunks()
        first = int(np.argmax(lists.flatten().to_numpy() == code))
        row = int(np.searchsorted(list_offsets(lists), first, side="right")) - 1
        return self._unknown(block, row, schema.DOCUMENT_IDS, identifiers[code].as_py(), self.corpus, "corpus")

    def _unknown(self, block: Block, row: int, name: str, identifier: str, table, side: str) -> InputError:
        hint = f", and the rows were made for other {side} (the fingerprints differ)" if side in self.foreign else ""
        return InputError(
            f"{identifier!r} is not among the {len(table)} {table.noun} of {table.where}{hint}",
            where=f"{block.place(row)}, field {name!r}",
            cure="Load the row set with the collection that it was made for",
        )


def id_rows(block: Block) -> pa.Table:
    """The rows of a block in the stored form: strings for identifiers, `num_positives` 0 where it is not given.

    Raises:
        InputError: Missing columns, empty identifiers, values that are no lists.
    """
    query = id_array(block, find_column(block, schema.QUERY_ID_NAMES))
    documents = _list_column(block, find_column(block, (schema.DOCUMENT_IDS,)), pa.string())
    if schema.NUM_POSITIVES in block.columns:
        positives = integer_array(block, schema.NUM_POSITIVES)
    else:
        positives = np.zeros(len(block), dtype=np.int64)
    names = [name for name in block.columns if schema.per_document_type(name) is not None]
    columns = [_list_column(block, name, schema.per_document_type(name)) for name in names]
    return pa.Table.from_arrays(
        [query, documents, pa.array(positives), *columns], schema=schema.rows_schema(names, positions=False)
    )


def clean_rows(table: pa.Table, place: Callable[[int], str]) -> pa.Table:
    """Checks lists against `documents` and returns `table`; `place(row)` names a row in messages.

    Raises:
        InputError: A list of another length, no documents, more positives than documents, a document twice in a row
            (other than as a negative that several sources found), a score that is not finite.
    """
    documents = table.column(schema.DOCUMENTS).combine_chunks()
    offsets = list_offsets(documents)
    lengths = np.diff(offsets)
    if schema.NUM_POSITIVES in table.column_names:
        sources = table.column(schema.SOURCES).combine_chunks() if schema.SOURCES in table.column_names else None
        _check_candidates(documents, lengths, table.column(schema.NUM_POSITIVES).to_numpy(), sources, place)
    for name in table.column_names:
        if schema.per_document_type(name) is None:
            continue
        lists = table.column(name).combine_chunks()
        if lists.null_count:
            row = pc.index(pc.is_null(lists), True).as_py()
            raise InputError("no list", where=f"{place(row)}, field {name!r}", cure=_one_each())
        own = np.diff(list_offsets(lists))
        if (own != lengths).any():
            row = int(np.argmax(own != lengths))
            raise InputError(
                f"{own[row]} entries for {lengths[row]} documents",
                where=f"{place(row)}, field {name!r}",
                cure=_one_each(),
            )
        flat = lists.flatten()
        if schema.is_score_column(name):
            values = flat.to_numpy(zero_copy_only=False)
            finite = np.isfinite(values)
            if not finite.all():
                index = int(np.argmin(finite))
                row = int(np.searchsorted(offsets, index, side="right")) - 1
                raise InputError(
                    f"the score of document {index - int(offsets[row]) + 1} is {values[index]}",
                    where=f"{place(row)}, field {name!r}",
                    cure="Scores must be finite numbers; score the row again or remove it",
                )
        elif flat.null_count:
            index = pc.index(pc.is_null(flat), True).as_py()
            row = int(np.searchsorted(offsets, index, side="right")) - 1
            raise InputError("an entry is missing", where=f"{place(row)}, field {name!r}", cure=_one_each())
    return table


def _check_candidates(
    documents: pa.Array, lengths: np.ndarray, positives: np.ndarray, sources: pa.Array | None, place
) -> None:
    where = f"field {schema.DOCUMENT_IDS!r}"
    if (lengths == 0).any():
        raise InputError(
            "the row has no documents", where=f"{place(int(np.argmax(lengths == 0)))}, {where}", cure="Remove the row"
        )
    wrong = (positives < 0) | (positives > lengths)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(
            f"{positives[row]} positives where the row has {lengths[row]} documents",
            where=f"{place(row)}, field {schema.NUM_POSITIVES!r}",
            cure="It counts the positives at the head of the documents: from 0 to their number",
        )
    owner = np.repeat(np.arange(len(lengths)), lengths)
    flat = documents.flatten().to_numpy(zero_copy_only=False)
    keys = np.sort(owner * (int(flat.max(initial=0)) + 1) + flat)
    if (keys[1:] != keys[:-1]).all():
        return  # what nearly every block is, found in a fraction of the time
    # A negative that several sources found counts once for each of them, as in pools that are put one after another.
    found_by = np.zeros(len(flat), np.int32)
    if sources is not None and len(sources.flatten()) == len(flat):
        found_by = sources.flatten().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    is_positive = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths) < positives[owner]
    order = np.lexsort((found_by, ~is_positive, flat, owner))
    first, second = order[:-1], order[1:]
    same = (owner[first] == owner[second]) & (flat[first] == flat[second])
    same &= is_positive[first] | (found_by[first] == found_by[second])
    if same.any():
        pair = sorted((int(first[np.argmax(same)]), int(second[np.argmax(same)])))
        row = int(owner[pair[0]])
        start = int(np.searchsorted(owner, row))
        raise InputError(
            f"documents {pair[0] - start + 1} and {pair[1] - start + 1} of the row are the same",
            where=f"{place(row)}, {where}",
            cure="List every document once (a negative: once for each source); a positive must not be among them",
        )


def check_rows_folder(folder: Path) -> None:
    """Raises [`InputError`] if a row set would replace something else."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "metadata.json").exists():
        raise InputError(
            "the folder holds something that is no row set", where=str(folder), cure="Name an empty or a new folder"
        )


def write_rows(rows: RowSet, folder: Path) -> Path:
    """See `RowSet.save`."""
    import pyarrow.parquet as pq

    check_rows_folder(folder)
    if not len(rows):
        raise InputError("no rows to save", where=str(folder), cure="A row set needs at least one row")
    stored = schema.rows_schema(rows.columns, positions=False)
    per_file = max(1, int(_DOCUMENTS_PER_FILE // max(1.0, rows.lengths.mean())))
    files = -(-len(rows) // per_file)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for number in range(files):
            part = rows.table.slice(number * per_file, per_file)
            with pq.ParquetWriter(temporary / f"train-{number:05d}-of-{files:05d}.parquet", stored) as writer:
                for start in range(0, part.num_rows, BLOCK_ROWS):
                    writer.write_table(_with_ids(rows, part.slice(start, BLOCK_ROWS), stored))
        write_json(temporary / "metadata.json", {**rows.metadata, "rows": len(rows), "columns": rows.columns})
    return folder


def _with_ids(rows: RowSet, table: pa.Table, stored: pa.Schema) -> pa.Table:
    documents = table.column(schema.DOCUMENTS).combine_chunks()
    ids = rows.corpus.ids.take(documents.flatten().to_numpy(zero_copy_only=False))
    arrays = [
        rows.queries.ids.take(table.column(schema.QUERY).to_numpy()),
        pa.ListArray.from_arrays(pa.array(list_offsets(documents), pa.int32()), ids),
    ]
    return pa.Table.from_arrays([*arrays, *(table.column(name) for name in stored.names[2:])], schema=stored)


def _list_column(block: Block, name: str, kind: pa.DataType) -> pa.Array:
    values = block.columns[name]
    try:
        if isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks()
        if isinstance(values, pa.Array):
            array = values.cast(pa.list_(kind))
        elif any(isinstance(value, str) for value in values):
            raise TypeError("Arrow would take the letters of a string as a list")
        else:
            array = pa.array(values, pa.list_(kind))
    except (pa.ArrowException, TypeError, ValueError):
        array = pa.array([_list(block, name, row, value, kind) for row, value in enumerate(values)], pa.list_(kind))
    if array.null_count:
        row = pc.index(pc.is_null(array), True).as_py()
        raise InputError("no list", where=f"{block.place(row)}, field {name!r}", cure=_one_each())
    if pa.types.is_string(kind) and array.flatten().null_count:
        row = (
            int(
                np.searchsorted(list_offsets(array), pc.index(pc.is_null(array.flatten()), True).as_py(), side="right")
            )
            - 1
        )
        raise InputError("an entry is missing", where=f"{block.place(row)}, field {name!r}", cure=_one_each())
    return array


def _list(block: Block, name: str, row: int, value, kind: pa.DataType):
    value = value.as_py() if isinstance(value, pa.Scalar) else value
    if name == schema.DOCUMENT_IDS and isinstance(value, list):
        value = [str(item) if isinstance(item, int) and not isinstance(item, bool) else item for item in value]
    try:
        if isinstance(value, str):
            raise TypeError("a string")
        return pa.array([value], pa.list_(kind)).to_pylist()[0]
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise InputError(
            f"{str(value)[:80]!r} is not a list of {kind} ({str(error)[:80]})",
            where=f"{block.place(row)}, field {name!r}",
            cure=_one_each(),
        ) from None


def _one_each() -> str:
    return "The list needs one entry for each of the row's documents"
