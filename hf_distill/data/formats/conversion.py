"""Any format into a folder of our own layout: streamed, checked, resumable, and there only when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...console import get_logger, progress
from ...errors import InputError
from ...files import atomic_path, fingerprint, read_json, saying_full_disk, write_json
from ...locking import lock_folder, unlock_folder
from .. import schema
from ..cards import config_entry, join_card
from ..collection import RESERVED_CONFIGS, qrels_config
from ..notes import Notes
from ..readers import Block
from ..row_columns import is_row_block, standard_rows
from .cleaning import NOUNS, Cleaner
from .opening import Source, TextRows
from .seen import Seen, hashes_of
from .source import FormatSource


logger = get_logger(__name__)

# Raised when the same input is written differently than before.
_VERSION = 1

# A file ends when it has so many rows or so much text; what a kill costs is at most one of them.
_FILE_ROWS = 500_000
_FILE_BYTES = 256 * 2**20

MANIFEST = "conversion.json"


@dataclass
class Part:
    """One config, or one split of the judgements, on its way into files.

    Attributes:
        config: The folder that it becomes.
        stem: How its files' names begin: the split for judgements.
        role: `corpus`, `queries`, `qrels` or `rows`.
        blocks: Reads it from the start; what is passed over goes to the notes.
        key: Identifies its content.
        rows: How many rows it has, once it is written.
        columns: Its columns, once it is written.
        notes: What was passed over.
    """

    config: str
    stem: str
    role: str
    blocks: Callable[[Notes], Iterator[Block]]
    key: Any
    rows: int = 0
    columns: list[str] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)

    @property
    def label(self) -> str:
        """`qrels/dev`, else the config."""
        return f"{self.config}/{self.stem}" if self.role == schema.QRELS else self.config


@dataclass
class Conversion:
    """What `convert` did.

    Attributes:
        folder: Where it lies.
        parts: What it wrote, empty parts included.
        resumed: Whether the work of an earlier run was used.
    """

    folder: Path
    parts: list[Part]
    resumed: bool


def convert(
    source: Source, output_dir: str | os.PathLike, *, unknown_ids: str = "error", name: str | None = None
) -> Conversion:
    """Writes a source in our own layout.

    Nothing is kept in memory but one block of rows and 16 bytes for each identifier. Work goes on in a hidden folder
    beside `output_dir`, file by file; killed at any moment, the same call goes on with the next file and leaves the
    same bytes. The folder takes its name when it is complete.

    Args:
        source: What `open_inputs` returned.
        output_dir: A new or empty folder, or one that the same conversion wrote.
        unknown_ids: What to do with judgements and rows of queries or documents that are not there: `"error"`, or
            `"drop"` them. Without queries or corpus in the source there is nothing to compare with.
        name: The collection's name, by default the source's.

    Raises:
        InputError: Anything wrong with the input, with file, line and field; a folder that holds something else;
            another conversion at work in the same place.
    """
    if unknown_ids not in ("error", "drop"):
        raise InputError(f"{unknown_ids!r} is not a choice", where="unknown_ids", cure="Use 'error' or 'drop'")
    target = Path(output_dir).resolve()
    parts = _text_parts() if isinstance(source, TextRows) else _parts(source)
    content = source.key() if isinstance(source, TextRows) else [[part.label, part.role, part.key] for part in parts]
    key = fingerprint([_VERSION, content, unknown_ids, name])
    lock_folder(target, beside=True)
    try:
        return _convert(source, parts, target, key, name, drop=unknown_ids == "drop")
    finally:
        unlock_folder(target, beside=True)


def _convert(source: Source, parts: list[Part], target: Path, key: str, name: str | None, *, drop: bool) -> Conversion:
    if (target / MANIFEST).exists() and read_json(target / MANIFEST).get("key") == key:
        logger.info("%s is there already, made from the same input", target)
        _recall(parts, read_json(target / MANIFEST)["parts"])
        # What the cache of an opened source has left there.
        shutil.rmtree(working_folder(target), ignore_errors=True)
        return Conversion(target, parts, resumed=True)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(
            "the folder is not empty", where=str(target), cure="Name a new folder, or empty this one first"
        )
    work = working_folder(target)
    with saying_full_disk(target.parent):
        resumed = _prepare(work, key)
        if isinstance(source, TextRows):
            _write_texts(source, parts, work, name)
        else:
            _write_parts(source, parts, work, name, drop=drop)
        _publish(source, parts, work, target, key)
    return Conversion(target, parts, resumed)


def working_folder(output_dir: str | os.PathLike) -> Path:
    """Where unfinished work on `output_dir` lies."""
    target = Path(output_dir).resolve()
    return target.parent / f".{target.name}.converting"


def _write_parts(source: Source, parts: list[Part], work: Path, name: str | None, *, drop: bool) -> None:
    known: dict[str, Seen] = {}
    for part in parts:
        _write_part(part, work, known, drop)
    if not any(part.rows for part in parts):
        raise InputError("nothing in it to convert", where=source.where, cure="Check the files")
    (work / "README.md").write_text(_readme(parts, name or source.name, source), encoding="utf-8")


def _write_texts(source: TextRows, parts: list[Part], work: Path, name: str | None) -> None:
    """Rows of texts, whose equal texts are found in the cache before anything is written."""
    from ..export import save_collection

    collection, rows = source.read(name)
    made = work / ".state" / "made"
    shutil.rmtree(made, ignore_errors=True)
    save_collection(collection, made, row_sets={"train": rows})
    for entry in made.iterdir():
        stale = work / entry.name
        shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink(missing_ok=True)
        os.replace(entry, stale)
    sizes = (len(collection.corpus), len(collection.queries), sum(map(len, collection.qrels.values())), len(rows))
    for part, size in zip(parts, sizes):
        part.rows = size


def _publish(source: Source, parts: list[Part], work: Path, target: Path, key: str) -> None:
    facts = {part.label: {"rows": part.rows, "columns": part.columns, "notes": part.notes.counts} for part in parts}
    write_json(work / MANIFEST, {"key": key, "source": source.where, "revision": source.revision, "parts": facts})
    for leftover in (".state", ".cache"):
        shutil.rmtree(work / leftover, ignore_errors=True)
    if target.exists():
        target.rmdir()
    os.replace(work, target)


def _prepare(work: Path, key: str) -> bool:
    """Makes the working folder, or tidies up the one of an earlier run with the same key."""
    started = work / ".state" / "key.json"
    earlier = read_json(started)["key"] if started.exists() else None
    if work.exists() and earlier != key:
        if earlier is not None:
            logger.warning("%s: unfinished work on other input or settings is removed", work)
        for entry in work.iterdir():
            # The cache is made again where it does not fit; it is keyed by what it holds.
            if entry.name != ".cache":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for stale in [path for path in work.rglob(".*.tmp")] if work.exists() else []:
        shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink(missing_ok=True)
    if earlier == key:
        return True
    started.parent.mkdir(parents=True, exist_ok=True)
    write_json(started, {"key": key})
    return False


# -- parts ------------------------------------------------------------------------------------------------------------


def _parts(source: Source) -> list[Part]:
    """What the source has, corpus and queries first, so that rows can be compared with them."""
    configs = source.configs()
    parts: list[Part] = []
    for role, names in ((schema.CORPUS, schema.CORPUS_CONFIGS), (schema.QUERIES, schema.QUERIES_CONFIGS)):
        config = next((name for name in names if name in configs), None)
        if config is not None:
            parts.append(_part(source, config, source.splits(config), role, role, role))
    judged, qrels = qrels_config(source)
    if qrels is not None:
        parts += [_part(judged, qrels, [split], schema.QRELS, split, schema.QRELS) for split in judged.splits(qrels)]
    for config in configs:
        if config in RESERVED_CONFIGS or (config == qrels and judged is source):
            continue
        if isinstance(source, FormatSource) or is_row_block(source.columns(config)):
            parts.append(_part(source, config, source.splits(config), config, "train", "rows"))
        else:
            logger.warning("%s: config %r is no row set and is left out", source.where, config)
    if not parts:
        raise InputError(
            f"nothing to convert ({source.looked_for()})", where=source.where, cure="Say what the files are"
        )
    return parts


def _text_parts() -> list[Part]:
    names = ((schema.CORPUS, schema.CORPUS), (schema.QUERIES, schema.QUERIES), (schema.QRELS, schema.QRELS))
    return [Part(config, "train", role, lambda notes: iter(()), None) for config, role in (*names, ("train", "rows"))]


def _part(source: Source, config: str, splits: Sequence[str], target: str, stem: str, role: str) -> Part:
    def blocks(notes: Notes) -> Iterator[Block]:
        for split in splits:
            if isinstance(source, FormatSource):
                yield from source.blocks(config, split, notes)
            else:
                for block in source.blocks(config, split):
                    yield standard_rows(block, notes) if role == "rows" and len(block) else block

    return Part(target, stem, role, blocks, [source.key(config, split) for split in splits])


def _recall(parts: Iterable[Part], facts: dict[str, Any]) -> None:
    for part in parts:
        found = facts[part.label]
        part.rows, part.columns, part.notes = found["rows"], found["columns"], Notes(found["notes"])


# -- writing ----------------------------------------------------------------------------------------------------------


def _write_part(part: Part, work: Path, known: dict[str, Seen], drop: bool) -> None:
    state = work / ".state" / f"{part.config}-{part.stem}.json"
    folder = work / part.config
    if state.exists():
        _recall([part], {part.label: read_json(state)})
        _remember(part, folder, known)
        return
    bar = progress(label=part.label, unit="row")
    cleaner = Cleaner(part.role, part.blocks, part.notes, known, drop=drop)
    try:
        part.rows = _write_files(cleaner.tables(), folder, part.stem, bar.update)
    finally:
        bar.close()
    part.columns = cleaner.columns
    if part.role in NOUNS and not part.rows:
        raise InputError(f"no {NOUNS[part.role]} in it", where=cleaner.where, cure="Check the file")
    if part.role == "rows" and part.rows:
        write_json(
            folder / "metadata.json",
            {"made_by": "convert", "source": cleaner.where, "rows": part.rows, "columns": part.columns},
        )
    write_json(state, {"rows": part.rows, "columns": part.columns, "notes": part.notes.counts})


def _write_files(tables: Iterator[pa.Table], folder: Path, stem: str, advance: Callable[[int], Any]) -> int:
    """Writes tables as parquet files that are complete or absent; those that are there already stay."""
    total, number = 0, 0
    first = next(tables, None)
    while first is not None:
        limited = _Limited(first, tables)
        path = folder / f"{stem}-{number:05d}.parquet"
        if path.exists() or list(folder.glob(f"{stem}-{number:05d}-of-*.parquet")):
            for table in limited:
                advance(table.num_rows)
        else:
            _write_file(path, limited, advance)
        total += limited.rows
        number += 1
        first = next(tables, None)
    for shard in range(number):
        path = folder / f"{stem}-{shard:05d}.parquet"
        if path.exists():
            os.replace(path, folder / f"{stem}-{shard:05d}-of-{number:05d}.parquet")
    return total


class _Limited:
    """The tables of one file: `first`, and those that follow until it is full."""

    def __init__(self, first: pa.Table, tables: Iterator[pa.Table]):
        self.schema, self.rows, self._size = first.schema, 0, 0
        self._tables = chain([first], tables)

    def __iter__(self) -> Iterator[pa.Table]:
        while self.rows < _FILE_ROWS and self._size < _FILE_BYTES:
            table = next(self._tables, None)
            if table is None:
                return
            self.rows += table.num_rows
            self._size += table.nbytes
            yield table


def _write_file(path: Path, tables: _Limited, advance: Callable[[int], Any]) -> None:
    import pyarrow.parquet as pq

    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, tables.schema, compression="zstd") as writer,
        ThreadPoolExecutor(max_workers=1) as pool,
    ):
        # One block is compressed while the next one is read.
        writing = None
        for table in tables:
            if writing is not None:
                writing.result()
            writing = pool.submit(writer.write_table, table)
            advance(table.num_rows)
        if writing is not None:
            writing.result()


def _remember(part: Part, folder: Path, known: dict[str, Seen]) -> None:
    """Collects the identifiers of a part that was written before."""
    if part.role not in NOUNS:
        return
    import pyarrow.parquet as pq

    seen = known.setdefault(part.role, Seen())
    column = schema.DOCUMENT_ID if part.role == schema.CORPUS else schema.QUERY_ID
    for path in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=[column]):
                seen.add(hashes_of(batch.column(0)))


def _readme(parts: Sequence[Part], collection: str, source: Source) -> str:
    entries, lines = [], ["| part | rows |", "|---|---|"]
    for config in dict.fromkeys(part.config for part in parts):
        files = {}
        for part in parts:
            if part.config == config and part.rows:
                split = part.stem if part.role in (schema.QRELS, "rows") else config
                files[split] = f"{config}/{part.stem}-*.parquet"
                lines.append(f"| {part.label} | {part.rows:,} |")
        if files:
            entries.append(config_entry(config, files))
    left_out = [f"- {part.label}: {line}" for part in parts for line in part.notes.lines()]
    origin = source.where + (f" at revision `{source.revision}`" if source.revision else "")
    text = "\n".join([f"# {collection}", "", f"Converted from {origin}.", "", *lines, "", *left_out, ""])
    header = {"task_categories": ["text-retrieval"], "collection_name": collection, "configs": entries}
    return join_card(header, text.rstrip() + "\n")
