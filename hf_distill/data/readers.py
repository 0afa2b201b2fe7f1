"""Reading tables of any supported file as blocks of columns that know which line or row each value came from."""

from __future__ import annotations

import csv
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError
from .arrow import BLOCK_ROWS
from .lines import Lines, line_blocks, read_lines


TEXT_SUFFIXES = (".jsonl", ".json", ".tsv", ".csv")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")

# A block also ends when its text reaches this size, so that long documents do not swell it.
BLOCK_CHARACTERS = 16 * 2**20

TAB = "\t"


@dataclass
class Block:
    """Rows that follow one another in a file.

    Attributes:
        columns: By name, a list of Python values or an Arrow array.
        where: The file or data set, for messages.
        first: The number of the first row in its file, from 1.
        unit: `"line"` for text files, else `"row"`.
        lines: The rows' line numbers, where they do not simply count on from `first`.
    """

    columns: dict[str, Sequence[Any]]
    where: str
    first: int
    unit: str
    lines: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def place(self, index: int) -> str:
        """`"corpus.jsonl.gz, line 17"` for the row `index` of this block."""
        number = self.first + index if self.lines is None else self.lines[index]
        return f"{self.where}, {self.unit} {number}"

    def origin(self) -> Block:
        """The block without its columns: what `place` needs."""
        return Block({}, self.where, self.first, self.unit, self.lines)


def file_kind(path: str | Path) -> str | None:
    """The suffix that decides how a file is read (`".jsonl"` for `corpus.jsonl.gz`), `None` if no reader fits."""
    name = Path(path).name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def read_blocks(path: str | Path) -> Iterator[Block]:
    """Reads `.jsonl`, `.json` (one object a line), `.tsv`, `.csv` (each also `.gz`) and `.parquet` block by block.

    Args:
        path: The file.

    Raises:
        InputError: Unknown suffix, broken compression, bytes that are not UTF-8, malformed lines; the message names
            file and line.
    """
    path = Path(path)
    kind = file_kind(path)
    if kind == ".parquet":
        yield from _parquet_blocks(path)
    elif kind in (".jsonl", ".json"):
        yield from _json_blocks(path)
    elif kind == ".tsv":
        yield from tab_blocks(path)
    elif kind == ".csv":
        yield from _comma_blocks(path)
    else:
        raise InputError(
            f"no reader for a file named {path.name!r}",
            where=str(path),
            cure=f"Use one of {', '.join(SUFFIXES)}; the text formats may be compressed as .gz",
        )


def tab_blocks(path: str | Path, names: Sequence[str] | None = None, *, blanks: bool = False) -> Iterator[Block]:
    """Reads tab-separated values in blocks. Nothing is quoted: a text may begin with a quotation mark.

    Args:
        path: The file, plain or gzip.
        names: The columns; by default the first line has them.
        blanks: Whether fields may be separated by blanks as well, as in TREC files.

    Raises:
        InputError: A line with another number of fields, and what `read_lines` raises.
    """
    header = names is None
    for lines in line_blocks(path):
        if blanks:
            lines.texts = pc.replace_substring_regex(lines.texts, r"[ \t\v\f]+", TAB)
        if names is None:
            names = [name.strip() for name in lines.texts[0].as_py().split(TAB)]
            rest = None if lines.numbers is None else lines.numbers[1:]
            lines = Lines(lines.texts[1:], lines.number(min(1, len(lines.texts) - 1)), rest)
            if not len(lines.texts):
                yield Block({name: [] for name in names}, str(path), 2, "line")
                continue
        yield Block(_fields(lines, names, str(path), header), str(path), lines.first, "line", lines.numbers)
    if names is None:
        raise InputError("the file is empty", where=str(path), cure="It needs a header line and at least one row")


