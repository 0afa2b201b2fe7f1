"""Column sets as sentence-transformers trains on them: texts become queries, corpus and rows."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.data import columns as columns_module
from hf_distill.data import sources
from hf_distill.data.columns import rows_from_columns
from hf_distill.errors import InputError


TEXTS = st.text("abc\u00e9\U0001f600 ", min_size=1, max_size=3).filter(str.strip)


def read(source=None, **columns):
    """Rows as texts, which do not depend on identifiers: (query, documents, number of positives, scores)."""
    if source is None:
        source = datasets.Dataset.from_dict(columns)
    collection, rows = rows_from_columns(source)
    return texts_of(collection, rows), collection, rows


def texts_of(collection, rows):
    result = []
    for row in range(len(rows)):
        scores = rows.values_at("scores", row).tolist() if "scores" in rows.columns else None
        query = collection.queries.texts([int(rows.query[row])])[0]
        documents = collection.corpus.texts(rows.documents_at(row))
        result.append((query, documents, int(rows.num_positives[row]), scores))
    return result


def test_pairs():
    rows, collection, _ = read(anchor=["a", "b", "a"], positive=["x", "y", "y"])
    assert rows == [("a", ["x"], 1, None), ("b", ["y"], 1, None), ("a", ["y"], 1, None)]
    assert list(collection.queries.ids) == ["q0", "q1"] and collection.queries.texts() == ["a", "b"]
    assert list(collection.corpus.ids) == ["d0", "d1"] and collection.corpus.texts() == ["x", "y"]
    judged = collection.qrels["train"].as_dict(collection.queries, collection.corpus)
    assert judged == {"q0": {"d0": 1, "d1": 1}, "q1": {"d1": 1}}


def test_names_count_more_than_order():
    rows, *_ = read(negative_2=["n2"], positive=["p"], negative_1=["n1"], anchor=["a"], note=["hello"])
    assert rows == [("a", ["p", "n2", "n1"], 1, None)]
    rows, *_ = read(first=["a"], second=["p"], third=["n"], some_id=["7"])
    assert rows == [("a", ["p", "n"], 1, None)]
    source = datasets.Dataset.from_dict({"x": ["p"], "y": ["a"], "z": ["n"]})
    collection, made = rows_from_columns(source, columns=["y", "x"])
    assert texts_of(collection, made) == [("a", ["p"], 1, None)]


def test_a_text_that_is_listed_twice():
    rows, *_ = read(anchor=["a", "b"], positive=["p", "q"], negative_1=["p", "n"], negative_2=["n", "n"])
    assert rows == [("a", ["p", "n"], 1, None), ("b", ["q", "n"], 1, None)]


@pytest.mark.parametrize(
    ("name", "value", "scores"),
    [
        ("scores", [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]),
        ("label", [0.5, 2.5], [0.0, -0.5, -2.5]),
        ("labels", [3, 2, 1], [3.0, 2.0, 1.0]),
    ],
)
def test_teacher_scores_beside_negatives(name, value, scores):
    rows, *_ = read(anchor=["a"], positive=["p"], negative_1=["m"], negative_2=["n"], **{name: [value]})
    assert rows == [("a", ["p", "m", "n"], 1, scores)]


def test_margin_beside_a_triplet():
    rows, *_ = read(query=["a", "b"], positive=["p", "q"], negative=["n", "n"], score=[1.5, -0.25])
    assert rows == [("a", ["p", "n"], 1, [0.0, -1.5]), ("b", ["q", "n"], 1, [0.0, 0.25])]


def test_judged_pairs_become_one_row_for_each_query():
    rows, *_ = read(query=["a", "b", "a", "a", "a"], answer=["x", "y", "z", "x", "w"], label=[0, 0, 1, 0, 1])
    assert rows == [("a", ["z", "w", "x"], 2, None), ("b", ["y"], 0, None)]
    same, *_ = read(query=["a", "b", "a", "a", "a"], answer=["x", "y", "z", "x", "w"], label=[0.0, 0, 1, 0, 1])
    assert same == rows


def test_scored_pairs_are_unlabelled():
    rows, collection, _ = read(sentence1=["a", "b"], sentence2=["x", "y"], score=[0.3, 1.0])
    assert rows == [("a", ["x"], 0, [pytest.approx(0.3)]), ("b", ["y"], 0, [1.0])]
    assert collection.qrels == {}


def test_lists_of_documents():
    docs = [["x", "y", "z"], ["y"]]
    rows, *_ = read(query=["a", "b"], docs=docs, labels=[[0, 2, 1], [0]])
    assert rows == [("a", ["y", "z", "x"], 2, None), ("b", ["y"], 0, None)]
    rows, *_ = read(query=["a", "b"], docs=docs, scores=[[0.5, 2.0, 1.0], [0.25]])
    assert rows == [("a", ["x", "y", "z"], 0, [0.5, 2.0, 1.0]), ("b", ["y"], 0, [0.25])]
    rows, *_ = read(query=["a", "b"], docs=docs, labels=[[0, 2, 1], [0]], scores=[[0.5, 2.0, 1.0], [0.25]])
    assert rows == [("a", ["y", "z", "x"], 2, [2.0, 1.0, 0.5]), ("b", ["y"], 0, [0.25])]


def test_the_same_rows_from_every_source(tmp_path, monkeypatch):
    columns = {"anchor": ["a", "b"], "positive": ["x, y", '"z"'], "negative": ["n", "x, y"]}
    dataset = datasets.Dataset.from_dict(columns)
    expected, collection, rows = read(dataset)
    files = {kind: tmp_path / f"rows.{kind}" for kind in ("jsonl", "csv", "parquet")}
    dataset.to_json(files["jsonl"])
    dataset.to_csv(files["csv"], index=False)
    dataset.to_parquet(files["parquet"])
    folder = tmp_path / "folder"
    folder.mkdir()
    dataset.to_parquet(folder / "train.parquet")
    monkeypatch.setattr(sources, "resolve_revision", lambda repo, revision: revision)
    monkeypatch.setattr(sources, "fetch_configs", lambda repo, revision: ["default"])
    monkeypatch.setattr(sources, "fetch", lambda repo, config, revision: datasets.DatasetDict(train=dataset))
    for source in (*files.values(), str(folder), datasets.DatasetDict(train=dataset), "me/rows"):
        found, other, made = read(source)
        assert found == expected, source
        assert made.fingerprint == rows.fingerprint and other.fingerprint == collection.fingerprint
    with pytest.raises(InputError, match="no split 'train'.*test"):
        rows_from_columns(datasets.DatasetDict(test=dataset))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(TEXTS, TEXTS, st.lists(TEXTS, min_size=2, max_size=2)), min_size=1, max_size=12))
def test_every_text_is_kept_once(rows):
    # Blocks of two rows, so that first occurrences lie in other blocks than later ones.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns_module, "BLOCK_ROWS", 2)
        names = ("anchor", "positive", "negative_1", "negative_2")
        values = [[query, positive, *negatives] for query, positive, negatives in rows]
        found, collection, _ = read(**dict(zip(names, map(list, zip(*values)))))
    passages = [text for _, positive, negatives in rows for text in (positive, *negatives)]
    assert _raw(collection.queries) == list(dict.fromkeys(query for query, *_ in rows))
    assert _raw(collection.corpus) == list(dict.fromkeys(passages))
    for (_, positive, negatives), (_, documents, positives, _) in zip(rows, found, strict=True):
        assert documents == [text.strip() for text in dict.fromkeys([positive, *negatives])] and positives == 1


def _raw(table) -> list[str]:
    return table.dataset["text"][:]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"anchor": ["a"]}, "no query column and document column among: anchor"),
        ({"number": [1], "score": [1.0]}, "no query column and document column among: number, score"),
        ({"anchor": ["a", ""], "positive": ["x", "y"]}, "row 2, field 'anchor': '' where a text is expected"),
        ({"anchor": ["a", "b"], "positive": ["x", None]}, "row 2, field 'positive': None where a text is expected"),
        (
            {"anchor": ["a"], "positive": ["x"], "negative": [None], "negative_1": ["z"]},
            "row 1, field 'negative': None where a text is expected",
        ),
        ({"query": ["a"], "docs": [[]], "labels": [[]]}, "row 1, field 'docs': None where a text is expected"),
        ({"query": ["a"], "docs": [["x", "y"]], "labels": [[1]]}, "row 1, field 'labels': 1 labels for 2 documents"),
        ({"query": ["a"], "docs": [["x"]], "more": ["y"]}, "a list column 'docs' beside others: more"),
        (
            {"anchor": ["a"], "positive": ["x"], "negative": ["n"], "scores": [[1.0, 2.0, 3.0]]},
            "row 1: 3 numbers for 2 documents.*positive first",
        ),
        (
            {"anchor": ["a", "a"], "positive": ["x", "x"], "score": [1.0, float("nan")]},
            "row 2, field 'score': nan is no finite number",
        ),
        ({"anchor": ["a"], "positive": ["x"], "label": ["good"]}, "row 1, field 'label': good is no finite number"),
    ],
)
def test_bad_columns(columns, message):
    with pytest.raises(InputError, match=message):
        read(**columns)


def test_bad_files(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"anchor": "a", "positive": "x"}\n\n{"anchor": "b"}\n')
    with pytest.raises(InputError, match="rows.jsonl, line 3, field 'positive': None where a text"):
        rows_from_columns(path)
    path.write_text("")
    with pytest.raises(InputError, match="rows.jsonl.*no query column"):
        rows_from_columns(path)
    (tmp_path / "rows.bin").write_text(json.dumps([]))
    with pytest.raises(InputError, match="no reader for a file named 'rows.bin'"):
        rows_from_columns(tmp_path / "rows.bin")
    with pytest.raises(InputError, match="no column 'answer'.*anchor, positive"):
        rows_from_columns(
            datasets.Dataset.from_dict({"anchor": ["a"], "positive": ["b"]}), columns=["anchor", "answer"]
        )


def test_memory_is_numbers_not_texts():
    """What stays of a row between the passes is 16 bytes a text."""
    long = "x" * 10_000
    dataset = datasets.Dataset.from_dict({"anchor": [f"{n}" for n in range(50)], "positive": [long] * 50})
    blocks, where = columns_module._open(dataset, "train", None, None, None)
    layout = columns_module._layout(next(blocks()), None)
    read_rows = columns_module.read_hashes(blocks(), layout, where)
    assert read_rows.documents.nbytes == read_rows.queries.nbytes == 50 * 16
    assert len(np.unique(read_rows.documents, axis=0)) == 1
