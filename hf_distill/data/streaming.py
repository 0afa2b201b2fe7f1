"""Training rows that are read while they are used, from files here or on the Hub, in bounded memory.

The order of an epoch is a function of the seed, the epoch and the queries of a global batch, not of the number of
processes, so that a stream needs no state but the number of batches that were taken from it:

1. The *units* of all files (row groups, or some thousand lines) are put in a random order. Their rows, one after the
   other, are cut into as many *lanes* of equal length; the incomplete rest is left out for this epoch.
2. In every lane the rows are shuffled in buffers, each by a random order of its own.
3. A global batch takes equally many rows of every lane, and every process the part of the batch that it trains on. A
   process therefore reads only the lanes in which its part lies.

Going on in the middle is looking up in which unit a lane has arrived, and reading from there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain, islice, repeat
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..console import get_logger
from ..errors import InputError
from ..files import fingerprint
from . import schema
from .collection import open_row_set
from .negatives import BUFFER_STREAM, ORDER_STREAM, Example, TrainingRows, random_stream
from .readers import Block
from .rows import RowSet, in_memory
from .rows_io import RowReader, foreign_sides
from .sources import HubSource, LocalSource, SourceFile
from .stream_files import RowFile, Unit, open_row_file
from .tables import Corpus, Queries
from .values import find_column


logger = get_logger(__name__)

_NOT_LOOKED_UP = -2

# Rows that are drawn together, so that their documents are looked up together.
_DRAWN_ROWS = 1024

# More lanes mix more distant rows and let more processes read apart; each costs an open unit.
_MOST_LANES = 16
# Threads that read while the last rows are used; what they wait for is mostly the network.
_READERS = 4


class StreamedRows:
    """A row set that stays where it is: what [`~hf_distill.data.rows.RowSet`] holds, for rows that are read in order.

    Args:
        files: The files, at least one.
        queries: The queries that `query_id` names.
        corpus: The corpus that `document_ids` name; identifiers are looked up while rows are read.
        where: For messages.
        metadata: Provenance of the rows.

    Attributes:
        parts: The units of all files in their order, each with its file.
        starts: `int64[parts + 1]`, the number of each unit's first row among all rows.
    """

    def __init__(
        self,
        files: Sequence[RowFile],
        queries: Queries,
        corpus: Corpus,
        *,
        where: str,
        metadata: Mapping[str, Any] | None = None,
    ):
        self.queries, self.corpus, self.where, self.metadata = queries, corpus, where, dict(metadata or {})
        self.parts: list[tuple[RowFile, Unit]] = [(file, unit) for file in files for unit in file.units]
        if not self.parts:
            raise InputError("no rows in it", where=where, cure="A row set needs at least one row")
        self.starts = np.cumsum([0, *(unit.rows for _, unit in self.parts)])
        self._names = files[0].columns
        self._query_column = self._find(schema.QUERY_ID_NAMES)
        self._find((schema.DOCUMENT_IDS,))
        for file in files[1:]:
            if set(file.columns) != set(self._names):
                raise InputError(
                    f"the columns {', '.join(file.columns)} where {files[0].name} has {', '.join(self._names)}",
                    where=file.name,
                    cure="All files of a row set need the same columns",
                )
        self.fingerprint = fingerprint([[file.key for file in files], queries.fingerprint, corpus.fingerprint])
        self.reader = RowReader(queries, corpus, foreign=foreign_sides(self.metadata, queries, corpus), where=where)
        if schema.NUM_POSITIVES not in self._names:
            logger.warning("%s: no column 'num_positives'; its rows count as unlabelled", where)

    @classmethod
    def open(
        cls,
        source: str | os.PathLike,
        queries: Queries,
        corpus: Corpus,
        *,
        config: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
    ) -> StreamedRows:
        """Opens a row set without reading its rows.

        Args:
            source: A folder of a row set, a file of rows (parquet, or JSON lines, also .gz), or a repository on the
                Hub.
            queries: The queries.
            corpus: The corpus.
            config: The row set's name, where `source` has several.
            revision: Branch, tag or commit on the Hub.
            cache_dir: Instead of the default cache folder.

        Raises:
            InputError: No such source, no or several row sets in it, files that cannot be streamed.
        """
        opened, name = open_row_set(source, config, revision=revision, cache_dir=cache_dir)
        return cls.from_source(opened, name, queries, corpus, cache_dir=cache_dir)

    @classmethod
    def from_source(
        cls,
        source: LocalSource | HubSource,
        config: str,
        queries: Queries,
        corpus: Corpus,
        *,
        cache_dir: str | os.PathLike | None = None,
    ) -> StreamedRows:
        """Opens the row set `config` of an opened folder or repository; see `open`."""

        def look(file: SourceFile) -> RowFile:
            return open_row_file(file.name, file.open, file.key, cache_dir)

        # What stands at the end of a file is a request to the Hub for each.
        with ThreadPoolExecutor(_MOST_LANES) as threads:
            files = list(threads.map(look, source.files(config)))
        return cls(files, queries, corpus, where=source.place(config), metadata=source.metadata(config))

    def _find(self, names: Sequence[str]) -> str:
        return find_column(Block({name: [] for name in self._names}, self.where, 1, "row"), names)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __repr__(self) -> str:
        return f"StreamedRows({len(self)} rows in {len(self.parts)} parts, {self.where})"

    @property
    def columns(self) -> list[str]:
        """Names of the per-document columns besides the documents."""
        return [name for name in self._names if schema.per_document_type(name) is not None]

    @property
    def score_columns(self) -> list[str]:
        """Names of the columns with one score for each document."""
        return [name for name in self.columns if schema.is_score_column(name)]

    @property
    def max_positives(self) -> int:
        """The most positives of a row."""
        return max(unit.max_positives for _, unit in self.parts)

    @property
    def has_positives(self) -> bool:
        """Whether any row has a positive."""
        return self.max_positives > 0

    def blocks(self, part: int, start: int = 0, columns: Sequence[str] = ()) -> Iterator[CodedRows]:
        """The rows of a part from its row `start` on, some at a time, with `columns` and no others.

        Raises:
            InputError: Unknown queries, lists of different lengths and what else a row set may not have; the message
                names file, row and field.
        """
        file, unit = self.parts[part]
        # Sources are read in any case: a negative may stand in a row once for each of them.
        further = [name for name in (schema.NUM_POSITIVES, schema.SOURCES) if name in self._names]
        wanted = list(dict.fromkeys([self._query_column, schema.DOCUMENT_IDS, *further, *columns]))
        for block in file.blocks(unit, start, wanted):
            block.columns.setdefault(schema.NUM_POSITIVES, [0] * len(block))
            yield CodedRows(self, block)


class CodedRows(RowSet):
    """A block of rows in memory whose documents are codes, to be looked up when it is known which are needed.

    Args:
        stream: Where they come from.
        block: The rows as they are stored.
    """

    def __init__(self, stream: StreamedRows, block: Block):
        self._reader, self._block = stream.reader, block
        table, self._identifiers = stream.reader.coded(block)
        super().__init__(in_memory(table), stream.queries, stream.corpus)
        self._positions = np.full(len(self._identifiers), _NOT_LOOKED_UP, np.int64)

    def missing(self, codes: np.ndarray) -> np.ndarray:
        """Those of some codes that have not been looked up yet, each once."""
        codes = np.unique(codes)
        return codes[self._positions[codes] == _NOT_LOOKED_UP]

    def identifiers(self, codes: np.ndarray) -> pa.Array:
        """What codes stand for."""
        return self._identifiers.take(pa.array(codes))

    def set_positions(self, codes: np.ndarray, positions: np.ndarray) -> None:
        """Where the documents of codes stand in the corpus; `InputError` if one of them is not there (-1)."""
        if (positions < 0).any():
            code = int(codes[np.argmax(positions < 0)])
            raise self._reader.unknown_document(self._block, self.table, self._identifiers, code)
        self._positions[codes] = positions

    def joined(self, example: Example) -> Example:
        """An example of these rows with positions in place of the codes, which must have been looked up."""
        row, query, documents, target, positives, scores = example
        return Example(row, query, self._positions[documents], target, self._positions[positives], scores)


class StreamedTrainingRows(torch.utils.data.Dataset):
    """Streamed rows as training examples; the counterpart of [`~hf_distill.data.negatives.TrainingRows`].

    A row has the same number, and in an epoch the same positive and negatives, as it has in a [`RowSet`] of the same
    files. Rows cannot be asked for by number: [`StreamSampler`] reads them, in the process that trains, and hands out
    finished examples, which this data set passes on. Loader workers thus never read rows, only texts.

    Args:
        rows: The streamed rows.
        options: As for [`TrainingRows`]: `num_negatives`, `sampling`, `positive`, `seed`, `sources`, `score_columns`.

    Raises:
        InputError: For options or columns that do not fit; the first rows are looked at.
    """

    def __init__(self, rows: StreamedRows, **options: Any):
        self.rows, self._options = rows, options
        self._columns = [*options.get("score_columns", ()), *([schema.SOURCES] if options.get("sources") else [])]
        for name in self._columns:
            if name not in rows.columns:
                has = ", ".join(map(repr, rows.columns)) or "none"
                raise InputError(f"no column {name!r}", where=rows.where, cure=f"Its columns are: {has}")
        self.first_examples(1)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # what loader workers need of it: nothing

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def max_positives(self) -> int:
        """The most positives of a row."""
        return self.rows.max_positives

    def blocks(self, part: int, start: int = 0) -> Iterator[TrainingRows]:
        """The rows of a part from its row `start` on, some at a time."""
        first = int(self.rows.starts[part]) + start
        for rows in self.rows.blocks(part, start, self._columns):
            yield TrainingRows(rows, first_row=first, **self._options)
            first += len(rows)

    def examples(self, places: Sequence[tuple[TrainingRows, int]], epoch: int) -> list[Example]:
        """The examples of rows of `blocks`, whose documents are looked up together."""
        drawn = [(block.rows, block[row, epoch]) for block, row in places]
        of_block: dict[CodedRows, list[Example]] = {}
        for rows, example in drawn:
            of_block.setdefault(rows, []).append(example)
        missing = {
            rows: rows.missing(np.concatenate([codes for one in some for codes in (one.documents, one.positives)]))
            for rows, some in of_block.items()
        }
        if missing:
            found = self.rows.corpus.positions(
                pa.concat_arrays([rows.identifiers(codes) for rows, codes in missing.items()])
            )
            ends = np.cumsum([len(codes) for codes in missing.values()])
            for (rows, codes), positions in zip(missing.items(), np.split(found, ends[:-1])):
                rows.set_positions(codes, positions)
        return [rows.joined(example) for rows, example in drawn]

    def first_examples(self, number: int) -> list[Example]:
        """The examples of the first rows (at most `number`) in epoch 0, to look at before training."""
        blocks = chain.from_iterable(self.blocks(part) for part in range(len(self.rows.parts)))
        return self.examples(list(islice(((block, row) for block in blocks for row in range(len(block))), number)), 0)

    def __getitem__(self, example: Example | None) -> Example:
        if example is None:
            raise RuntimeError("a row of another process, or one that was to be skipped, was asked for")
        return example


class StreamOrder:
    """Which row comes when: arithmetic on the sizes of units, see the module's text.

    Args:
        sizes: `int64[units]`, the rows of every unit.
        batch: Queries of a global batch.
        shuffle_buffer: Rows that are shuffled together, over all lanes; 0 or 1 leaves all rows in their order.
        seed: Of all orders.

    Attributes:
        batches: Global batches of an epoch.
        lanes: How many lanes there are: a divisor of `batch`, and not more than units.
        width: Rows that a lane gives to a batch.
        buffer: Rows that a lane shuffles together.
    """

    def __init__(self, sizes: np.ndarray, batch: int, shuffle_buffer: int, seed: int):
        self.sizes, self.seed, self.shuffle = np.asarray(sizes, np.int64), seed, shuffle_buffer > 1
        self.batches = int(self.sizes.sum()) // batch
        most = min(_MOST_LANES, len(self.sizes)) if self.shuffle else 1
        self.lanes = max(number for number in range(1, most + 1) if batch % number == 0)
        self.width = batch // self.lanes
        self.buffer = max(shuffle_buffer // self.lanes, 1)

    def segments(self, epoch: int, lane: int, begin: int = 0) -> Iterator[tuple[int, int, int]]:
        """What a lane reads from its row `begin` on: `(unit, first row in it, number of rows)`."""
        order = np.arange(len(self.sizes))
        if self.shuffle:
            order = random_stream(self.seed, epoch, 0, ORDER_STREAM).permutation(len(self.sizes))
        ends = np.cumsum(self.sizes[order])
        length = self.batches * self.width
        position, stop = lane * length + begin, (lane + 1) * length
        slot = int(np.searchsorted(ends, position, side="right"))
        while position < stop:
            unit = int(order[slot])
            end = min(int(ends[slot]), stop)
            yield unit, position - int(ends[slot] - self.sizes[unit]), end - position
            position, slot = end, slot + 1

    def permutation(self, epoch: int, lane: int, number: int, size: int) -> np.ndarray:
        """The order (`int64[size]`) of the rows in buffer `number` of a lane."""
        if not self.shuffle:
            return np.arange(size)
        return random_stream(self.seed, epoch, (lane << 40) + number, BUFFER_STREAM).permutation(size)


_Piece = tuple[TrainingRows, int, int]
"""A block of rows, the first row of it that is meant, and how many."""


class _Buffer:
    """Rows that are shuffled together: `number` among those of its lane, begun at its row `inside`."""

    def __init__(self, number: int, inside: int):
        self.number, self.inside = number, inside
        self.pieces: list[_Piece] = []

    def shuffled(self, order: StreamOrder, epoch: int, lane: int, own: range) -> list[tuple[TrainingRows, int]]:
        """Those of its rows that are `own` among the rows of a batch, in their order: block and row in it."""
        ends = np.cumsum([count for _, _, count in self.pieces])
        turn = np.arange(self.inside, ends[-1])
        turn = turn[np.isin((self.number * order.buffer + turn) % order.width, own)]
        places = order.permutation(epoch, lane, self.number, int(ends[-1]))[turn]
        piece = np.searchsorted(ends, places, side="right")
        starts = np.array([start + count for _, start, count in self.pieces]) - ends
        rows = (starts[piece] + places).tolist()
        return [(self.pieces[number][0], row) for number, row in zip(piece.tolist(), rows)]


class StreamSampler(torch.utils.data.Sampler):
    """Reads streamed rows in the order of an epoch and draws their examples.

    It yields the examples of this process and None for the rows of the others, which their batches hold, in the order
    of the global batches: what accelerate's `BatchSamplerShard` expects of a sampler that all processes share.

    Args:
        dataset: What to read.
        batch_size: Queries of a batch on each process.
        seed: Of the order.
        shuffle_buffer: Rows that are shuffled together.
        processes: Number of processes.
        rank: Number of this one.
    """

    def __init__(
        self,
        dataset: StreamedTrainingRows,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle_buffer: int = 10_000,
        processes: int = 1,
        rank: int = 0,
    ):
        sizes = np.diff(dataset.rows.starts)
        self.order = StreamOrder(sizes, batch_size * processes, shuffle_buffer, seed)
        self.dataset, self.batch_size, self.processes, self.rank = dataset, batch_size, processes, rank
        self.epoch = self._skipped = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration; trainers and accelerate call it at the start of each."""
        self.epoch = int(epoch)

    def skip_next(self, batches: int) -> None:
        """Lets the next iteration begin with so many global batches of None, for somebody who passes over them."""
        self._skipped = batches

    def __len__(self) -> int:
        return self.order.batches * self.batch_size * self.processes

    def __iter__(self) -> Iterator[Example | None]:
        epoch, order = self.epoch, self.order
        skipped, self._skipped = min(self._skipped, order.batches), 0
        yield from repeat(None, skipped * self.batch_size * self.processes)
        before, after = self.rank * self.batch_size, (self.rank + 1) * self.batch_size
        with ThreadPoolExecutor(_READERS, thread_name_prefix="rows") as threads:
            lanes = []
            for lane in range(before // order.width, -(-after // order.width)):
                first, end = max(before - lane * order.width, 0), min(after - lane * order.width, order.width)
                buffers = ahead(self._buffers(epoch, lane, skipped * order.width), threads)
                lanes.append((chain.from_iterable(self._drawn(epoch, lane, buffers, range(first, end))), end - first))
            for _ in range(skipped, order.batches):
                yield from repeat(None, before)
                for examples, number in lanes:
                    yield from islice(examples, number)
                yield from repeat(None, len(self) // order.batches - after)

    def _buffers(self, epoch: int, lane: int, begin: int) -> Iterator[_Buffer]:
        """The buffers of a lane, of which the first has the lane's row `begin`."""
        size = self.order.buffer
        number, inside = divmod(begin, size)
        buffer, held = _Buffer(number, inside), 0
        for block, start, count in self._pieces(epoch, lane, begin - inside):
            while count:
                taken = min(count, size - held)
                buffer.pieces.append((block, start, taken))
                start, count = start + taken, count - taken
                held += taken
                if held == size:
                    yield buffer
                    buffer, held = _Buffer(buffer.number + 1, 0), 0
        if held:
            yield buffer

    def _pieces(self, epoch: int, lane: int, begin: int) -> Iterator[_Piece]:
        for part, start, count in self.order.segments(epoch, lane, begin):
            with closing(self.dataset.blocks(part, start)) as blocks:
                for block in blocks:
                    yield block, 0, min(len(block), count)
                    count -= min(len(block), count)
                    if not count:
                        break

    def _drawn(self, epoch: int, lane: int, buffers: Iterator[_Buffer], own: range) -> Iterator[list[Example]]:
        """The examples of a lane's buffers, some at a time.

        Of the rows that the lane gives to a batch only those in `own` are drawn; the others are other processes'.
        """
        for buffer in buffers:
            places = buffer.shuffled(self.order, epoch, lane, own)
            for start in range(0, len(places), _DRAWN_ROWS):
                yield self.dataset.examples(places[start : start + _DRAWN_ROWS], epoch)


def ahead(items: Iterator[Any], threads: ThreadPoolExecutor) -> Iterator[Any]:
    """The same items, the next one being made while the last one is used."""
    coming = threads.submit(next, items, None)
    while (item := coming.result()) is not None:
        coming = threads.submit(next, items, None)
        yield item
