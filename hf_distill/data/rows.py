"""Row sets: for every query its candidates with positives first, their sources and scores; ids only, no text."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..console import get_logger
from ..errors import InputError
from ..files import cache_folder, fingerprint, read_json, write_json
from . import schema
from .arrow import BLOCK_ROWS, Column, ContentHash, build_once, open_arrow, write_arrow
from .examples import EXAMPLES, examples_of
from .lists import ListView, list_column
from .readers import Block
from .rows_io import clean_rows, foreign_sides, write_rows
from .tables import CACHE_VERSION, Corpus, Queries


if TYPE_CHECKING:
    from .collection import Collection
    from .formats.opening import Source

logger = get_logger(__name__)


class RowSet:
    """Training rows as positions in queries and corpus.

    Args:
        dataset: A `datasets.Dataset` with the columns `query` (int64), `documents` (list of int64, positives first),
            `num_positives` (int64), and any of `sources` (strings), `ranks` (int32), `scores` (float32, the primary
            teacher's), `retriever_scores`, `scores_<teacher>`, `layer_scores_<teacher>`: lists as long as `documents`.
        queries: What `query` points into.
        corpus: What `documents` points into.
        metadata: JSON-like provenance: how the rows were made, `teachers: {column: {...}}`.
        content: The fingerprint of `dataset`'s content, if it is known.
    """

    def __init__(
        self,
        dataset: Any,
        queries: Queries,
        corpus: Corpus,
        metadata: Mapping[str, Any] | None = None,
        *,
        content: str | None = None,
    ):
        if getattr(dataset, "_indices", None) is not None:
            dataset = dataset.flatten_indices()  # a shuffled or selected data set; columns are read directly here
        self.dataset, self.queries, self.corpus = dataset, queries, corpus
        self.metadata = {
            **(metadata or {}),
            "queries_fingerprint": queries.fingerprint,
            "corpus_fingerprint": corpus.fingerprint,
        }
        self._content = content
        self._views: dict[str, ListView] = {}

    # -- making one ---------------------------------------------------------------------------------------------

    @classmethod
    def from_qrels(cls, collection: Collection, split: str, threshold: int = 1) -> RowSet:
        """One row for each query with a relevant document: its relevant documents, the highest grades first."""
        qrels = collection.split(split)
        relevant = np.flatnonzero(qrels.relevance >= threshold)
        if not len(relevant):
            raise InputError(
                f"no document of split {split!r} has grade {threshold} or more",
                where=collection.source,
                cure="Lower the threshold or add judgements",
            )
        order = relevant[np.lexsort((qrels.document[relevant], -qrels.relevance[relevant], qrels.query[relevant]))]
        query, counts = np.unique(qrels.query[order], return_counts=True)
        documents = np.split(qrels.document[order], np.cumsum(counts)[:-1])
        metadata = {"made_by": "qrels", "collection": collection.name, "split": split, "threshold": threshold}
        return cls.from_arrays(collection.queries, collection.corpus, query, documents, counts, metadata=metadata)

    @classmethod
    def from_arrays(
        cls,
        queries: Queries,
        corpus: Corpus,
        query: Sequence[int] | np.ndarray,
        documents: Any,
        num_positives: Sequence[int] | np.ndarray,
        *,
        metadata: Mapping[str, Any] | None = None,
        **columns: Any,
    ) -> RowSet:
        """A row set in memory.

        Args:
            queries: The queries.
            corpus: The corpus.
            query: `int64[n]`.
            documents: `int64[n, m]`, or n arrays of any lengths, or an Arrow list array; positives first.
            num_positives: `int64[n]`; 0 for unlabelled rows.
            metadata: Provenance.
            **columns: Per-document columns in the forms of `documents`, for example `scores=float32[n, m]`.
        """
        names = list(columns)
        row_schema = _schema(names)
        arrays = [
            pa.array(np.asarray(query, dtype=np.int64)),
            list_column(documents, pa.int64(), schema.DOCUMENTS),
            pa.array(np.asarray(num_positives, dtype=np.int64)),
            *(list_column(columns[name], schema.per_document_type(name), name) for name in names),
        ]
        lengths = {name: len(array) for name, array in zip(row_schema.names, arrays)}
        if len(set(lengths.values())) > 1:
            raise InputError(
                f"columns of different lengths: {lengths}", where="rows", cure="Give every row one entry in each"
            )
        table = pa.Table.from_arrays(arrays, schema=row_schema)
        _check_positions(table, queries, corpus)
        _check(table)
        return cls(in_memory(table), queries, corpus, metadata)

    @classmethod
    def from_batches(
        cls,
        queries: Queries,
        corpus: Corpus,
        batches: Iterable[Mapping[str, Any]],
        key: Any,
        *,
        metadata: Mapping[str, Any] | None = None,
        cache_dir: str | os.PathLike | None = None,
    ) -> RowSet:
        """A memory-mapped row set, for rows that should not lie in memory together.

        Args:
            queries: The queries.
            corpus: The corpus.
            batches: Dictionaries with the arguments of `from_arrays` (`query`, `documents`, `num_positives`, …), all
                with the same columns; only read if the cache does not hold the rows of `key` already.
            key: JSON-like value that identifies the rows.
            metadata: Provenance.
            cache_dir: Instead of the default cache folder.
        """

        def tables() -> Iterator[pa.Table]:
            for batch in batches:
                yield cls.from_arrays(queries, corpus, **batch).table

        return cls._cached(tables(), key, queries, corpus, metadata, cache_dir, where="rows")

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        queries: Queries,
        corpus: Corpus,
        *,
        cache_dir: str | os.PathLike | None = None,
    ) -> RowSet:
        """Reads what `save` wrote (or any parquet or JSON lines file of that schema), checking every row.

        A file, or a folder with one file, of a foreign format is read too: Tevatron's JSON lines, lists of negatives,
        triples, runs (docs/formats.md).

        Raises:
            InputError: Unknown or doubled documents, columns of other lengths than `document_ids`, scores that are
                not finite, more positives than documents; the message names file, row and field.
        """
        folder = Path(folder)
        if folder.name in ("", ".."):
            folder = folder.resolve()
        if not folder.exists():
            raise InputError("no such folder", where=str(folder), cure="Name the folder of a saved row set")
        from .collection import open_row_set

        source, name = open_row_set(folder, cache_dir=cache_dir)
        return cls.from_source(source, name, queries, corpus, cache_dir=cache_dir)

    @classmethod
    def from_source(
        cls,
        source: Source,
        config: str,
        queries: Queries,
        corpus: Corpus,
        *,
        cache_dir: str | os.PathLike | None = None,
    ) -> RowSet:
        """Reads the config `config` of an opened folder or repository; see `load`."""
        from .rows_io import RowReader

        metadata = source.metadata(config)
        splits = source.splits(config)

        def blocks() -> Iterator[Block]:
            for split in splits:
                yield from source.blocks(config, split)

        foreign = foreign_sides(metadata, queries, corpus)
        reader = RowReader(queries, corpus, foreign=foreign, where=source.place(config))
        key = [source.key(config, split) for split in splits]
        rows = cls._cached(reader.tables(blocks()), key, queries, corpus, metadata, cache_dir, source.place(config))
        if foreign:
            logger.warning(
                "%s: made for other %s than those of %s (the fingerprints differ), but every identifier is known",
                source.place(config),
                " and ".join(foreign),
                corpus.where,
            )
        return rows

    @classmethod
    def _cached(cls, tables, key, queries, corpus, metadata, cache_dir, where: str) -> RowSet:
        digits = fingerprint([CACHE_VERSION, key, queries.fingerprint, corpus.fingerprint])
        folder = cache_folder(cache_dir) / "rows" / digits

        def build(temporary: Path) -> None:
            first = next(tables, None)
            if first is None:
                raise InputError("no rows in it", where=where, cure="A row set needs at least one row")
            content = ContentHash(first.schema.names)

            def hashed() -> Iterator[pa.Table]:
                for table in chain([first], tables):
                    if table.schema != first.schema:
                        raise InputError(
                            f"the columns {', '.join(table.column_names)} where the first rows have "
                            f"{', '.join(first.column_names)}",
                            where=where,
                            cure="All rows of a set need the same columns",
                        )
                    content.update(table)
                    yield table

            rows = write_arrow(temporary / "rows.arrow", first.schema, hashed())
            write_json(temporary / "info.json", {"rows": rows, "fingerprint": content.hexdigest()})

        build_once(folder, build)
        info = read_json(folder / "info.json")
        return cls(open_arrow(folder / "rows.arrow"), queries, corpus, metadata, content=info["fingerprint"])

    # -- reading ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.dataset)

    def __repr__(self) -> str:
        return f"RowSet({len(self)} rows, columns {', '.join(self.columns) or 'none'})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": {}}

    @property
    def table(self) -> pa.Table:
        """All rows as one Arrow table, memory-mapped where the row set is."""
        return self.dataset.data.table

    @property
    def columns(self) -> list[str]:
        """Names of the per-document columns besides `documents`."""
        return [name for name in self.table.column_names if schema.per_document_type(name) is not None]

    @property
    def score_columns(self) -> list[str]:
        """Names of the columns with one score for each document."""
        return [name for name in self.columns if schema.is_score_column(name)]

    @property
    def query(self) -> np.ndarray:
        """Positions (`int64[n]`) of the rows' queries."""
        return self.table.column(schema.QUERY).to_numpy()

    @property
    def num_positives(self) -> np.ndarray:
        """Number (`int64[n]`) of positives at the head of each row's documents."""
        return self.table.column(schema.NUM_POSITIVES).to_numpy()

    @property
    def has_positives(self) -> bool:
        """Whether any row has a positive."""
        return bool(self.num_positives.any())

    @property
    def lengths(self) -> np.ndarray:
        """Number (`int64[n]`) of documents in each row."""
        return self._view(schema.DOCUMENTS).lengths

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the rows and of the texts that they point to."""
        if self._content is None:
            content = ContentHash(self.table.column_names)
            content.update(self.table)
            self._content = content.hexdigest()
        return fingerprint([self._content, self.queries.fingerprint, self.corpus.fingerprint])

    def documents_at(self, row: int) -> np.ndarray:
        """Positions (`int64[m]`) of the documents of `row`, positives first; a view, not a copy."""
        return self.values_at(schema.DOCUMENTS, row)

    def values_at(self, name: str, row: int) -> np.ndarray:
        """The entries of column `name` in `row`: numbers as a view, `sources` as an array of strings."""
        return self._view(name)[row]

    def blocks(self, rows: int = BLOCK_ROWS) -> Iterator[pa.Table]:
        """All rows as Arrow tables of at most `rows` rows."""
        for start in range(0, len(self), rows):
            yield self.table.slice(start, rows)

    def _view(self, name: str) -> ListView:
        if name not in self._views:
            if name not in self.table.column_names:
                raise InputError(
                    f"no column {name!r}",
                    where="row set",
                    cure=f"Its columns are: {', '.join(self.columns) or 'none'}",
                )
            self._views[name] = ListView(self.table.column(name))
        return self._views[name]

    # -- changing and keeping -----------------------------------------------------------------------------------

    def with_column(self, name: str, values: Any, **provenance: Any) -> RowSet:
        """The same rows with one more per-document column (or with that column replaced).

        Args:
            name: `scores`, `retriever_scores`, `scores_<teacher>`, `sources`, `ranks`, …
            values: One entry for each document: all in a row as an array of `lengths.sum()` entries, or one array for
                each row, or an Arrow list array.
            **provenance: Put into `metadata["teachers"][name]`, for example `model=…, revision=…`. With it, a few of
                the scores are noted as well, by which [`moved_example`] sees that they belong to these documents.
        """
        kind = schema.per_document_type(name)
        if kind is None:
            raise _unknown_column(name)
        column = list_column(values, kind, name, self.lengths)
        if len(column) != len(self):
            raise InputError(
                f"{len(column)} rows where the set has {len(self)}",
                where=f"column {name!r}",
                cure="Give every row one list",
            )
        _check(pa.table({schema.DOCUMENTS: self.table.column(schema.DOCUMENTS), name: column}))
        import datasets

        base = self.dataset.remove_columns([name]) if name in self.columns else self.dataset
        # Beside the memory-mapped columns, so that only the new one lies in memory.
        dataset = datasets.concatenate_datasets([base, in_memory(pa.table({name: column}))], axis=1)
        metadata = dict(self.metadata)
        for about in ("teachers", EXAMPLES):
            # What is known of the column that is replaced.
            if name in metadata.get(about, {}):
                metadata[about] = {key: value for key, value in metadata[about].items() if key != name}
        rows = RowSet(dataset, self.queries, self.corpus, metadata)
        if provenance:
            rows.metadata["teachers"] = {**metadata.get("teachers", {}), name: provenance}
            if schema.is_score_column(name) or schema.is_layer_column(name):
                rows.metadata[EXAMPLES] = {**metadata.get(EXAMPLES, {}), name: examples_of(rows, name)}
        return rows

    def select(self, indices: Sequence[int] | np.ndarray) -> RowSet:
        """Only these rows, in this order, in memory."""
        indices = np.asarray(indices, dtype=np.int64)
        arrays = [Column(self.table.column(name)).take(indices) for name in self.table.column_names]
        table = pa.Table.from_arrays(
            arrays, schema=pa.schema([self.table.schema.field(i) for i in range(len(arrays))])
        )
        return RowSet(in_memory(table), self.queries, self.corpus, self.metadata)

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes the stored form: parquet files with string identifiers, and `metadata.json`.

        An earlier row set in `folder` is replaced, once the new one is complete; another kind of folder is refused.
        """
        return write_rows(self, Path(folder))


def _check(table: pa.Table) -> None:
    for start in range(0, table.num_rows, BLOCK_ROWS):
        clean_rows(table.slice(start, BLOCK_ROWS), lambda row, start=start: f"row {start + row} (from 0)")


def _schema(names: Sequence[str]) -> pa.Schema:
    for name in names:
        if schema.per_document_type(name) is None:
            raise _unknown_column(name)
    return schema.rows_schema(list(names), positions=True)


def _unknown_column(name: str) -> InputError:
    return InputError(
        f"a row set has no column {name!r}",
        where="row set",
        cure="Use sources, ranks, scores, retriever_scores, scores_<teacher> or layer_scores_<teacher>",
    )


def in_memory(table: pa.Table) -> Any:
    """A `datasets.Dataset` of a table in memory."""
    import datasets

    plain = datasets.table.InMemoryTable(table.replace_schema_metadata(None))
    # Without a fingerprint given, `datasets` would hash the whole table for one.
    return datasets.Dataset(plain, fingerprint=uuid.uuid4().hex[:16])


def _check_positions(table: pa.Table, queries: Queries, corpus: Corpus) -> None:
    for name, size in ((schema.QUERY, len(queries)), (schema.DOCUMENTS, len(corpus))):
        for chunk in table.column(name).chunks:
            values = (chunk.flatten() if name == schema.DOCUMENTS else chunk).to_numpy(zero_copy_only=False)
            if len(values) and (values.min() < 0 or values.max() >= size):
                raise IndexError(f"column {name!r}: positions {values.min()}..{values.max()} outside of 0..{size - 1}")
