"""sentence-transformers' column sets: rows that hold texts become queries, a corpus and rows of positions.

Read are `(anchor, positive)`, `(anchor, positive, negative)`, `(anchor, positive, negative_1 … negative_N)`, labelled
pairs and `(query, docs, labels)`, each also with teacher scores in `label`, `labels`, `score` or `scores`. Equal texts
become one query or one passage; memory is 16 bytes for each text of each row, whatever the texts' lengths.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..console import get_logger
from ..errors import InputError
from . import schema
from .arrow import BLOCK_ROWS
from .collection import Collection
from .hashed_rows import ColumnLayout, HashedRows, Ragged, digest, distinct, read_hashes, text_blocks
from .lists import list_offsets
from .qrels import Qrels
from .readers import Block, file_kind, read_blocks
from .rows import RowSet
from .sources import open_source
from .tables import Corpus, Queries


logger = get_logger(__name__)

_LABELS = ("label", "labels")
_SCORES = ("score", "scores")
_QUERY_NAMES = ("anchor", "query", "question", "sentence1")
_POSITIVE_NAMES = ("positive", "positives", "pos")
_NEGATIVE = re.compile(r"^negative(_\d+)?$")

# Query, documents, number of positives, scores.
Row = tuple[int, np.ndarray, int, np.ndarray | None]


def rows_from_columns(
    source: Any,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    columns: Sequence[str] | None = None,
    name: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> tuple[Collection, RowSet]:
    """Reads a data set whose columns are texts, as sentence-transformers trains on them.

    Columns are known by name (`anchor` or `query`; `positive`; `negative`, `negative_1` …) and otherwise by order, as
    in sentence-transformers: query, positive, negatives. A numeric column is read as follows:

    - pairs with 0 and 1: the relevance; the pairs of a query become one row, positives first;
    - pairs with other numbers: the teacher's score of an unlabelled row of one document;
    - one number beside a triplet, or one less than there are documents: margins (positive minus negative), kept as
      scores with the positive at 0, which is the same to every loss that looks at differences;
    - as many numbers as documents: the teacher's `scores`, but with `docs` whole numbers are relevance grades.

    Args:
        source: A `datasets.Dataset` or `DatasetDict`, a file (`.jsonl`, `.csv`, `.tsv`, `.parquet`), a folder, a
            Hub id, or a function that reads blocks from the start at every call.
        split: The split of a `DatasetDict`, folder or repository; also the name of the judgements' split.
        config: The config of a folder or repository, where it has several.
        revision: Branch, tag or commit on the Hub.
        columns: The text columns in order (query, positive, negatives), where names and order do not tell.
        name: The collection's name.
        cache_dir: Instead of the default cache folder.

    Returns:
        The collection (queries `q0`, `q1` …, documents `d0`, `d1` …, judgements from the positives) and its rows.

    Raises:
        InputError: Columns that do not fit, empty queries or positives, numbers of the wrong count.
    """
    blocks, where = _open(source, split, config, revision, cache_dir)
    layout = _layout(next(blocks(), Block({}, where, 1, "row")), columns)
    logger.info("%s: query %r, documents %s", where, layout.query, ", ".join(map(repr, layout.documents)))
    read = read_hashes(blocks(), layout, where)
    query, first_query = distinct(read.queries)
    document, first_document = distinct(read.documents)
    queries, corpus = (
        kind.from_blocks(
            text_blocks(blocks, layout, first, queries=kind is Queries),
            ["columns", hashlib.sha256(hashes[first].tobytes()).hexdigest()],
            where=where,
            cache_dir=cache_dir,
        )
        for kind, hashes, first in ((Queries, read.queries, first_query), (Corpus, read.documents, first_document))
    )
    key = ["columns", digest(read, query, document, read.offsets), asdict(layout)]
    metadata = {"made_by": "columns", "source": where, "split": split, "columns_read": asdict(layout)}
    batches = _batches(_rows(read, layout, query, document))
    rows = RowSet.from_batches(queries, corpus, batches, key, metadata=metadata, cache_dir=cache_dir)
    collection = Collection(
        name=name or re.sub(r"\W+", "_", Path(where).name.split(".")[0]),
        queries=queries,
        corpus=corpus,
        qrels=_qrels(rows, split),
        source=where,
        revision=revision,
    )
    return collection, rows


def _open(source, split: str, config: str | None, revision: str | None, cache_dir):
    """A function that reads the blocks, from the start at every call, and the name for messages."""
    if callable(source):
        return source, next((block.where for block in source()), "blocks")
    if isinstance(source, dict):
        if split not in source:
            raise InputError(f"no split {split!r}", where="data set", cure=f"Its splits are: {', '.join(source)}")
        source = source[split]
    if hasattr(source, "with_format"):
        return lambda: _dataset_blocks(source), "data set"
    if Path(source).is_file():
        if file_kind(source) is None:
            next(read_blocks(source))
        return lambda: read_blocks(source), str(source)
    opened = open_source(source, revision, cache_dir)
    configs = opened.configs()
    if config is None:
        config = next(
            (name for name in ("default", split) if name in configs), configs[0] if len(configs) == 1 else None
        )
    if config not in configs:
        raise InputError(
            f"no config {config!r}" if config else "several configs",
            where=opened.where,
            cure=f"Name one with config=…: {', '.join(configs) or 'there is none'}",
        )
    splits = opened.splits(config)
    if split not in splits and len(splits) > 1:
        raise InputError(
            f"no split {split!r}", where=opened.place(config), cure=f"Its splits are: {', '.join(splits)}"
        )
    chosen = split if split in splits else splits[0]
    return lambda: opened.blocks(config, chosen), opened.place(config, chosen)


def _dataset_blocks(dataset) -> Iterator[Block]:
    first = 1
    for table in dataset.with_format("arrow").iter(batch_size=BLOCK_ROWS):
        yield Block({name: table.column(name) for name in table.column_names}, "data set", first, "row")
        first += table.num_rows


def _layout(block: Block, columns: Sequence[str] | None) -> ColumnLayout:
    names = list(block.columns)
    labels = next((name for name in _LABELS if name in names), None)
    scores = next((name for name in _SCORES if name in names), None)
    kinds = {name: _kind(block.columns[name]) for name in names if name not in (labels, scores)}
    if columns is not None:
        missing = [name for name in columns if name not in names]
        if missing:
            raise InputError(
                f"no column {missing[0]!r}", where=block.where, cure=f"Its columns are: {', '.join(names)}"
            )
        inputs = list(columns)
    else:
        inputs = [name for name, kind in kinds.items() if kind and not re.search(r"_(id|ids|idx)$", name)]
        query = next((name for name in _QUERY_NAMES if name in inputs), None)
        positive = next((name for name in _POSITIVE_NAMES if name in inputs), None)
        if query and positive:
            inputs = [query, positive, *(name for name in names if _NEGATIVE.match(name))]
    if len(inputs) < 2 or kinds.get(inputs[0]) == "list":
        raise InputError(
            f"no query column and document column among: {', '.join(names) or 'no columns'}",
            where=block.where,
            cure="Name them anchor, positive and negative (or negative_1, negative_2 …), or query, docs and labels, "
            "or give their names in order with columns=[…]",
        )
    listwise = kinds.get(inputs[1]) == "list"
    if listwise and len(inputs) > 2:
        raise InputError(
            f"a list column {inputs[1]!r} beside others: {', '.join(inputs[2:])}",
            where=block.where,
            cure="With a list of documents there is one query column and one list; choose them with columns=[…]",
        )
    return ColumnLayout(inputs[0], inputs[1:], listwise, labels, scores)


def _kind(values: Any) -> str | None:
    """`"text"`, `"list"` (of texts) or `None` for a column of a block."""
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            return "text"
        values = values.slice(0, 64).to_pylist()
    first = next((value for value in values if value is not None), None)
    if isinstance(first, str):
        return "text"
    return "list" if isinstance(first, list) and (not first or isinstance(first[0], str)) else None


def _rows(read: HashedRows, layout: ColumnLayout, query: np.ndarray, document: np.ndarray) -> Iterator[Row]:
    """Every row as query, documents, number of positives and scores."""
    labels, scores = read.labels, read.scores
    if labels is None or scores is None:
        # One numeric column only: its values tell whether it judges or scores.
        numbers = labels or scores
        labels, scores = (numbers, None) if numbers and _judges(numbers, layout) else (None, numbers)
    if labels is not None and scores is None and not layout.listwise and len(layout.documents) == 1:
        yield from _grouped(query, document, labels.values > 0)
        return
    for row in range(len(read)):
        documents = document[read.offsets[row] : read.offsets[row + 1]]
        values = None if scores is None else _scores(scores[row], len(documents), read.place(row))
        order = np.arange(len(documents))
        if labels is not None:
            grades = labels[row]
            if len(grades) != len(documents):
                raise InputError(
                    f"{len(grades)} labels for {len(documents)} documents",
                    where=f"{read.place(row)}, field {layout.labels!r}",
                    cure="Give every document one label",
                )
            order = np.argsort(-grades, kind="stable")
            positives = int((grades > 0).sum())
        else:
            # Scores alone do not say which document answers the query; columns named positive and negative do.
            positives = 0 if values is not None and (layout.listwise or len(documents) == 1) else 1
        # A document that is listed twice stays where it comes first, which is among the positives if it is one.
        first = np.sort(np.unique(documents[order], return_index=True)[1])
        order = order[first]
        chosen = None if values is None else values[order].astype(np.float32)
        yield int(query[row]), documents[order], int((first < positives).sum()), chosen


def _judges(numbers: Ragged, layout: ColumnLayout) -> bool:
    """Whether numbers are relevance grades: 0 and 1, or beside lists of documents any whole numbers from 0."""
    if not layout.listwise and len(layout.documents) > 1:
        return False
    values = numbers.values
    if layout.listwise:
        return bool(((values >= 0) & (values == np.floor(values))).all())
    return bool(np.isin(values, (0, 1)).all())


def _scores(numbers: np.ndarray, count: int, place: str) -> np.ndarray:
    if len(numbers) == count:
        return numbers
    if len(numbers) == count - 1:
        return np.concatenate([[0.0], -numbers])
    raise InputError(
        f"{len(numbers)} numbers for {count} documents",
        where=place,
        cure="Give one score for each document (positive first), or one margin for each negative",
    )


def _grouped(query: np.ndarray, document: np.ndarray, relevant: np.ndarray) -> Iterator[Row]:
    """Labelled pairs as one row for each query: its positives, then its other documents, each in order."""
    order = np.lexsort((np.arange(len(query)), ~relevant, query))
    for group in np.split(order, np.flatnonzero(np.diff(query[order])) + 1):
        first = group[np.sort(np.unique(document[group], return_index=True)[1])]
        yield int(query[group[0]]), document[first], int(relevant[first].sum()), None


def _batches(rows: Iterator[Row]) -> Iterator[dict[str, Any]]:
    while part := list(islice(rows, BLOCK_ROWS)):
        batch = {
            name: [row[number] for row in part] for number, name in enumerate(("query", "documents", "num_positives"))
        }
        yield batch if part[0][3] is None else {**batch, schema.SCORES: [row[3] for row in part]}


def _qrels(rows: RowSet, split: str) -> dict[str, Qrels]:
    pairs = []
    for table in rows.blocks():
        documents = table.column(schema.DOCUMENTS).combine_chunks()
        offsets, positives = list_offsets(documents), table.column(schema.NUM_POSITIVES).to_numpy()
        row = np.repeat(np.arange(len(positives)), np.diff(offsets))
        head = np.arange(len(row)) - offsets[row] < positives[row]
        query = table.column(schema.QUERY).to_numpy()[row[head]]
        pairs.append(np.stack([query, documents.flatten().to_numpy()[head]], axis=1))
    pairs = np.unique(np.concatenate(pairs), axis=0)
    return {split: Qrels(pairs[:, 0], pairs[:, 1], np.ones(len(pairs), np.int64))} if len(pairs) else {}
