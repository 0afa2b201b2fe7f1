"""Row sets for others: with the texts that they name, in the form that sentence-transformers and PyLate train on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import InputError
from ..files import read_json, write_json
from . import schema
from .arrow import BLOCK_ROWS, ContentHash
from .cards import config_entry
from .export import write_parquet
from .lists import list_offsets
from .rows import RowSet


# The configs beside the full row set. `documents` holds rendered passages, so it is no `corpus` with titles.
TRAIN, DOCUMENTS = "train", "documents"
RESERVED = (TRAIN, DOCUMENTS, schema.QUERIES, schema.CORPUS, schema.QRELS, "default")

_DOCUMENTS_SCHEMA = pa.schema([(schema.DOCUMENT_ID, pa.string()), (schema.TEXT, pa.string())])
_DOCUMENTS_PER_FILE = 1_000_000
# Of the queries with a positive, so many may have fewer negatives than the equal rows have.
_SHORT_SHARE = 0.1
_BINS = 20


def negatives_for_all(rows: RowSet) -> int:
    """How many negatives the equal rows get: as many as at least nine tenths of the labelled rows have."""
    counts = (rows.lengths - rows.num_positives)[rows.num_positives > 0]
    counts = counts[counts > 0]
    if not len(counts):
        raise InputError(
            "no row has both a positive and a negative, so there are none to train on elsewhere",
            where="rows",
            cure="Push rows that were mined for labelled queries",
        )
    return max(1, int(np.quantile(counts, _SHORT_SHARE, method="lower")))


def equal_rows(rows: RowSet, num_negatives: int) -> Iterator[pa.Table]:
    """Rows of one positive and `num_negatives` negatives each, as Arrow tables of the stored form.

    A row with several positives becomes several rows; one with fewer negatives, or without a positive, is left out.
    The negatives are the row's first ones. The scores of the primary teacher come along where there are any.
    """
    scored = schema.SCORES in rows.columns
    for block in rows.blocks():
        documents = block.column(schema.DOCUMENTS).combine_chunks()
        offsets = list_offsets(documents)
        positives = block.column(schema.NUM_POSITIVES).to_numpy()
        wanted = (positives > 0) & (np.diff(offsets) - positives >= num_negatives)
        row = np.repeat(np.flatnonzero(wanted), positives[wanted])
        if not len(row):
            continue
        which = np.arange(len(row)) - np.repeat(np.cumsum(positives[wanted]) - positives[wanted], positives[wanted])
        negatives = (offsets[row] + positives[row])[:, None] + np.arange(num_negatives)
        places = np.concatenate([(offsets[row] + which)[:, None], negatives], axis=1).ravel()
        flat = documents.flatten().to_numpy(zero_copy_only=False)
        ends = pa.array(np.arange(len(row) + 1) * (1 + num_negatives), pa.int32())
        columns = {
            schema.QUERY_ID: rows.queries.ids.take(block.column(schema.QUERY).to_numpy()[row]),
            schema.DOCUMENT_IDS: pa.ListArray.from_arrays(ends, rows.corpus.ids.take(flat[places])),
        }
        if scored:
            scores = block.column(schema.SCORES).combine_chunks().flatten().to_numpy(zero_copy_only=False)
            columns[schema.SCORES] = pa.ListArray.from_arrays(ends, pa.array(scores[places], pa.float32()))
        yield pa.table(columns)


def share_rows(
    rows: RowSet, folder: Path, name: str, *, num_negatives: int | None = None, template: str | None = None
) -> dict[str, Any]:
    """Writes a row set with its texts, as a data repository has them.

    The configs are `train` (the default one: `query_id`, `document_ids` with exactly one positive first and equally
    many documents in each row, `scores`), `queries` (`query_id`, `text`) and `documents` (`document_id`, `text`: the
    rendered passage), and under `name` the full row set with everything that is known of each document. Only queries
    and documents that the rows name are written. The same rows give the same bytes.

    Args:
        rows: The row set.
        folder: An empty folder.
        name: Of the full row set.
        num_negatives: Of the equal rows; see [`negatives_for_all`].
        template: How title and text of a passage become one string.

    Returns:
        `configs` for the card, and the counts `rows`, `equal_rows`, `left_out` (rows that are not among the equal
        ones), `num_negatives`, `queries`, `documents`.

    Raises:
        InputError: If the name is taken, or no row has so many negatives.
    """
    if name in RESERVED:
        raise InputError(f"{name!r} is no name for a row set here", where="--name", cure="Choose any other")
    width = num_negatives or negatives_for_all(rows)
    negatives = rows.lengths - rows.num_positives
    usable = (rows.num_positives > 0) & (negatives >= width)
    if not usable.any():
        raise InputError(
            f"no row has a positive and {width} negatives (the most are {int(negatives.max(initial=0))})",
            where="--num_negatives",
            cure="Ask for fewer",
        )
    rows.save(folder / name)
    columns = [(schema.QUERY_ID, pa.string()), (schema.DOCUMENT_IDS, pa.list_(pa.string()))]
    if schema.SCORES in rows.columns:
        columns.append((schema.SCORES, pa.list_(pa.float32())))
    write_parquet(folder / TRAIN / "train.parquet", pa.schema(columns), equal_rows(rows, width))
    queries, documents = np.unique(rows.query), _used_documents(rows)
    hashes = {"queries": ContentHash(schema.QUERIES_SCHEMA.names), "corpus": ContentHash(schema.CORPUS_SCHEMA.names)}
    write_parquet(
        folder / schema.QUERIES / "queries.parquet", schema.QUERIES_SCHEMA, _queries(rows, queries, hashes["queries"])
    )
    for number, first in enumerate(range(0, len(documents), _DOCUMENTS_PER_FILE)):
        write_parquet(
            folder / DOCUMENTS / f"documents-{number:05d}.parquet",
            _DOCUMENTS_SCHEMA,
            _rendered(rows, documents[first : first + _DOCUMENTS_PER_FILE], template, hashes["corpus"]),
        )
    known = rows.metadata.get("same_texts", {})
    same = {
        side: sorted({*known.get(side, ()), table.fingerprint, hashes[side].hexdigest()})
        for side, table in (("queries", rows.queries), ("corpus", rows.corpus))
    }
    notes = folder / name / "metadata.json"
    write_json(notes, {**read_json(notes), "same_texts": same})
    configs = [
        {**config_entry(TRAIN, {"train": f"{TRAIN}/*.parquet"}), "default": True},
        config_entry(schema.QUERIES, {"train": f"{schema.QUERIES}/*.parquet"}),
        config_entry(DOCUMENTS, {"train": f"{DOCUMENTS}/*.parquet"}),
        config_entry(name, {"train": f"{name}/*.parquet"}),
    ]
    return {
        "configs": configs,
        "rows": len(rows),
        "equal_rows": int(rows.num_positives[usable].sum()),
        "left_out": int((~usable).sum()),
        "num_negatives": width,
        "queries": len(queries),
        "documents": len(documents),
    }


def margin_histogram(rows: RowSet, column: str) -> dict[str, list]:
    """How far the negatives of each row lie below its lowest positive, by the scores of a column.

    Returns:
        `edges` and `counts` of twenty bins, both empty where no row has a positive and a negative.
    """
    lowest, highest, margins = np.inf, -np.inf, []
    for block in rows.blocks():
        lists = block.column(column).combine_chunks()
        offsets, positives = list_offsets(lists), block.column(schema.NUM_POSITIVES).to_numpy()
        scores = lists.flatten().to_numpy(zero_copy_only=False)
        owner = np.repeat(np.arange(len(positives)), np.diff(offsets))
        is_positive = np.arange(len(scores)) - offsets[owner] < positives[owner]
        reference = np.full(len(positives), np.inf, np.float32)
        np.minimum.at(reference, owner[is_positive], scores[is_positive])
        margin = (reference[owner] - scores)[~is_positive & (positives[owner] > 0)]
        if len(margin):
            lowest, highest = min(lowest, float(margin.min())), max(highest, float(margin.max()))
            margins.append(margin.astype(np.float16 if abs(margin).max() < 1e4 else np.float32))
    if not margins:
        return {"edges": [], "counts": []}
    edges = np.linspace(lowest, highest if highest > lowest else lowest + 1, _BINS + 1)
    counts = sum(np.histogram(np.clip(part.astype(np.float64), edges[0], edges[-1]), edges)[0] for part in margins)
    return {"edges": [round(float(edge), 6) for edge in edges], "counts": np.asarray(counts).tolist()}


def _parts(positions: np.ndarray) -> Iterable[np.ndarray]:
    for start in range(0, len(positions), BLOCK_ROWS):
        yield positions[start : start + BLOCK_ROWS]


def _used_documents(rows: RowSet) -> np.ndarray:
    used = np.zeros(len(rows.corpus), dtype=bool)
    for block in rows.blocks():
        used[block.column(schema.DOCUMENTS).combine_chunks().flatten().to_numpy(zero_copy_only=False)] = True
    return np.flatnonzero(used)


def _queries(rows: RowSet, positions: np.ndarray, content: ContentHash) -> Iterator[pa.Table]:
    for part in _parts(positions):
        columns = {schema.QUERY_ID: rows.queries.ids.take(part), schema.TEXT: rows.queries.texts(part)}
        table = pa.table(columns, schema=schema.QUERIES_SCHEMA)
        content.update(table)
        yield table


def _rendered(rows: RowSet, positions: np.ndarray, template: str | None, content: ContentHash) -> Iterator[pa.Table]:
    """Ids and rendered passages; read again, they are a corpus without titles, and that is what `content` hashes."""
    for part in _parts(positions):
        ids, texts = rows.corpus.ids.take(part), pa.array(rows.corpus.texts(part, template), pa.string())
        content.update(pa.table([ids, pa.array([""] * len(ids), pa.string()), texts], schema=schema.CORPUS_SCHEMA))
        yield pa.table([ids, texts], schema=_DOCUMENTS_SCHEMA)
