"""Names and types of the columns in which collections and row sets are stored.

A folder or Hub repository holds the configs `queries`, `corpus` and `qrels` and any number of row sets:

| config | columns |
|---|---|
| `queries` | `query_id`, `text` |
| `corpus` | `document_id`, `title`, `text` |
| `qrels` | `query_id`, `document_id`, `relevance` |
| row set | `query_id`, `document_ids` (positives first), `num_positives`, and any of the lists below |

The lists of a row set have one entry for each document: `sources`, `ranks`, `scores` (the primary teacher's),
`retriever_scores`, `scores_<teacher>`, `layer_scores_<teacher>`.

Identifiers are strings in files and messages. In memory a row holds positions in the queries and the corpus.
"""

from __future__ import annotations

import pyarrow as pa


QUERIES = "queries"
CORPUS = "corpus"
QRELS = "qrels"

QUERY_ID = "query_id"
DOCUMENT_ID = "document_id"
TITLE = "title"
TEXT = "text"
RELEVANCE = "relevance"

DOCUMENT_IDS = "document_ids"
NUM_POSITIVES = "num_positives"
SOURCES = "sources"
RANKS = "ranks"
SCORES = "scores"
RETRIEVER_SCORES = "retriever_scores"
SCORES_PREFIX = "scores_"
LAYER_SCORES_PREFIX = "layer_scores_"

# In a row set's metadata: names for several sources together, `{name: [source, ...]}`.
SOURCE_GROUPS = "source_groups"

# In memory, where positions stand for the identifiers.
QUERY = "query"
DOCUMENTS = "documents"

# Under which names others keep the configs; the first one is ours.
CORPUS_CONFIGS = (CORPUS, "documents", "docs")
QUERIES_CONFIGS = (QUERIES, "query")
QRELS_CONFIGS = (QRELS, "default")

# Under which names other formats keep the same thing (BEIR, MTEB, Tevatron, plain files); the first one is ours.
QUERY_ID_NAMES = (QUERY_ID, "_id", "query-id", "qid", "id")
DOCUMENT_ID_NAMES = (DOCUMENT_ID, "_id", "corpus-id", "docid", "doc_id", "passage_id", "pid", "id")
QUERY_TEXT_NAMES = (TEXT, "query", "query_text", "question")
DOCUMENT_TEXT_NAMES = (TEXT, "document_text", "contents", "passage", "document", "body")
QRELS_QUERY_NAMES = (QUERY_ID, "query-id", "qid")
QRELS_DOCUMENT_NAMES = (DOCUMENT_ID, "corpus-id", "docid", "doc_id", "pid")
RELEVANCE_NAMES = (RELEVANCE, "score", "label")

QUERIES_SCHEMA = pa.schema([(QUERY_ID, pa.string()), (TEXT, pa.string())])
CORPUS_SCHEMA = pa.schema([(DOCUMENT_ID, pa.string()), (TITLE, pa.string()), (TEXT, pa.string())])
QRELS_SCHEMA = pa.schema([(QUERY_ID, pa.string()), (DOCUMENT_ID, pa.string()), (RELEVANCE, pa.int64())])


def is_score_column(name: str) -> bool:
    """True for `scores`, `retriever_scores` and `scores_<teacher>`: one float per document."""
    return name in (SCORES, RETRIEVER_SCORES) or (name.startswith(SCORES_PREFIX) and len(name) > len(SCORES_PREFIX))


def is_layer_column(name: str) -> bool:
    """True for `layer_scores_<teacher>`: one float per document and layer."""
    return name.startswith(LAYER_SCORES_PREFIX) and len(name) > len(LAYER_SCORES_PREFIX)


def per_document_type(name: str) -> pa.DataType | None:
    """The Arrow type of one document's entry in column `name`, or `None` when a row set has no such column."""
    if name == SOURCES:
        return pa.string()
    if name == RANKS:
        return pa.int32()
    if is_score_column(name):
        return pa.float32()
    if is_layer_column(name):
        return pa.list_(pa.float32())
    return None


def rows_schema(columns: list[str], *, positions: bool) -> pa.Schema:
    """The schema of a row set.

    Args:
        columns: The per-document columns it has, for example `["sources", "scores"]`.
        positions: `True` for the form in memory (`query`, `documents`), `False` for the stored one (`query_id`,
            `document_ids`).
    """
    if positions:
        fields = [(QUERY, pa.int64()), (DOCUMENTS, pa.list_(pa.int64()))]
    else:
        fields = [(QUERY_ID, pa.string()), (DOCUMENT_IDS, pa.list_(pa.string()))]
    fields.append((NUM_POSITIVES, pa.int64()))
    fields += [(name, pa.list_(per_document_type(name))) for name in columns]
    return pa.schema(fields)
