"""Files of rows that are read from any row on: here or on the Hub, parquet or JSON lines, without keeping a copy.

What a stream has to know about its files before the first row is small: where the *units* lie (row groups of parquet,
some thousand lines of JSON), how many rows each has, and the most positives of any of its rows. Parquet says so at its
end; of JSON lines an index is made in one pass and kept in the cache folder.
"""

from __future__ import annotations

import gzip
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..console import get_logger
from ..errors import InputError
from ..files import cache_folder, fingerprint, read_json, write_json
from . import schema
from .lines import decode_line
from .readers import Block, file_kind, json_record


if TYPE_CHECKING:
    import pyarrow.parquet as pq

logger = get_logger(__name__)

# Rows of a unit of JSON lines, which are sought by their offset.
_LINES_OF_A_UNIT = 4096
# Rows that are looked up together: enough for vectorised work, little enough that many units can be open at once.
READ_ROWS = 1024


@dataclass(frozen=True)
class Unit:
    """Rows that follow one another in a file and are found without reading what stands before them.

    Attributes:
        place: The number of a row group, or the byte at which the first line begins.
        first: The number of the first row or line, from 1.
        rows: How many rows.
        max_positives: The most positives of any of them.
    """

    place: int
    first: int
    rows: int
    max_positives: int


class RowFile(ABC):
    """A file of rows.

    Args:
        name: For messages.
        open_file: Opens it for reading bytes; seeking must be cheap.
        key: JSON-like value that identifies the content.
        cache_dir: Where an index is kept.
    """

    def __init__(self, name: str, open_file: Callable[[], IO[bytes]], key: Any, cache_dir: str | Path | None = None):
        self.name, self.open_file, self.key, self.cache_dir = name, open_file, key, cache_dir
        self.columns, self.units = self._look()

    @contextmanager
    def reading(self) -> Iterator[IO[bytes]]:
        """The opened file; what goes wrong with it becomes an [`InputError`]."""
        import pyarrow as pa

        broken = (pa.ArrowException, EOFError, zlib.error, gzip.BadGzipFile)
        try:
            with self.open_file() as stream:
                yield stream
        except InputError:
            raise
        except broken as error:
            cure = "Copy or upload the file again"
            raise InputError(f"cannot be read ({str(error).strip()})", where=self.name, cure=cure) from error
        except OSError as error:  # also what the Hub's client raises, after it has tried for a while
            raise InputError(
                f"cannot be read ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''})",
                where=self.name,
                cure="Check the path or the network, and start again: training goes on from its last checkpoint",
            ) from error

    @abstractmethod
    def _look(self) -> tuple[list[str], list[Unit]]:
        """The names of the columns and the units."""

    @abstractmethod
    def blocks(self, unit: Unit, start: int, columns: Sequence[str]) -> Iterator[Block]:
        """The rows of `unit` from its row `start` on, at most `READ_ROWS` at a time, only `columns`."""


class ParquetRows(RowFile):
    """A parquet file; its units are row groups."""

    def _look(self) -> tuple[list[str], list[Unit]]:
        import pyarrow.parquet as pq

        with self.reading() as stream:
            file = pq.ParquetFile(stream)
            self._metadata = file.metadata
            units, first = [], 1
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if rows:
                    units.append(Unit(group, first, rows, _most_positives(file, group)))
                first += rows
            return list(file.schema_arrow.names), units

    def blocks(self, unit: Unit, start: int, columns: Sequence[str]) -> Iterator[Block]:
        import pyarrow.parquet as pq

        with self.reading() as stream:
            file = pq.ParquetFile(stream, metadata=self._metadata)
            first = unit.first
            for batch in file.iter_batches(READ_ROWS, row_groups=[unit.place], columns=list(columns)):
                skipped = max(unit.first + start - first, 0)
                if skipped < batch.num_rows:
                    kept = batch.slice(skipped)
                    yield Block({name: kept.column(name) for name in columns}, self.name, first + skipped, "row")
                first += batch.num_rows


def _most_positives(file: pq.ParquetFile, group: int) -> int:
    """The largest `num_positives` of a row group: from its statistics, or from that column alone."""
    if schema.NUM_POSITIVES not in file.schema_arrow.names:
        return 0
    described = file.metadata.row_group(group)
    for number in range(described.num_columns):
        column = described.column(number)
        if column.path_in_schema == schema.NUM_POSITIVES and column.statistics and column.statistics.has_min_max:
            return int(column.statistics.max)
    values = file.read_row_group(group, columns=[schema.NUM_POSITIVES]).column(0)
    return max((int(value) for value in values.to_pylist() if value is not None), default=0)


class JsonRows(RowFile):
    """A file with one JSON object a line, perhaps compressed; its units are found by an index of offsets."""

    def _look(self) -> tuple[list[str], list[Unit]]:
        with self.reading() as raw:
            self._compressed = raw.read(2) == b"\x1f\x8b"
        digits = fingerprint(["lines", self.key, _LINES_OF_A_UNIT])
        path = cache_folder(self.cache_dir) / "data" / "lines" / f"{digits}.json"
        if not path.exists():
            logger.info("%s: reading it through once for an index of its lines", self.name)
            write_json(path, self._index())
        index = read_json(path)
        return index["columns"], [Unit(*numbers) for numbers in index["units"]]

    def _index(self) -> dict[str, Any]:
        columns: dict[str, None] = {}
        units: list[list[int]] = []
        with self.reading() as file:
            stream, offset = self._plain(file), 0
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    record = self._record(line, number)
                    columns.update(dict.fromkeys(record))
                    # Nothing can be sought in a compressed file, so that it is one unit.
                    if not units or (units[-1][2] >= _LINES_OF_A_UNIT and not self._compressed):
                        units.append([offset, number, 0, 0])
                    units[-1][2] += 1
                    positives = record.get(schema.NUM_POSITIVES)
                    # Anything else that stands there is refused when the row is read.
                    units[-1][3] = max(units[-1][3], positives if isinstance(positives, int) else 0)
                offset += len(line)
        return {"columns": list(columns), "units": units}

    def blocks(self, unit: Unit, start: int, columns: Sequence[str]) -> Iterator[Block]:
        with self.reading() as file:
            stream = self._plain(file)
            stream.seek(unit.place)
            filled = ((number, line) for number, line in enumerate(stream, start=unit.first) if line.strip())
            rows = islice(filled, start, unit.rows)
            while part := list(islice(rows, READ_ROWS)):
                numbers = [number for number, _ in part]
                records = [self._record(line, number) for number, line in part]
                values = {name: [record.get(name) for record in records] for name in columns}
                yield Block(values, self.name, numbers[0], "line", numbers)

    def _record(self, line: bytes, number: int) -> dict[str, Any]:
        return json_record(decode_line(line, number, self.name), f"{self.name}, line {number}")

    def _plain(self, file: IO[bytes]) -> IO[bytes]:
        return gzip.GzipFile(fileobj=file) if self._compressed else file


def open_row_file(name: str, open_file: Callable[[], IO[bytes]], key: Any, cache_dir: str | Path | None) -> RowFile:
    """The file as its name says what it is; `InputError` for what cannot be read from the middle."""
    kind = file_kind(name)
    if kind == ".parquet":
        return ParquetRows(name, open_file, key, cache_dir)
    if kind in (".jsonl", ".json"):
        return JsonRows(name, open_file, key, cache_dir)
    raise InputError(
        "only parquet and JSON lines can be streamed",
        where=name,
        cure="Convert the file (hf-distill convert), or train without --streaming",
    )
