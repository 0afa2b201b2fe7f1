"""Row sets: made, checked, stored as ids, read back as positions."""

from __future__ import annotations

import json
import logging
import pickle
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.data import rows as rows_module
from hf_distill.data import rows_io
from hf_distill.data.collection import load_collection
from hf_distill.data.lists import list_column
from hf_distill.data.rows import RowSet
from hf_distill.data.tables import Corpus, Queries
from hf_distill.errors import InputError


IDS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\t\n\v\f\r\0"), min_size=1, max_size=5)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.fixture()
def queries() -> Queries:
    return Queries.from_records([{"_id": f"q{n}", "text": f"query {n}"} for n in range(4)])


@pytest.fixture()
def corpus() -> Corpus:
    return Corpus.from_records([{"_id": f"d{n}", "text": f"document {n}"} for n in range(10)])


@pytest.fixture()
def rows(queries, corpus) -> RowSet:
    """Three rows: two positives, one positive, unlabelled."""
    return RowSet.from_arrays(
        queries,
        corpus,
        [2, 0, 1],
        [[4, 1, 9], [0, 3], [5]],
        [2, 1, 0],
        sources=[["qrels", "qrels", "bm25"], ["qrels", "dense"], ["dense"]],
        ranks=[[0, 0, 7], [0, 2], [1]],
        scores=[[3.5, 2.0, -1.0], [1.0, 0.5], [0.25]],
        metadata={"retriever": "bm25"},
    )


def test_what_a_row_set_shows(rows, queries, corpus):
    assert len(rows) == 3
    assert rows.query.tolist() == [2, 0, 1] and rows.num_positives.tolist() == [2, 1, 0]
    assert rows.lengths.tolist() == [3, 2, 1]
    assert rows.columns == ["sources", "ranks", "scores"] and rows.score_columns == ["scores"]
    assert rows.documents_at(0).tolist() == [4, 1, 9] and rows.documents_at(0).dtype == np.int64
    assert rows.values_at("scores", 1).tolist() == [1.0, 0.5] and rows.values_at("scores", 1).dtype == np.float32
    assert rows.values_at("sources", 0).tolist() == ["qrels", "qrels", "bm25"]
    assert rows.metadata["corpus_fingerprint"] == corpus.fingerprint
    assert rows.metadata["queries_fingerprint"] == queries.fingerprint
    with pytest.raises(IndexError):
        rows.documents_at(3)
    with pytest.raises(InputError, match="no column 'scores_x'.*sources, ranks, scores"):
        rows.values_at("scores_x", 0)


def test_selection(rows):
    part = rows.select([2, 0])
    assert part.dataset[:] == {name: [values[2], values[0]] for name, values in rows.dataset[:].items()}
    assert part.fingerprint != rows.fingerprint == rows.select([0, 1, 2]).fingerprint
    shuffled = RowSet(rows.dataset.select([1, 2]), rows.queries, rows.corpus)
    assert shuffled.documents_at(0).tolist() == [0, 3] and shuffled.query.tolist() == [0, 1]


@pytest.mark.parametrize(
    "values",
    [
        [[1, 2, 3], [4, 5], [6]],
        [np.array([1.0, 2, 3]), np.array([4, 5]), np.array([6])],
        np.arange(1, 7, dtype=np.float64),
        pa.array([[1, 2, 3], [4, 5], [6]]),
    ],
    ids=["lists", "arrays", "flat", "arrow"],
)
def test_column_from_every_form(rows, values):
    scored = rows.with_column("scores_big", values, model="big", revision="abc")
    assert scored.dataset["scores_big"][:] == [[1, 2, 3], [4, 5], [6]]
    assert scored.dataset["documents"][:] == rows.dataset["documents"][:]
    assert scored.score_columns == ["scores", "scores_big"] and rows.score_columns == ["scores"]
    assert scored.metadata["teachers"] == {"scores_big": {"model": "big", "revision": "abc"}}
    again = scored.with_column("scores_big", [[0.0] * 3, [0.0] * 2, [0.0]])
    assert again.values_at("scores_big", 0).tolist() == [0, 0, 0]
    assert again.fingerprint != scored.fingerprint != rows.fingerprint


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("scores", [[1, 2], [4, 5], [6]], r"row 0.*field 'scores': 2 entries for 3 documents"),
        ("scores", [[1, 2, 3], [4, 5]], r"2 rows where the set has 3"),
        ("scores", np.arange(5.0), r"5 values for 6 documents"),
        ("scores", [[1, 2, 3], [4, np.nan], [6]], r"row 1.*field 'scores': the score of document 2 is nan"),
        ("scores_x", [[1, 2, np.inf], [4, 5], [6]], r"row 0.*field 'scores_x': the score of document 3 is inf"),
        ("scores", [[1, 2, 3], None, [6]], r"row 1.*field 'scores': no list"),
        ("scores", [["a", "b", "c"], ["d", "e"], ["f"]], r"column 'scores'"),
        ("logits", [[1, 2, 3], [4, 5], [6]], r"no column 'logits'.*scores_<teacher>"),
        ("sources", [["a", "b", None], ["d", "e"], ["f"]], r"row 0.*field 'sources': an entry is missing"),
    ],
)
def test_bad_columns(rows, name, values, message):
    with pytest.raises(InputError, match=message):
        rows.with_column(name, values)