def _fields(lines: Lines, names: Sequence[str], where: str, header: bool) -> dict[str, pa.Array]:
    """The columns of lines, each an array of strings."""
    width = len(names)
    tabs = pc.count_substring(lines.texts, TAB).to_numpy(zero_copy_only=False)
    wrong = tabs != width - 1
    if wrong.any():
        index = int(np.argmax(wrong))
        line = lines.texts[index].as_py()
        raise InputError(
            f"{tabs[index] + 1} fields where {'the header has' if header else 'a line has'} {width} "
            f"({', '.join(names)}): {line[:80]!r}",
            where=f"{where}, line {lines.number(index)}",
            cure="Every line must have the same fields, separated by tabs",
        )
    if width == 1:
        return {names[0]: lines.texts}
    flat = pc.split_pattern(lines.texts, TAB).flatten()
    return {name: flat.take(pa.array(np.arange(number, len(flat), width))) for number, name in enumerate(names)}


def _json_blocks(path: Path) -> Iterator[Block]:
    records: list[dict] = []
    lines: list[int] = []
    size = 0

    def flush() -> Block:
        names = dict.fromkeys(name for record in records for name in record)
        return _line_block({name: [record.get(name) for record in records] for name in names}, path, lines)

    for number, line in read_lines(path):
        if records and (len(records) >= BLOCK_ROWS or size + len(line) > BLOCK_CHARACTERS):
            yield flush()
            records, lines, size = [], [], 0
        record = json_record(line, f"{path}, line {number}")
        records.append(record)
        lines.append(number)
        size += len(line)
    if records:
        yield flush()


def json_record(text: str, where: str) -> dict[str, Any]:
    """The JSON object of one line; `InputError` if it is none, with `where` the file and line."""
    try:
        record = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        detail = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise InputError(
            f"not a JSON object ({detail}): {text[:80]!r}",
            where=where,
            cure="Mend or remove the line; every line must be one JSON object",
        ) from None
    if not isinstance(record, dict):
        raise InputError(
            f"a JSON {type(record).__name__} where an object is expected: {text[:80]!r}",
            where=where,
            cure='Every line must be one JSON object such as {"_id": ..., "text": ...}',
        )
    return record


def _comma_blocks(path: Path) -> Iterator[Block]:
    header: list[str] | None = None
    rows: list[list[str]] = []
    lines: list[int] = []

    def flush() -> Block:
        return _line_block({name: list(column) for name, column in zip(header, zip(*rows))}, path, lines)

    for number, cells in _cells(path):
        if header is None:
            header = [cell.strip() for cell in cells]
            continue
        if len(cells) != len(header):
            raise InputError(
                f"{len(cells)} fields where the header has {len(header)} ({', '.join(header)}): "
                f"{','.join(cells)[:80]!r}",
                where=f"{path}, line {number}",
                cure="Every line must have the header's fields, separated by commas",
            )
        if len(rows) >= BLOCK_ROWS:
            yield flush()
            rows, lines = [], []
        rows.append(cells)
        lines.append(number)
    if header is None:
        raise InputError("the file is empty", where=str(path), cure="It needs a header line and at least one row")
    yield flush() if rows else Block({name: [] for name in header}, str(path), 2, "line")


def _line_block(columns: dict[str, list[Any]], path: Path, lines: list[int]) -> Block:
    # Blank lines and fields with line breaks leave gaps between the numbers.
    gaps = lines[-1] - lines[0] != len(lines) - 1
    return Block(columns, str(path), lines[0], "line", array("q", lines) if gaps else None)


def _cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line + "\n" for _, line in read_lines(path, blank=True)), strict=True)
    start = 1
    try:
        for cells in reader:
            if cells:
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"not a row of comma-separated values ({error})",
            where=f"{path}, line {start}",
            cure="Put fields with commas or line breaks in double quotes, and double the quotes inside them",
        ) from None


def _parquet_blocks(path: Path) -> Iterator[Block]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            first = 1
            for batch in file.iter_batches(batch_size=BLOCK_ROWS):
                yield Block({name: batch.column(name) for name in batch.schema.names}, str(path), first, "row")
                first += batch.num_rows
            if first == 1:
                yield Block({field.name: pa.array([], field.type) for field in file.schema_arrow}, str(path), 1, "row")
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"not a readable parquet file ({error})", where=str(path), cure="Copy or download the file again"
        ) from None
