"""Writing collections in the layout that `datasets.load_dataset`, sentence-transformers and we read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import pyarrow as pa
from filelock import FileLock

from ..errors import InputError
from ..files import atomic_path
from . import schema
from .arrow import BLOCK_ROWS
from .cards import add_config, config_entry, join_card, split_card
from .collection import Collection, load_collection
from .qrels import Qrels
from .rows import RowSet
from .tables import TextTable


# About a million rows in one parquet file.
_BLOCKS_PER_FILE = 250

# What `datasets` accepts as the name of a split.
_SPLIT_NAME = re.compile(r"^\w+(\.\w+)*$")
_CONFIG_NAME = re.compile(r"^[\w.\-]+$")


def save_collection(
    collection: Collection,
    folder: str | os.PathLike,
    *,
    card: str | None = None,
    row_sets: Mapping[str, RowSet] | None = None,
) -> Path:
    """Writes a collection so that `datasets.load_dataset(folder, "corpus")` and `load_collection(folder)` read it.

    The folder gets `corpus/*.parquet`, `queries/*.parquet`, `qrels/<split>.parquet`, a folder for each row set, and a
    `README.md` whose YAML header names them all. It appears only when it is complete.

    Args:
        collection: What to write.
        folder: A new or empty folder.
        card: The README, with or without a YAML header of its own; a short description by default.
        row_sets: Row sets to write with it, by name.

    Raises:
        InputError: The folder holds something already; a split or row set has a name that the Hub would refuse.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            "the folder is not empty", where=str(folder), cure="Name a new folder, or empty this one first"
        )
    for split in collection.qrels:
        if not _SPLIT_NAME.match(split):
            raise InputError(
                f"{split!r} is no name for a split",
                where=collection.source,
                cure="Use letters, digits, underscores and dots; rename the split",
            )
    for name, rows in (row_sets or {}).items():
        _check_row_set(name, rows, collection)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        entries = [
            config_entry(schema.CORPUS, {schema.CORPUS: _write_table(collection.corpus, temporary, schema.CORPUS)}),
            config_entry(
                schema.QUERIES, {schema.QUERIES: _write_table(collection.queries, temporary, schema.QUERIES)}
            ),
        ]
        if collection.qrels:
            files = {}
            for split, qrels in collection.qrels.items():
                files[split] = f"{schema.QRELS}/{split}.parquet"
                write_parquet(temporary / files[split], schema.QRELS_SCHEMA, _qrels_tables(qrels, collection))
            entries.append(config_entry(schema.QRELS, files))
        for name, rows in (row_sets or {}).items():
            rows.save(temporary / name)
            entries.append(config_entry(name, {"train": f"{name}/*.parquet"}))
        metadata, text = split_card(card if card is not None else _description(collection))
        metadata = {"task_categories": ["text-retrieval"], **metadata, "collection_name": collection.name}
        metadata["configs"] = entries
        (temporary / "README.md").write_text(join_card(metadata, text), encoding="utf-8")
    return folder


def add_row_set(folder: str | os.PathLike, name: str, rows: RowSet) -> Path:
    """Adds a row set to a folder of `save_collection`, or replaces the one of that name; the README names it.

    Raises:
        InputError: The folder is no collection of ours, or holds other queries or another corpus than the rows'.
    """
    folder = Path(folder)
    if not (folder / "README.md").exists():
        raise InputError("no README.md", where=str(folder), cure="Write the collection with save_collection first")
    _check_row_set(name, rows, load_collection(folder))
    rows.save(folder / name)
    # Another process may be adding another row set.
    with FileLock(folder / ".README.md.lock"):
        add_config(folder / "README.md", config_entry(name, {"train": f"{name}/*.parquet"}))
    return folder / name


def _check_row_set(name: str, rows: RowSet, collection: Collection) -> None:
    if name in (schema.CORPUS, schema.QUERIES, schema.QRELS, "default") or not _CONFIG_NAME.match(name):
        raise InputError(
            f"{name!r} is no name for a row set",
            where=collection.source,
            cure="Use letters, digits, '-', '_' and '.', and none of corpus, queries, qrels, default",
        )
    for mine, theirs in ((rows.queries, collection.queries), (rows.corpus, collection.corpus)):
        if mine.fingerprint != theirs.fingerprint:
            raise InputError(
                f"the row set {name!r} was made for other {mine.noun} ({mine.where}; the fingerprints differ)",
                where=collection.source,
                cure="Save it with the collection that it was made for",
            )


def _write_table(table: TextTable, folder: Path, name: str) -> str:
    """Writes the shards of a table; returns the pattern that finds them."""
    files = max(1, -(-len(table) // (_BLOCKS_PER_FILE * BLOCK_ROWS)))
    blocks = table.blocks()
    for number in range(files):
        path = folder / name / f"{name}-{number:05d}-of-{files:05d}.parquet"
        write_parquet(path, table.arrow_schema, islice(blocks, _BLOCKS_PER_FILE))
    return f"{name}/*.parquet"


def _qrels_tables(qrels: Qrels, collection: Collection) -> Iterator[pa.Table]:
    for start in range(0, len(qrels), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        yield pa.Table.from_arrays(
            [
                collection.queries.ids.take(qrels.query[part]),
                collection.corpus.ids.take(qrels.document[part]),
                pa.array(qrels.relevance[part]),
            ],
            schema=schema.QRELS_SCHEMA,
        )


def write_parquet(path: Path, arrow_schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, arrow_schema) as writer:
        for table in tables:
            writer.write_table(table)


def _description(collection: Collection) -> str:
    lines = [
        f"# {collection.name}",
        "",
        f"A search task of {len(collection.queries):,} queries and {len(collection.corpus):,} passages.",
        "",
        "| split | judgements | queries with a relevant passage |",
        "|---|---|---|",
    ]
    for split, qrels in collection.qrels.items():
        lines.append(f"| {split} | {len(qrels):,} | {len(qrels.query_positions()):,} |")
    origin = collection.source + (f" at revision `{collection.revision}`" if collection.revision else "")
    return "\n".join([*lines, "", f"Made from {origin}.", ""])