@pytest.mark.parametrize(
    ("documents", "num_positives", "message"),
    [
        ([[1], [2, 3]], [1, 3], r"row 1.*'num_positives': 3 positives where the row has 2 documents"),
        ([[1], [2]], [1, -1], r"row 1.*'num_positives': -1 positives"),
        ([[1], []], [1, 0], r"row 1.*'document_ids': the row has no documents"),
        ([[1], [2, 3, 2]], [1, 1], r"row 1.*documents 1 and 3 of the row are the same.*positive must not be among"),
        ([[1]], [1, 1], r"columns of different lengths"),
    ],
)
def test_bad_rows(queries, corpus, documents, num_positives, message):
    with pytest.raises(InputError, match=message):
        RowSet.from_arrays(queries, corpus, [0, 1], documents, num_positives)


def test_positions_outside_of_the_tables(queries, corpus):
    with pytest.raises(IndexError, match="documents"):
        RowSet.from_arrays(queries, corpus, [0], [[10]], [1])
    with pytest.raises(IndexError, match="query"):
        RowSet.from_arrays(queries, corpus, [-1], [[1]], [1])


def test_blocks_do_not_change_a_row_set(queries, corpus, monkeypatch):
    documents = np.array([[n % 10, (n + 3) % 10] for n in range(25)])
    whole = RowSet.from_arrays(queries, corpus, np.arange(25) % 4, documents, np.ones(25), scores=documents / 2)
    for module in (rows_module, rows_io):
        monkeypatch.setattr(module, "BLOCK_ROWS", 4)
    monkeypatch.setattr("hf_distill.data.lists.BLOCK_ROWS", 4)
    cut = RowSet.from_arrays(queries, corpus, np.arange(25) % 4, documents, np.ones(25), scores=documents / 2)
    assert cut.table.column("documents").num_chunks == 7
    assert cut.fingerprint == whole.fingerprint and cut.dataset[:] == whole.dataset[:]
    for row in range(25):
        assert cut.documents_at(row).tolist() == documents[row].tolist()
        assert cut.select([row]).values_at("scores", 0).tolist() == (documents[row] / 2).tolist()
    bad = [[1.0, 2.0]] * 13 + [[1.0]] + [[1.0, 2.0]] * 11
    with pytest.raises(InputError, match=r"row 13 \(from 0\), field 'ranks': 1 entries"):
        cut.with_column("ranks", bad)


def test_rows_from_judgements(micro):
    collection = load_collection(micro)
    rows = RowSet.from_qrels(collection, "test")
    qrels = collection.qrels["test"].as_dict(collection.queries, collection.corpus)
    seen = {}
    for row in range(len(rows)):
        query = collection.queries.ids[int(rows.query[row])]
        documents = collection.corpus.ids_at(rows.documents_at(row))
        grades = [qrels[query][name] for name in documents]
        assert grades == sorted(grades, reverse=True) and min(grades) >= 1
        assert rows.num_positives[row] == len(documents)
        seen[query] = set(documents)
    assert seen == {query: {d for d, g in judged.items() if g >= 1} for query, judged in qrels.items() if any(judged)}
    with pytest.raises(InputError, match="no document of split 'test' has grade 9"):
        RowSet.from_qrels(collection, "test", threshold=9)


# -- on disk ----------------------------------------------------------------------------------------------------


def test_stored_form(rows, tmp_path):
    folder = rows.save(tmp_path / "mined")
    stored = pq.read_table(folder / "train-00000-of-00001.parquet")
    assert stored.to_pylist()[0] == {
        "query_id": "q2",
        "document_ids": ["d4", "d1", "d9"],
        "num_positives": 2,
        "sources": ["qrels", "qrels", "bm25"],
        "ranks": [0, 0, 7],
        "scores": [3.5, 2.0, -1.0],
    }
    assert stored.schema.field("scores").type.value_type == pa.float32()
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["retriever"] == "bm25" and metadata["rows"] == 3
    again = RowSet.load(folder, rows.queries, rows.corpus)
    assert again.fingerprint == rows.fingerprint and again.metadata["retriever"] == "bm25"
    opened = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "hf"))["train"]
    assert opened["document_ids"][1] == ["d0", "d3"]


