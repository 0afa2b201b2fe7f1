"""Queries and corpus: identifiers and texts in memory-mapped Arrow, addressed by position."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from ..errors import InputError
from ..files import cache_folder, fingerprint, read_json, write_json
from ..passages import DEFAULT_TEMPLATE, check_template, render_passage
from . import schema
from .arrow import BLOCK_ROWS, ArrowStrings, Column, ContentHash, build_once, open_arrow, write_arrow
from .lookup import DoubledIdError, IdIndex
from .readers import Block
from .values import find_column, id_array, text_array, title_array


# Part of every cache key: raised when the cached form of the same files changes.
CACHE_VERSION = 1


class TextTable:
    """Identifiers and texts by position.

    Args:
        dataset: A `datasets.Dataset` with exactly the columns of the class, strings without nulls.
        where: The file, folder or repository that it came from, for messages.
        rows: Positions in `dataset` that this table shows, in this order; all of them by default.
        folder: The cache folder that holds the identifier index of `dataset`, if there is one.
        content: The fingerprint of `dataset`'s content, if it is known.

    Two tables with the same identifiers and texts in the same order have the same `fingerprint`, whatever files they
    were read from.
    """

    id_column: ClassVar[str]
    arrow_schema: ClassVar[pa.Schema]
    id_names: ClassVar[tuple[str, ...]]
    text_names: ClassVar[tuple[str, ...]]
    noun: ClassVar[str]

    def __init__(
        self,
        dataset: Any,
        *,
        where: str = "memory",
        rows: np.ndarray | None = None,
        folder: Path | None = None,
        content: str | None = None,
    ):
        self._base, self.where, self._rows, self._folder = dataset, where, rows, folder
        self._fingerprint = content if rows is None else None
        self._columns: dict[str, Column] = {}
        self._base_index: IdIndex | None = None
        self._index: IdIndex | None = None

    # -- making one ---------------------------------------------------------------------------------------------

    @classmethod
    def from_records(cls, records: Iterable[dict[str, Any]], *, where: str = "records"):
        """A table in memory from dictionaries such as `{"query_id": "q1", "text": "…"}`; `_id` is read too.

        Raises:
            InputError: Missing, empty or doubled identifiers, wrong types; the message names the rows.
        """
        records = list(records)
        names = dict.fromkeys(name for record in records for name in record)
        tables = [cls.arrow_schema.empty_table()]
        for start in range(0, len(records), BLOCK_ROWS):
            part = records[start : start + BLOCK_ROWS]
            block = Block({name: [record.get(name) for record in part] for name in names}, where, start + 1, "row")
            tables.append(cls.clean(block))
        return cls.from_arrow(pa.concat_tables(tables), where=where)

    @classmethod
    def from_arrow(cls, table: pa.Table, *, where: str = "memory"):
        """A table in memory from clean Arrow columns (strings without nulls, in the order of `arrow_schema`)."""
        import datasets

        made = cls(datasets.Dataset(pa.table(table.cast(cls.arrow_schema))), where=where)
        made._base_index = made._build_index(lambda position: f"{where}, row {position + 1}")
        return made

    @classmethod
    def from_blocks(cls, blocks: Iterable[Block], key: Any, *, where: str, cache_dir: str | Path | None = None):
        """A memory-mapped table that is made once from `blocks` and found again under `key`.

        Args:
            blocks: Blocks of any format; only read when the cache has no table of this key.
            key: JSON-like value that identifies their content, for example the hashes of files.
            where: For messages.
            cache_dir: Instead of the default cache folder.
        """
        folder = cls.cached_folder(key, cache_dir)
        build_once(folder, lambda temporary: cls._write(blocks, temporary, where))
        info = read_json(folder / "info.json")
        return cls(open_arrow(folder / "table.arrow"), where=where, folder=folder, content=info["fingerprint"])

    @classmethod
    def cached_folder(cls, key: Any, cache_dir: str | Path | None = None) -> Path:
        """Where the table of `key` is cached."""
        digits = fingerprint([CACHE_VERSION, cls.noun, key])
        return cache_folder(cache_dir) / "data" / f"{cls.noun}-{digits}"

    @classmethod
    def _write(cls, blocks: Iterable[Block], folder: Path, where: str) -> None:
        content = ContentHash(cls.arrow_schema.names)
        starts: list[int] = []
        origins: list[Block] = []  # without their columns: only what places need
        total, id_name = 0, cls.id_column

        def tables() -> Iterator[pa.Table]:
            nonlocal total, id_name
            for block in blocks:
                table = cls.clean(block)
                content.update(table)
                id_name = find_column(block, cls.id_names) if len(block) else id_name
                starts.append(total)
                origins.append(block.origin())
                total += table.num_rows
                yield table

        write_arrow(folder / "table.arrow", cls.arrow_schema, tables())
        cls._refuse_empty(total, where)

        def place(position: int) -> str:
            owner = int(np.searchsorted(starts, position, side="right")) - 1
            return origins[owner].place(position - starts[owner])

        cls(open_arrow(folder / "table.arrow"), where=where)._build_index(place, id_name).save(folder)
        write_json(folder / "info.json", {"rows": total, "fingerprint": content.hexdigest(), "source": where})

    @classmethod
    def clean(cls, block: Block) -> pa.Table:
        """The rows of a block as checked strings; `InputError` names the row of a value that is wrong."""
        if not len(block):
            return cls.arrow_schema.empty_table()
        columns = [id_array(block, find_column(block, cls.id_names))]
        for name in cls.arrow_schema.names[1:]:
            if name == schema.TITLE:
                columns.append(title_array(block, schema.TITLE))
            else:
                columns.append(text_array(block, find_column(block, cls.text_names)))
        return pa.Table.from_arrays(columns, schema=cls.arrow_schema)

    @classmethod
    def _refuse_empty(cls, rows: int, where: str) -> None:
        if rows == 0:
            raise InputError(f"no {cls.noun} in it", where=where, cure="Put at least one row there")

    def _build_index(self, place: Callable[[int], str], id_name: str | None = None) -> IdIndex:
        """The index of all identifiers; a message calls their column what it is called where they come from."""
        try:
            return IdIndex.build(ArrowStrings(self._column(self.id_column), self._rows))
        except DoubledIdError as error:
            raise InputError(
                f"the identifier {error.identifier!r} is used twice, also in {place(error.first)}",
                where=f"{place(error.second)}, field {id_name or self.id_column!r}",
                cure="Identifiers must be unique; rename or remove one of the two rows",
            ) from None

    # -- reading ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._base) if self._rows is None else len(self._rows)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} rows from {self.where})"

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the files again instead of receiving their content.
        return {**self.__dict__, "_columns": {}, "_index": None, "_base_index": None}

    @property
    def dataset(self) -> Any:
        """The rows as a `datasets.Dataset`."""
        return self._base if self._rows is None else self._base.select(self._rows)

    @property
    def ids(self) -> ArrowStrings:
        """All identifiers, a lazy sequence of strings."""
        return ArrowStrings(self._column(self.id_column), self._rows)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of identifiers and texts, in order."""
        if self._fingerprint is None:
            content = ContentHash(self.arrow_schema.names)
            for table in self.blocks():
                content.update(table)
            self._fingerprint = content.hexdigest()
        return self._fingerprint

    def blocks(self) -> Iterator[pa.Table]:
        """All rows as Arrow tables of bounded size."""
        for start in range(0, len(self), BLOCK_ROWS):
            positions = np.arange(start, min(start + BLOCK_ROWS, len(self)))
            yield pa.Table.from_arrays(
                [self._take(name, positions) for name in self.arrow_schema.names], schema=self.arrow_schema
            )

    def positions(self, ids: Sequence[str] | pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Positions (`int64[n]`) of identifiers, -1 for those that are not here. Integers count as strings."""
        if isinstance(ids, (pa.Array, pa.ChunkedArray)):
            wanted = ids.cast(pa.string()).to_pylist()
        else:
            wanted = [identifier if isinstance(identifier, str) else str(identifier) for identifier in ids]
        if self._index is None:
            self._index = self._load_index()
        return self._index.find(wanted, self.ids)

    def ids_at(self, positions: Sequence[int] | np.ndarray) -> list[str]:
        """Identifiers at `positions`; `IndexError` outside of the table."""
        return self.ids.at(positions)

    def texts(self, positions: Sequence[int] | np.ndarray | None = None, template: str | None = None) -> list[str]:
        """The texts at `positions` (all by default), without any prompt.

        Args:
            positions: `int[n]`.
            template: How title and text become one string; has no meaning for queries.
        """
        return self._take(schema.TEXT, self._all_or(positions)).to_pylist()

    def select(self, positions: Sequence[int] | np.ndarray):
        """The same table with only these rows, in this order; texts stay where they are."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= len(self)):
            raise IndexError(f"position outside of 0..{len(self) - 1}")
        rows = positions if self._rows is None else self._rows[positions]
        return type(self)(self._base, where=self.where, rows=rows)

    def _load_index(self) -> IdIndex:
        if self._rows is not None:
            return self._build_index(lambda position: f"{self.where}, row {position + 1} of the selection")
        if self._base_index is None:
            if self._folder is not None:
                self._base_index = IdIndex.load(self._folder)
            else:
                self._base_index = self._build_index(lambda position: f"{self.where}, row {position + 1}")
        return self._base_index

    def _all_or(self, positions: Sequence[int] | np.ndarray | None) -> np.ndarray:
        return np.arange(len(self)) if positions is None else np.asarray(positions, dtype=np.int64)

    def _column(self, name: str) -> Column:
        if name not in self._columns:
            self._columns[name] = Column(self._base.data.column(name))
        return self._columns[name]

    def _take(self, name: str, positions: np.ndarray) -> pa.Array:
        if self._rows is not None:
            if positions.size and (positions.min() < 0 or positions.max() >= len(self)):
                raise IndexError(f"position outside of 0..{len(self) - 1}")
            positions = self._rows[positions]
        return self._column(name).take(positions)


class Queries(TextTable):
    """Search queries: `query_id`, `text`."""

    id_column = schema.QUERY_ID
    arrow_schema = schema.QUERIES_SCHEMA
    id_names = schema.QUERY_ID_NAMES
    text_names = schema.QUERY_TEXT_NAMES
    noun = "queries"


class Corpus(TextTable):
    """The passages to find: `document_id`, `title`, `text`."""

    id_column = schema.DOCUMENT_ID
    arrow_schema = schema.CORPUS_SCHEMA
    id_names = schema.DOCUMENT_ID_NAMES
    text_names = schema.DOCUMENT_TEXT_NAMES
    noun = "documents"

    def texts(self, positions: Sequence[int] | np.ndarray | None = None, template: str | None = None) -> list[str]:
        """The rendered passages at `positions` (all by default); see `render_passage`."""
        positions = self._all_or(positions)
        template = check_template(template or DEFAULT_TEMPLATE)
        titles = self._take(schema.TITLE, positions).to_pylist()
        texts = self._take(schema.TEXT, positions).to_pylist()
        return [render_passage(title, text, template) for title, text in zip(titles, texts)]
