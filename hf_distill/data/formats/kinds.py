"""The formats of single files, and what each can be read for."""

from __future__ import annotations

from .. import schema
from . import records, scores, tables
from .source import Kind


CORPUS, QUERIES, QRELS, ROWS = schema.CORPUS, schema.QUERIES, schema.QRELS, "rows"
TITLES, SCORES = "titles", "scores"

# Column sets (texts in every row) are read by `hf_distill.data.columns`, which finds equal texts by their hashes.
COLUMNS = "columns"

KINDS: dict[str, Kind] = {
    CORPUS: Kind(CORPUS, {CORPUS: tables.read_corpus}, unique=True),
    TITLES: Kind(TITLES, {TITLES: tables.read_titles}),
    QUERIES: Kind(QUERIES, {QUERIES: tables.read_queries}),
    QRELS: Kind(QRELS, {QRELS: tables.read_qrels}),
    ROWS: Kind(ROWS, {ROWS: tables.read_rows, QRELS: tables.read_rows_qrels}),
    "tevatron_ids": Kind(
        ROWS, {ROWS: tables.read_rows, QUERIES: records.read_tevatron_queries, QRELS: tables.read_rows_qrels}
    ),
    "negatives": Kind(ROWS, {ROWS: tables.read_negatives}),
    "triples": Kind(ROWS, {ROWS: tables.read_triples, QRELS: tables.read_rows_qrels}),
    "run": Kind(ROWS, {ROWS: tables.read_run}),
    "top1000": Kind(ROWS, {ROWS: tables.read_run, QUERIES: tables.read_run_queries, CORPUS: tables.read_run_corpus}),
    "tevatron": Kind(
        ROWS,
        {
            ROWS: records.read_tevatron_rows,
            QUERIES: records.read_tevatron_queries,
            CORPUS: records.read_tevatron_corpus,
            QRELS: tables.read_rows_qrels,
        },
    ),
    "hard_negatives": Kind(ROWS, {ROWS: tables.read_rows, QRELS: tables.read_rows_qrels}),
    "pickled_negatives": Kind(ROWS, {ROWS: scores.read_pickled_rows}),
    SCORES: Kind(SCORES, {SCORES: scores.read_scores_rows, ROWS: scores.read_scores_rows}),
}