def test_many_files(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(rows_io, "_DOCUMENTS_PER_FILE", 2)
    folder = rows.save(tmp_path / "mined")
    names = [f"train-{n:05d}-of-00003.parquet" for n in range(3)]
    assert sorted(path.name for path in folder.glob("*.parquet")) == names
    assert RowSet.load(folder, rows.queries, rows.corpus).fingerprint == rows.fingerprint


def test_loaded_rows_are_mapped_and_read_once(rows, tmp_path, monkeypatch):
    folder = rows.save(tmp_path / "mined")
    first = RowSet.load(folder, rows.queries, rows.corpus)
    assert first.dataset.cache_files, "the rows lie in memory"
    monkeypatch.setattr(rows_io.RowReader, "_table", lambda *args: pytest.fail("read again"))
    second = RowSet.load(folder, rows.queries, rows.corpus)
    assert second.dataset[:] == rows.dataset[:]
    scored = second.with_column("scores_b", np.arange(6.0))
    copy = pickle.loads(pickle.dumps(scored))
    assert copy.fingerprint == scored.fingerprint and copy.documents_at(1).tolist() == [0, 3]


def test_rows_larger_than_memory_come_in_batches(queries, corpus, rows):
    calls = []

    def batches():
        for row in range(3):
            calls.append(row)
            part = rows.dataset[row]
            yield {name: [value] for name, value in part.items()}

    made = RowSet.from_batches(queries, corpus, batches(), key="three", metadata={"by": "test"})
    assert made.fingerprint == rows.fingerprint and made.dataset.cache_files and made.metadata["by"] == "test"
    again = RowSet.from_batches(queries, corpus, batches(), key="three")
    assert again.fingerprint == rows.fingerprint and calls == [0, 1, 2]
    with pytest.raises(InputError, match="All rows of a set need the same columns"):
        parts = [{"query": [0], "documents": [[1]], "num_positives": [1]}]
        parts.append({**parts[0], "scores": [[1.0]]})
        RowSet.from_batches(queries, corpus, iter(parts), key="mixed")
    with pytest.raises(InputError, match="no rows in it"):
        RowSet.from_batches(queries, corpus, iter([]), key="none")


def test_saving_replaces_a_row_set_but_nothing_else(rows, tmp_path):
    folder = rows.save(tmp_path / "mined")
    rows.select([0]).save(folder)
    assert len(RowSet.load(folder, rows.queries, rows.corpus)) == 1
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="no row set"):
        rows.save(tmp_path / "home")
    with pytest.raises(InputError, match="no rows to save"):
        rows.select([]).save(tmp_path / "empty")
    assert (tmp_path / "home" / "letter.txt").exists() and not (tmp_path / "empty").exists()


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_round_trip(tmp_path_factory, data):
    query_ids = data.draw(st.lists(IDS, unique=True, min_size=1, max_size=4))
    document_ids = data.draw(st.lists(IDS, unique=True, min_size=1, max_size=8))
    queries = Queries.from_records([{"_id": name, "text": "x"} for name in query_ids])
    corpus = Corpus.from_records([{"_id": name, "text": "y"} for name in document_ids])
    cells = st.lists(st.integers(0, len(document_ids) - 1), unique=True, min_size=1)
    documents = data.draw(st.lists(cells, min_size=1, max_size=6))
    query = [data.draw(st.integers(0, len(query_ids) - 1)) for _ in documents]
    positives = [data.draw(st.integers(0, len(row))) for row in documents]
    columns = {
        "sources": [[data.draw(st.sampled_from(["bm25", "é 月", ""])) for _ in row] for row in documents],
        "scores_a": [[data.draw(FLOATS) for _ in row] for row in documents],
        "layer_scores_a": [[[data.draw(FLOATS)] * 3 for _ in row] for row in documents],
    }
    rows = RowSet.from_arrays(queries, corpus, query, documents, positives, **columns)
    again = RowSet.load(rows.save(tmp_path_factory.mktemp("rows") / "set"), queries, corpus)
    assert again.fingerprint == rows.fingerprint
    assert again.dataset[:] == {
        "query": query,
        "documents": documents,
        "num_positives": positives,
        **columns,
    }


def write_rows(folder, *records) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


