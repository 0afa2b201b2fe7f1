"""Scores that were moved away from their documents are noticed; rows that were cut or shuffled whole are not."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from hf_distill.data import RowSet, load_collection
from hf_distill.data.examples import EXAMPLES, moved_example
from hf_distill.errors import InputError
from hf_distill.teachers import CachedScores


@pytest.fixture(scope="module")
def rows(micro, tmp_path_factory) -> RowSet:
    """Rows of six documents with scores and layers' scores, all different."""
    collection = load_collection(micro, cache_dir=tmp_path_factory.mktemp("cache"))
    generator = np.random.default_rng(0)
    queries = collection.qrels["train"].query_positions()
    documents = [generator.choice(len(collection.corpus), 6, replace=False) for _ in queries]
    rows = RowSet.from_arrays(collection.queries, collection.corpus, queries, documents, np.ones(len(queries), int))
    rows = rows.with_column("scores", generator.normal(size=6 * len(rows)), model="m")
    layers = generator.normal(size=(len(rows), 6, 3)).astype(np.float32)
    return rows.with_column("layer_scores_teacher", [list(one) for one in layers], model="m", layers=[1, 2, 3])


def reordered(rows: RowSet, order: list[int], columns: tuple[str, ...]) -> RowSet:
    """The rows with documents, and these columns, in another order."""
    values = {
        name: [rows.values_at(name, row)[order if name in columns else slice(None)] for row in range(len(rows))]
        for name in rows.columns
    }
    documents = [rows.documents_at(row)[order] for row in range(len(rows))]
    values["layer_scores_teacher"] = [list(one) for one in values["layer_scores_teacher"]]
    return RowSet.from_arrays(
        rows.queries, rows.corpus, rows.query, documents, rows.num_positives, metadata=rows.metadata, **values
    )


def test_whole_rows_may_be_cut_and_shuffled(rows, tmp_path):
    both = tuple(rows.columns)
    generator = np.random.default_rng(1)
    stored = RowSet.load(rows.save(tmp_path / "rows"), rows.queries, rows.corpus)
    some = rows.select(generator.permutation(len(rows))[:5])
    for same in (rows, stored, some, reordered(rows, [5, 0, 1, 2, 3, 4], both), reordered(rows, [1, 3], both)):
        assert all(moved_example(same, column) is None for column in both)
    assert len(rows.metadata[EXAMPLES]["scores"]) >= 16


@pytest.mark.parametrize("column", ["scores", "layer_scores_teacher"])
def test_documents_in_another_order_than_their_scores(rows, column):
    (other,) = set(rows.columns) - {column}
    moved = reordered(rows, [0, 2, 1, 3, 5, 4], (other,))
    assert moved_example(moved, other) is None
    query, document, score = moved_example(moved, column)
    place = rows.corpus.ids_at(rows.documents_at(0)).index(document)
    assert rows.queries.ids_at(rows.query[:1]) == [query]
    assert np.float32(score) == np.atleast_2d(rows.values_at(column, 0).T)[-1][place]
    with pytest.raises(InputError, match=f"'{column}' do not stand in the order of .* document.*Score the rows again"):
        CachedScores.from_rows("teacher", moved, "scores", "layer_scores_teacher")


def test_a_program_that_reorders_the_stored_documents(rows, tmp_path):
    (file,) = rows.save(tmp_path / "rows").glob("*.parquet")
    table = pq.read_table(file)
    documents = [one[::-1] for one in table.column("document_ids").to_pylist()]
    place = table.column_names.index("document_ids")
    pq.write_table(table.set_column(place, table.schema.field(place), [documents]), file)
    again = RowSet.load(tmp_path / "rows", rows.queries, rows.corpus)
    with pytest.raises(InputError, match="do not stand in the order of the rows' documents"):
        CachedScores.from_rows("teacher", again, "scores")


def test_replaced_columns_forget_where_they_came_from(rows):
    other = rows.with_column("scores", np.zeros(int(rows.lengths.sum())))
    assert "scores" not in other.metadata["teachers"] and "scores" not in other.metadata[EXAMPLES]
    assert "layer_scores_teacher" in other.metadata["teachers"]
    assert CachedScores.from_rows("teacher", other, "scores").origin == {}
