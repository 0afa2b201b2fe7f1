"""A few scores of a column with the query and the document of each, by which a moved column is noticed.

Scores stand beside a row's documents by their place alone. If another program reorders the documents and not the
scores, lengths and fingerprints are still right, and every score is another document's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from .rows import RowSet

# Where a row set keeps them in its metadata, by column.
EXAMPLES = "examples"
_ROWS, _DOCUMENTS = 16, 8


def examples_of(rows: RowSet, column: str) -> list[list]:
    """Evenly spaced `[query, document, score]` of a column; of layers' scores, the last layer's."""
    examples = []
    for row in _spaced(len(rows), _ROWS):
        documents = rows.documents_at(row)
        places = _spaced(len(documents), _DOCUMENTS)
        query = rows.queries.ids_at(rows.query[row : row + 1])[0]
        names = rows.corpus.ids_at(documents[places])
        scores = _scores(rows, column, row)[places].tolist()
        examples += [[query, document, score] for document, score in zip(names, scores)]
    return examples


def moved_example(rows: RowSet, column: str) -> list | None:
    """The first of a column's examples that the rows have with another score; None if all agree.

    Rows and documents may have been left out, or stand in another order together with their scores.
    """
    examples = rows.metadata.get(EXAMPLES, {}).get(column, [])
    if not examples:
        return None
    queries = rows.queries.positions([query for query, _, _ in examples])
    documents = rows.corpus.positions([document for _, document, _ in examples])
    at = {int(query): np.flatnonzero(rows.query == query) for query in np.unique(queries[queries >= 0])}
    for example, query, document in zip(examples, queries.tolist(), documents.tolist()):
        found = [
            score
            for row in (at[query] if query >= 0 else ())
            for score in _scores(rows, column, row)[rows.documents_at(row) == document].tolist()
        ]
        if found and np.float32(example[2]) not in np.asarray(found, np.float32):
            return example
    return None


def _scores(rows: RowSet, column: str, row: int) -> np.ndarray:
    values = rows.values_at(column, row)
    return values[:, -1] if values.ndim == 2 else values


def _spaced(total: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, total - 1, min(total, most)).round().astype(np.int64))