GOOD = {"query_id": "q0", "document_ids": ["d1", "d2"], "num_positives": 1, "scores": [2.0, 1.0]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_id": "q9"}, r"line 2, field 'query_id': 'q9' is not among the 4 queries of"),
        ({"query_id": None}, r"line 2, field 'query_id': the identifier is missing"),
        ({"document_ids": ["d1", "d77"]}, r"line 2, field 'document_ids': 'd77' is not among the 10 documents of"),
        ({"document_ids": "['d1', open('x')]"}, r"line 2, field 'document_ids': .* is not a list of values"),
        ({"document_ids": 7}, r"line 2, field 'document_ids': .* is not a list of string"),
        ({"document_ids": ["d1", None]}, r"line 2, field 'document_ids': an entry is missing"),
        ({"document_ids": None}, r"line 2, field 'document_ids': no list"),
        ({"document_ids": ["d1", "d1"]}, r"line 2, field 'document_ids': documents 1 and 2 of the row are the same"),
        ({"num_positives": 3}, r"line 2, field 'num_positives': 3 positives where the row has 2 documents"),
        ({"num_positives": "many"}, r"line 2, field 'num_positives': 'many' is not a whole number"),
        ({"scores": [1.0]}, r"line 2, field 'scores': 1 entries for 2 documents"),
        ({"scores": [1.0, float("nan")]}, r"line 2, field 'scores': the score of document 2 is nan"),
        ({"scores": [1.0, "x"]}, r"line 2, field 'scores': .* is not a list of float"),
        ({"scores": None}, r"line 2, field 'scores': no list"),
    ],
)
def test_bad_files(queries, corpus, tmp_path, changes, message):
    write_rows(tmp_path / "set", GOOD, {**GOOD, **changes})
    with pytest.raises(InputError, match=rf"set/train.jsonl, {message}"):
        RowSet.load(tmp_path / "set", queries, corpus)
    write_rows(tmp_path / "set", GOOD, {**GOOD, "query_id": "q1"})
    assert RowSet.load(tmp_path / "set", queries, corpus).query.tolist() == [0, 1]


def test_folder_without_rows(queries, corpus, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        RowSet.load(tmp_path / "nothing", queries, corpus)
    (tmp_path / "set").mkdir()
    with pytest.raises(InputError, match="set: no file to read"):
        RowSet.load(tmp_path / "set", queries, corpus)
    write_rows(tmp_path / "set")
    with pytest.raises(InputError, match="no rows in it"):
        RowSet.load(tmp_path / "set", queries, corpus)


def test_rows_without_a_count_of_positives_are_unlabelled(queries, corpus, tmp_path, caplog):
    write_rows(tmp_path / "set", {"query_id": "q0", "document_ids": [1, "d2"], "extra": 5})
    corpus = Corpus.from_records([{"_id": name, "text": name} for name in ("1", "d2")])
    with caplog.at_level(logging.WARNING):
        rows = RowSet.load(tmp_path / "set", queries, corpus)
    assert rows.dataset[0] == {"query": 0, "documents": [0, 1], "num_positives": 0}
    assert "no column 'num_positives'" in caplog.text


def test_rows_of_another_corpus(rows, queries, corpus, tmp_path, caplog):
    folder = rows.save(tmp_path / "mined")
    grown = Corpus.from_records([{"_id": f"d{n}", "text": f"document {n}"} for n in range(9, -2, -1)])
    with caplog.at_level(logging.WARNING):
        again = RowSet.load(folder, queries, grown)
    assert "made for other corpus than those of" in caplog.text
    assert grown.ids_at(again.documents_at(0)) == ["d4", "d1", "d9"]
    smaller = Corpus.from_records([{"_id": f"d{n}", "text": f"document {n}"} for n in range(9)])
    with pytest.raises(InputError, match=r"row 1, field 'document_ids': 'd9' .* made for other corpus .*differ"):
        RowSet.load(folder, queries, smaller)
    shutil.rmtree(folder)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(FLOATS, max_size=4), max_size=10))
def test_list_column_from_flat_values(lists):
    lengths = np.array([len(row) for row in lists], dtype=np.int64)
    flat = np.array([value for row in lists for value in row], dtype=np.float32)
    assert list_column(flat, pa.float32(), "x", lengths).to_pylist() == lists
    assert list_column(lists, pa.float32(), "x").to_pylist() == lists


def test_a_negative_may_stand_once_for_each_source(micro):
    collection = load_collection(micro)

    def rows(documents, sources):
        return RowSet.from_arrays(
            collection.queries, collection.corpus, [0, 1], documents, np.array([1, 0]), sources=sources
        )

    kept = rows([[3, 5, 5], [7, 7]], [["positive", "a", "b"], ["b", "a"]])
    assert kept.documents_at(0).tolist() == [3, 5, 5]
    with pytest.raises(InputError, match="documents 1 and 2 of the row are the same"):
        rows([[3, 5, 4], [7, 7]], [["positive", "a", "b"], ["b", "b"]])
    with pytest.raises(InputError, match="documents 1 and 3 of the row are the same"):
        rows([[3, 5, 3], [7, 8]], [["positive", "a", "b"], ["b", "b"]])
    with pytest.raises(InputError, match="documents 2 and 3 of the row are the same"):
        RowSet.from_arrays(collection.queries, collection.corpus, [0], [[3, 5, 5]], [1])
