"""Files of foreign formats, seen as the configs `corpus`, `queries`, `qrels` and row sets."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ...errors import InputError
from .. import schema
from ..arrow import BLOCK_ROWS
from ..notes import Notes
from ..readers import Block
from ..row_columns import plain
from ..sources import content_hash
from ..tables import Queries
from ..values import find_column, id_array, integer_array
from .seen import Seen, hashes_of


if TYPE_CHECKING:
    from .scores import ScoreTable

# Raised when the same files are read differently than before.
FORMAT_VERSION = 1

_SPLIT = re.compile(r"(?<![a-z])(train|dev|test|eval|validation|valid)(?![a-z])")

Reader = Callable[["FormatSource", "Input", Notes], Iterator[Block]]


@dataclass(frozen=True)
class Kind:
    """A format of one file.

    Attributes:
        main: The config that such files are for; they are then the only ones that it is read from.
        readers: By config, how to read it from such a file.
        unique: Whether an identifier that occurs again in such a file is an error; else the first one counts.
    """

    main: str | None
    readers: dict[str, Reader]
    unique: bool = False


@dataclass(frozen=True)
class Input:
    """One file.

    Attributes:
        path: The file.
        kind: What it is, a name in `KINDS`.
        name: The split of its judgements, and the name of its row set.
        columns: Its columns in order, where neither a header nor their number tells.
        repository: The Hub repository that it is from, and the commit.
    """

    path: Path
    kind: str
    name: str
    columns: tuple[str, ...] | None = None
    repository: tuple[str, str | None] | None = None


def split_of(item: Input) -> str:
    """The split that the judgements of a file belong to; those of rows go by a word such as dev in its name."""
    if item.kind == schema.QRELS:
        return item.name
    found = _SPLIT.search(item.name.lower())
    return found.group(1) if found else "train"


@dataclass
class FormatSource:
    """Several files as one collection.

    Judgements are taken from the positives of rows only where there is no file of judgements, texts of passages from
    training rows only where there is no file of passages, and so on.

    Args:
        inputs: The files.
        name: The collection's name.
        where: For messages.
        revision: The commit on the Hub.
        cache_dir: Where titles, scores and rows that have to be put in order are kept.
        allow_pickle: Whether pickles may be read (by the restricted reader of `pickles`).
    """

    inputs: Sequence[Input]
    name: str
    where: str
    revision: str | None = None
    cache_dir: str | os.PathLike | None = None
    allow_pickle: bool = False
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        from .kinds import KINDS

        self.kinds = KINDS

    # -- the configs, as of a folder of our own layout ------------------------------------------------------------

    def configs(self) -> list[str]:
        """The configs that the files have something for."""
        found = [config for config in (schema.CORPUS, schema.QUERIES, schema.QRELS) if self._of(config)]
        return found + self.row_sets()

    def row_sets(self) -> list[str]:
        """The names of the row sets."""
        return list(dict.fromkeys(item.name for item in self._of("rows")))

    def splits(self, config: str) -> list[str]:
        """The splits of a config; only judgements have several."""
        if config == schema.QRELS:
            return list(dict.fromkeys(split_of(item) for item in self._of(config)))
        return [config]

    def place(self, config: str, split: str | None = None) -> str:
        """The file, or what all files have in common."""
        files = [str(item.path) for item in self._chosen(config, split)]
        return files[0] if len(files) == 1 else os.path.commonpath(files)

    def key(self, config: str, split: str) -> Any:
        """Identifies the content of all files that decide about a config."""
        parts = [*self._chosen(config, split), *self._of("titles"), *self._of("scores")]
        if config not in (schema.CORPUS, schema.QUERIES, schema.QRELS):
            parts += self._of(schema.QRELS)
        return [FORMAT_VERSION, [self._input_key(item) for item in parts]]

    def columns(self, config: str) -> list[str]:
        """The columns of a config."""
        first = next(self._blocks(config, self.splits(config)[0], Notes()), None)
        return [] if first is None else list(first.columns)

    def metadata(self, config: str) -> dict[str, Any]:
        """Where a row set comes from."""
        return {"made_by": "formats", "source": self.place(config)}

    def looked_for(self) -> str:
        """What is there, for messages."""
        return "found: " + ", ".join(f"{item.path.name} ({item.kind})" for item in self.inputs)

    def blocks(self, config: str, split: str, notes: Notes | None = None) -> Iterator[Block]:
        """The rows of a config in the contract's columns.

        What is passed over goes to `notes`, or is logged at the end where there are none.
        """
        own = Notes() if notes is None else notes
        yield from self._blocks(config, split, own)
        if notes is None:
            own.log(self.place(config, split))

    def files(self, config: str) -> list[Any]:
        """Rows of other formats have to be put together first, so there are no files to stream."""
        raise InputError(
            "rows of this format cannot be streamed",
            where=self.place(config),
            cure="Turn it into a folder that can, once: hf-distill convert --input ... --output_dir ...",
        )

    # -- what readers ask for -------------------------------------------------------------------------------------

    def positives(self) -> Positives:
        """The judged positives of all splits; empty where there is no file of judgements."""
        if "positives" not in self._kept:
            blocks = (
                block
                for item in self._of(schema.QRELS, main=True)
                for block in self.kinds[item.kind].readers[schema.QRELS](self, item, Notes())
            )
            self._kept["positives"] = Positives.read(blocks)
        return self._kept["positives"]

    def titles(self, ids: Any) -> list[str] | None:
        """The titles of documents, `""` where one has none; None where there is no file of titles."""
        inputs = self._of("titles")
        if not inputs:
            return None
        if "titles" not in self._kept:
            blocks = (b for item in inputs for b in self.kinds[item.kind].readers["titles"](self, item, Notes()))
            key = ["titles", [self._input_key(item) for item in inputs]]
            self._kept["titles"] = Queries.from_blocks(
                blocks, key, where=str(inputs[0].path), cache_dir=self.cache_dir
            )
        table = self._kept["titles"]
        positions = table.positions(ids)
        titles = np.full(len(positions), "", dtype=object)
        titles[positions >= 0] = table.texts(positions[positions >= 0])
        return titles.tolist()

    def scores(self) -> ScoreTable | None:
        """The scores of query and document that lie beside the rows, if there are any."""
        inputs = self._of("scores")
        if inputs and "scores" not in self._kept:
            from .scores import ScoreTable

            key = [FORMAT_VERSION, "scores", [self._input_key(item) for item in inputs]]
            self._kept["scores"] = ScoreTable.build(self, inputs, key, self.cache_dir)
        return self._kept.get("scores")

    def grouping_key(self, item: Input) -> Any:
        """Identifies a file whose lines are to be grouped."""
        return [FORMAT_VERSION, self._input_key(item)]

    # -- inside ---------------------------------------------------------------------------------------------------

    def _of(self, role: str, *, main: bool = False) -> list[Input]:
        """The files that a config (or `"rows"`, `"titles"`, `"scores"`) is read from."""
        having = [item for item in self.inputs if role in self.kinds[item.kind].readers]
        if role in ("rows", "scores"):
            # Scores beside rows belong to these rows; alone they are rows themselves.
            rows = [item for item in self.inputs if "rows" in self.kinds[item.kind].readers]
            own = [item for item in rows if "scores" not in self.kinds[item.kind].readers]
            return having if role == "scores" and own else [] if role == "scores" else own or rows
        dedicated = [item for item in having if self.kinds[item.kind].main == role]
        return dedicated if dedicated or main else having

    def _chosen(self, config: str, split: str | None) -> list[Input]:
        if config == schema.QRELS:
            return [item for item in self._of(config) if split in (None, split_of(item))]
        if config in (schema.CORPUS, schema.QUERIES):
            return self._of(config)
        return [item for item in self._of("rows") if item.name == config]

    def _blocks(self, config: str, split: str, notes: Notes) -> Iterator[Block]:
        role = config if config in (schema.CORPUS, schema.QUERIES, schema.QRELS) else "rows"
        inputs = self._chosen(config, split)
        blocks = (block for item in inputs for block in self.kinds[item.kind].readers[role](self, item, notes))
        if role in (schema.CORPUS, schema.QUERIES):
            if all(self.kinds[item.kind].unique for item in inputs):
                return blocks
            names = schema.DOCUMENT_ID_NAMES if role == schema.CORPUS else schema.QUERY_ID_NAMES
            return _first_ones(blocks, names, "documents" if role == schema.CORPUS else "queries", notes)
        table = self.scores() if role == "rows" else None
        return blocks if table is None else table.join(blocks, notes)

    def _input_key(self, item: Input) -> Any:
        return [item.kind, item.name, item.columns, content_hash(item.path, self.cache_dir)]


class Positives:
    """The positives of every query, found by hash: 8 bytes and the identifier for each.

    Args:
        hashes: `uint64[n]`, ascending: of queries.
        documents: `n` identifiers, those of a query in the order of the file.
    """

    def __init__(self, hashes: np.ndarray, documents: pa.Array):
        self.hashes, self.documents = hashes, documents

    @classmethod
    def read(cls, blocks: Iterator[Block]) -> Positives:
        """The judgements of grade 1 and more."""
        hashes, documents = [np.empty(0, np.uint64)], [pa.array([], pa.string())]
        for block in blocks:
            relevant = np.flatnonzero(integer_array(block, find_column(block, schema.RELEVANCE_NAMES)) >= 1)
            queries = id_array(block, find_column(block, schema.QRELS_QUERY_NAMES)).take(relevant)
            hashes.append(hashes_of(queries))
            documents.append(id_array(block, find_column(block, schema.QRELS_DOCUMENT_NAMES)).take(relevant))
        joined = np.concatenate(hashes)
        order = np.argsort(joined, kind="stable")
        return cls(joined[order], pa.concat_arrays(documents).take(order))

    def __len__(self) -> int:
        return len(self.hashes)

    def of(self, queries: Sequence[str]) -> list[list[str]]:
        """The positives of each query."""
        hashes = hashes_of(queries)
        starts, ends = (np.searchsorted(self.hashes, hashes, side=side).tolist() for side in ("left", "right"))
        return [
            list(dict.fromkeys(self.documents.slice(start, end - start).to_pylist()))
            for start, end in zip(starts, ends)
        ]


def _first_ones(blocks: Iterator[Block], id_names: Sequence[str], noun: str, notes: Notes) -> Iterator[Block]:
    """Only the rows whose identifier has not come before."""
    seen = Seen()
    for block in blocks:
        ids = id_array(block, find_column(block, id_names))
        others = [plain(values) for name, values in block.columns.items() if name not in id_names]
        contents = hashes_of(["\0".join(str(value) for value in row) for row in zip(*others)])
        fresh, same = seen.add(hashes_of(ids), contents)
        if not same.all():
            place = block.place(int(np.argmin(same)))
            notes.add(f"{noun} are given again with another text; the first one counts", int((~same).sum()), place)
        kept = np.flatnonzero(fresh)
        for start in range(0, len(kept), BLOCK_ROWS):
            yield _rows_of(block, kept[start : start + BLOCK_ROWS])


def _rows_of(block: Block, rows: np.ndarray) -> Block:
    columns = {}
    for name, values in block.columns.items():
        columns[name] = values.take(rows) if hasattr(values, "take") else [values[row] for row in rows.tolist()]
    numbers = [block.first + row if block.lines is None else int(block.lines[row]) for row in rows.tolist()]
    return Block(columns, block.where, numbers[0], block.unit, numbers)
