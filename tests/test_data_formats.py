"""Foreign formats: what is read from each, however its files look, and what is said of broken ones."""

from __future__ import annotations

import gzip
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.data import RowSet, load_collection
from hf_distill.data.formats import open_inputs
from hf_distill.data.formats.conversion import convert
from hf_distill.data.formats.detect import detect
from hf_distill.data.formats.seen import Seen, hashes_of
from hf_distill.data.lines import line_blocks, read_lines
from hf_distill.data.readers import Block, tab_blocks
from hf_distill.data.row_columns import parse_list
from hf_distill.errors import InputError


# Quotation marks, separators of other formats, line separators of Unicode: all of them are text in a TSV file.
FIELDS = st.text(
    st.one_of(
        st.sampled_from("\"'\\,; \u2028\u2029\x85\x0b\x0c\x1c\ufeff\u00a0é月"),
        st.characters(exclude_categories=("Cs",), exclude_characters="\t\n\r\0"),
    ),
    max_size=10,
)
IDS = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\t\n\v\f\r\0\ufeff"), min_size=1, max_size=4
)
ENDS = st.sampled_from(["\n", "\r\n"])
examples = settings(max_examples=60, deadline=None)


def write(path, text, *, compress=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode("utf-8")
    path.write_bytes(gzip.compress(data) if compress else data)
    return path


def contents(rows: RowSet) -> dict:
    """The rows by query, with identifiers."""
    result = {}
    for row in range(len(rows)):
        query = rows.queries.ids_at([rows.query[row]])[0]
        entry = {"ids": rows.corpus.ids_at(rows.documents_at(row)), "positives": int(rows.num_positives[row])}
        for name in rows.columns:
            entry[name] = rows.values_at(name, row).tolist()
        assert query not in result
        result[query] = entry
    return result


# ------------------------------------------------------------------------------------------------------------- lines


@examples
@given(
    rows=st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=12),
    end=ENDS,
    last=st.booleans(),
    bom=st.booleans(),
    blank=st.booleans(),
    compress=st.booleans(),
    size=st.integers(1, 64),
)
def test_lines_in_blocks_are_the_lines_one_by_one(tmp_path_factory, rows, end, last, bom, blank, compress, size):
    text = "\ufeff" * bom + (end + end * blank).join("\t".join(row) for row in rows) + end * last
    path = write(tmp_path_factory.mktemp("lines") / "x.tsv", text, compress=compress)
    expected = list(read_lines(path))
    found = [
        (block.number(index), line)
        for block in line_blocks(path, size)
        for index, line in enumerate(block.texts.to_pylist())
    ]
    assert found == expected
    if not bom and not any("\ufeff" in field for row in rows for field in row):
        assert [line for _, line in expected] == ["\t".join(row) for row in rows]


@examples
@given(rows=st.dictionaries(IDS, FIELDS, min_size=1, max_size=12), end=ENDS, last=st.booleans(), bom=st.booleans())
def test_passages_come_through_whatever_is_in_them(tmp_path_factory, rows, end, last, bom):
    folder = tmp_path_factory.mktemp("msmarco")
    write(folder / "collection.tsv", "\ufeff" * bom + end.join("\t".join(row) for row in rows.items()) + end * last)
    write(folder / "queries.train.tsv", 'q1\t"what\n')
    collection = load_collection(folder, cache_dir=folder / "cache")
    assert dict(zip(collection.corpus.ids, collection.corpus.dataset["text"])) == rows
    assert collection.queries.texts() == ['"what']


def test_a_tab_too_many_names_the_line(tmp_path):
    path = write(tmp_path / "x.tsv", "1\ta\n\n2\tb\tc\n")
    with pytest.raises(InputError, match=r"x.tsv, line 3: 3 fields where a line has 2 \(document_id, text\)"):
        list(tab_blocks(path, ("document_id", "text")))
    path.write_bytes(b"1\ta\n2\t\xff\n")
    with pytest.raises(InputError, match=r"x.tsv, line 2: byte 3 of the line \(b'\\xff'\) is not UTF-8"):
        list(tab_blocks(path, ("document_id", "text")))
    path.write_bytes(gzip.compress(b"1\ta\n" * 1000)[:-20])
    with pytest.raises(InputError, match="x.tsv: the compressed file ends too early"):
        list(tab_blocks(path, ("document_id", "text")))


# ---------------------------------------------------------------------------------------------------------- MS MARCO


@pytest.fixture()
def msmarco(tmp_path):
    """All kinds of files of MS MARCO, tiny."""
    folder = tmp_path / "msmarco"
    write(folder / "collection.tsv", '0\t"zero\n1\tone\n2\ttwo\n3\tthree\n4\tfour\n')
    write(folder / "titles.tsv", "3\tThree\n0\tZero\n")
    write(folder / "queries.train.tsv", "10\tten\n11\televen\n")
    write(folder / "queries.dev.tsv", "20\ttwenty\n")
    write(folder / "queries.dev.small.tsv", "20\ttwenty\n")
    write(folder / "qrels.train.tsv", "10\t0\t0\t1\n11\t0\t1\t1\n10\t0\t2\t0\n")
    write(folder / "qrels.dev.tsv", "20 0 3 2\n")
    return folder


def test_msmarco_folder(msmarco):
    collection = load_collection(msmarco)
    assert collection.corpus.texts() == ['Zero "zero', "one", "two", "Three three", "four"]
    assert list(collection.queries.ids) == ["20", "10", "11"]
    assert {
        split: part.as_dict(collection.queries, collection.corpus) for split, part in collection.qrels.items()
    } == {"dev": {"20": {"3": 2}}, "train": {"10": {"0": 1, "2": 0}, "11": {"1": 1}}}
    assert collection.name == "msmarco" and collection.row_sets == ()


def test_negatives_triples_and_runs(msmarco):
    write(msmarco / "train.negatives.tsv", "10\t3,0,4,4\n11\t0\n", compress=False)
    write(msmarco / "qidpidtriples.train.tsv.gz", "10\t0\t1\n11\t1\t3\n10\t0\t2\n10\t2\t4\n", compress=True)
    write(msmarco / "top1000.dev.tsv", "20\t4\ttwenty\tfour\n20\t3\ttwenty\tthree\n")
    write(msmarco / "run.dev.tsv", "20\t1\t2\n20\t3\t1\n")
    write(msmarco / "bm25.trec", "20 Q0 1 2 1.5 x\n20 Q0 4 1 2.5 x\n20 Q0 3 3 0.5 x\n")
    collection = load_collection(msmarco)
    assert set(collection.row_sets) == {"train.negatives", "qidpidtriples.train", "top1000.dev", "run.dev", "bm25"}
    negatives, triples = "train.negatives", "qidpidtriples.train"
    assert contents(collection.rows(negatives)) == {
        "10": {"ids": ["0", "3", "4"], "positives": 1, "sources": ["positive", negatives, negatives]},
        "11": {"ids": ["1", "0"], "positives": 1, "sources": ["positive", negatives]},
    }
    # The lines of a query come together wherever they lie; a document that is also its positive is no negative.
    assert contents(collection.rows(triples)) == {
        "10": {"ids": ["0", "2", "1", "4"], "positives": 2, "sources": ["positive"] * 2 + [triples] * 2},
        "11": {"ids": ["1", "3"], "positives": 1, "sources": ["positive", triples]},
    }
    assert contents(collection.rows("top1000.dev"))["20"]["ids"] == ["3", "4"]
    assert contents(collection.rows("run.dev")) == {
        "20": {"ids": ["3", "1"], "positives": 1, "sources": ["positive", "run.dev"], "ranks": [1, 2]}
    }
    assert contents(collection.rows("bm25")) == {
        "20": {
            "ids": ["3", "4", "1"], "positives": 1, "sources": ["positive", "bm25", "bm25"],
            "ranks": [3, 1, 2], "retriever_scores": [0.5, 2.5, 1.5],
        }
    }  # fmt: skip


def test_judgements_may_come_from_the_rows_alone(msmarco):
    for path in msmarco.glob("qrels*"):
        path.unlink()
    write(msmarco / "triples.dev.tsv", "20\t3\t1\n")
    collection = load_collection(msmarco)
    assert collection.qrels.keys() == {"dev"} and len(collection.qrels["dev"]) == 1


def test_top1000_brings_its_own_texts(tmp_path):
    write(tmp_path / "only" / "top1000.dev.tsv", "q1\td2\twhat\ttwo\nq2\td1\twho\tone\nq1\td1\twhat\tone\n")
    collection = load_collection(tmp_path / "only")
    assert list(zip(collection.corpus.ids, collection.corpus.texts())) == [("d2", "two"), ("d1", "one")]
    assert contents(collection.rows("top1000.dev"))["q1"]["ids"] == ["d2", "d1"]


def test_many_buckets_give_the_same_groups(msmarco, tmp_path, monkeypatch):
    lines = [f"{10 + number % 2}\t{number % 2}\t{2 + number % 3}" for number in range(500)]
    write(msmarco / "triples.tsv", "\n".join(lines))
    once = contents(load_collection(msmarco, cache_dir=tmp_path / "a").rows("triples"))
    monkeypatch.setattr("hf_distill.data.formats.grouping._BUCKET_BYTES", 64)
    monkeypatch.setattr("hf_distill.data.formats.grouping._LINES", 3)
    again = contents(load_collection(msmarco, cache_dir=tmp_path / "b").rows("triples"))
    assert (
        again
        == once
        == {
            "10": {"ids": ["0", "2", "4", "3"], "positives": 1, "sources": ["positive"] + ["triples"] * 3},
            "11": {"ids": ["1", "3", "2", "4"], "positives": 1, "sources": ["positive"] + ["triples"] * 3},
        }
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("collection.tsv", "0\ta\tb\tc\td\n", r"collection.tsv, line 1: 5 fields where passages have 2 or 3 or 4"),
        ("collection.tsv", "0\ta\n0\tb\n", r"collection.tsv, line 2, .*'0' is used twice, also in .*line 1"),
        ("qrels.train.tsv", "10\t0\t77\t1\n", r"qrels.train.tsv, line 1, field 'document_id': '77' is not among"),
        ("qrels.train.tsv", "10\t0\t1\tvery\n", r"qrels.train.tsv, line 1, field 'relevance': 'very' is not a whole"),
        ("queries.train.tsv", "10\tten\n11\t0\televen\n", r"queries.train.tsv, line 2: 3 fields where a line has 2"),
        ("queries.train.tsv", "\tten\n", r"queries.train.tsv, line 1, field 'query_id': the identifier is empty"),
        ("collection.tsv", "", r"collection.tsv: the file is empty"),
    ],
)
def test_broken_files_of_msmarco(msmarco, name, text, message):
    write(msmarco / name, text)
    with pytest.raises(InputError, match=message):
        load_collection(msmarco)


def test_a_run_with_a_broken_score(msmarco):
    write(msmarco / "bm25.trec", "20 Q0 1 2 x x\n")
    with pytest.raises(InputError, match=r"bm25.trec, line 1 .*field 'score': 'x' is not a finite number"):
        load_collection(msmarco).rows("bm25")


# ---------------------------------------------------------------------------------------------------------- Tevatron


def tevatron_line(query, positives, negatives, **more):
    def passages(ids):
        return [{"docid": i, "title": f"T{i}", "text": f"text {i}"} for i in ids]

    return {
        "query_id": query, "query": f"what is {query}",
        "positive_passages": passages(positives), "negative_passages": passages(negatives), **more,
    }  # fmt: skip


def write_records(path, records, compress=None):
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return write(path, text, compress=path.name.endswith(".gz") if compress is None else compress)


def test_tevatron_with_passages_inside(tmp_path, caplog):
    folder = tmp_path / "tevatron"
    write_records(folder / "train.jsonl.gz", [tevatron_line(1, ["7"], ["8", "9", "7"]), tevatron_line(2, [9], ["7"])])
    changed = tevatron_line(3, ["8"], [])
    changed["positive_passages"][0]["text"] = "another text"
    write_records(folder / "dev.jsonl", [changed, tevatron_line(1, ["7"], [])])
    (folder / "tevatron.py").write_text("raise SystemExit('executed')")
    with caplog.at_level("WARNING", "hf_distill"):
        collection = load_collection(folder)
    assert "1 documents are given again with another text; the first one counts, first in" in caplog.text
    # Files are read in the order of their names, so dev's text of passage 8 is the first.
    assert dict(zip(collection.corpus.ids, collection.corpus.texts())) == {
        "8": "T8 another text", "7": "T7 text 7", "9": "T9 text 9",
    }  # fmt: skip
    assert sorted(collection.queries.ids) == ["1", "2", "3"]
    assert collection.qrels["train"].as_dict(collection.queries, collection.corpus) == {"1": {"7": 1}, "2": {"9": 1}}
    assert contents(collection.rows("train")) == {
        "1": {"ids": ["7", "8", "9"], "positives": 1, "sources": ["positive", "negatives", "negatives"]},
        "2": {"ids": ["9", "7"], "positives": 1, "sources": ["positive", "negatives"]},
    }


def test_tevatron_with_a_corpus_beside_it(tmp_path):
    folder = tmp_path / "tevatron"
    write_records(folder / "train.jsonl", [tevatron_line("1", ["7"], ["8"])])
    write_records(folder / "corpus.jsonl", [{"docid": i, "title": "", "text": f"whole {i}"} for i in (7, 8, 9)])
    collection = load_collection(folder)
    assert collection.corpus.texts() == ["whole 7", "whole 8", "whole 9"]
    second = {
        "query_id": "1", "query_text": "what", "query_image": None,
        "positive_document_ids": ["7"], "negative_document_ids": ["9", "8"],
    }  # fmt: skip
    (folder / "corpus.jsonl").unlink()
    write_records(folder / "train.jsonl", [second])
    write_records(folder / "corpus.jsonl", [{"docid": str(i), "document_text": f"whole {i}"} for i in (7, 8, 9)])
    collection = load_collection(folder)
    assert collection.queries.texts() == ["what"] and len(collection.qrels["train"]) == 1
    assert contents(collection.rows("train"))["1"] == {"ids": ["7", "9", "8"], "positives": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"positive_passages": [{"title": "no id", "text": "x"}]},
            "line 2, field 'positive_passages': a passage wit",
        ),
        ({"negative_passages": "7"}, "line 2, field 'negative_passages': '7' is no list of passages"),
        ({"negative_passages": [{"docid": "5"}]}, "line 2, field 'text': the text is missing"),
        ({"query": None}, "line 2, field 'text': the text is missing"),
    ],
)
def test_broken_tevatron_lines(tmp_path, change, message):
    folder = tmp_path / "tevatron"
    write_records(folder / "train.jsonl", [tevatron_line("1", ["7"], ["8"]), tevatron_line("2", ["7"], []) | change])
    with pytest.raises(InputError, match=f"train.jsonl, {message}"):
        load_collection(folder)


def test_scripts_on_the_hub_are_read_through_their_files(tmp_path, monkeypatch):
    from hf_distill.data import sources

    folder = tmp_path / "snapshot"
    write_records(folder / "train.jsonl.gz", [tevatron_line("1", ["7"], ["8"])])
    (folder / "msmarco-passage.py").write_text("raise SystemExit('executed')")

    def refuse(repo, revision):
        with sources._HubErrors(repo, revision):
            raise RuntimeError("Dataset scripts are no longer supported, but found msmarco-passage.py")

    monkeypatch.setattr(sources, "fetch_configs", refuse)
    monkeypatch.setattr(sources, "resolve_revision", lambda repo, revision: "c0ffee")
    monkeypatch.setattr("hf_distill.data.formats.opening.resolve_revision", lambda repo, revision: "c0ffee")
    asked = []

    def fetch(repo, revision, patterns):
        asked.append((repo, revision, patterns))
        return folder

    monkeypatch.setattr("hf_distill.data.formats.opening.fetch_data_files", fetch)
    collection = load_collection("Tevatron/msmarco-passage")
    assert collection.source == "Tevatron/msmarco-passage" and collection.revision == "c0ffee"
    assert contents(collection.rows("train"))["1"]["ids"] == ["7", "8"]
    [(repo, revision, patterns)] = asked
    assert revision == "c0ffee" and not [pattern for pattern in patterns if "py" in pattern or "pkl" in pattern]


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ({"qid": [10], "pos": [[0]], "neg": [{"bm25": [3]}]}, "FormatSource"),
        ({"anchor": ["a"], "positive": ["b"]}, "HubSource"),
    ],
)
def test_repositories_of_one_config_show_what_they_are(tmp_path, monkeypatch, columns, kind):
    import datasets

    from hf_distill.data import sources

    write_records(tmp_path / "snapshot" / "hard.jsonl", [{"qid": 10, "pos": [0], "neg": {"bm25": [3]}}])
    monkeypatch.setattr(sources, "fetch_configs", lambda repo, revision: ["default"])
    monkeypatch.setattr(sources, "resolve_revision", lambda repo, revision: "c0ffee")
    monkeypatch.setattr(sources, "fetch", lambda *arguments: {"train": datasets.Dataset.from_dict(columns)})
    monkeypatch.setattr("hf_distill.data.formats.opening.fetch_data_files", lambda *arguments: tmp_path / "snapshot")
    opened = open_inputs(["me/some"])
    assert type(opened).__name__ == kind and opened.revision == "c0ffee"
    assert kind == "HubSource" or opened.row_sets() == ["hard"]


# ------------------------------------------------------------------------------- hard negatives, id forms, strings


def test_hard_negatives_by_system(msmarco):
    records = [
        {"qid": 10, "pos": [0], "neg": {"bm25": [3, 4, 0], "dense": [4]}},
        {"qid": 11, "pos": [1], "neg": {"bm25": []}},
    ]
    write_records(msmarco / "msmarco-hard-negatives.jsonl.gz", records)
    collection = load_collection(msmarco)
    assert contents(collection.rows("msmarco_hard_negatives")) == {
        "10": {
            "ids": ["0", "3", "4", "4"], "positives": 1,
            "sources": ["positive", "bm25", "bm25", "dense"], "ranks": [3, 1, 2, 1],
        },
        "11": {"ids": ["1"], "positives": 1, "sources": ["positive"], "ranks": [0]},
    }  # fmt: skip
    # The same file where a row set is named, as parquet, and beside a collection of our own layout.
    table = pa.Table.from_pylist(records)
    pq.write_table(table, msmarco.parent / "hard.parquet")
    for path in (msmarco / "msmarco-hard-negatives.jsonl.gz", msmarco.parent / "hard.parquet"):
        rows = RowSet.load(path, collection.queries, collection.corpus)
        assert contents(rows) == contents(collection.rows("msmarco_hard_negatives"))
    (msmarco / "collection.tsv").rename(msmarco / "x.tsv")
    with pytest.raises(InputError, match="msmarco: no corpus .*found: .*msmarco-hard-negatives.jsonl.gz .hard_negati"):
        load_collection(msmarco)


def id_form(folder, train, schema=None):
    for name, table in {
        "queries": pa.table({"query_id": [1, 2], "text": ["one", "two"]}),
        "documents": pa.table({"document_id": [7, 8, 9], "text": ["seven", "eight", "nine"]}),
        "train": pa.table(train, schema),
    }.items():
        (folder / name).mkdir(parents=True)
        pq.write_table(table, folder / name / "train-00000-of-00001.parquet")


def test_id_form_with_integers_and_lists_stored_as_strings(tmp_path):
    id_form(tmp_path / "plain", {"query_id": [2], "document_ids": [[7, 9]], "scores": [[0.5, 0.25]]})
    plain = load_collection(tmp_path / "plain")
    assert contents(plain.rows("train"))["2"] == {"ids": ["7", "9"], "positives": 0, "scores": [0.5, 0.25]}
    for name, ids, scores in (
        ("python", "['7', '9']", "[0.5, 0.25]"),
        ("json", '["7", "9"]', "[0.5, 0.25]"),
        ("numbers", "[7, 9]", "0.5, 0.25"),
        ("commas", "7,9", "0.5,0.25"),
    ):
        id_form(tmp_path / name, {"query_id": [2], "document_ids": [ids], "scores": [scores]})
        rows = load_collection(tmp_path / name).rows("train")
        assert contents(rows) == contents(plain.rows("train")), name
    id_form(tmp_path / "bad", {"query_id": [2], "document_ids": ["['7', '9']"], "scores": ["[0.5, 'x']"]})
    with pytest.raises(InputError, match=r"row 1, field 'scores': .* are not numbers"):
        load_collection(tmp_path / "bad").rows("train")


def test_triplets_by_id(tmp_path):
    id_form(tmp_path / "triplets", {"query_id": [2, 1], "positive_id": [7, 8], "negative_id": [9, 8]})
    collection = load_collection(tmp_path / "triplets")
    assert collection.row_sets == ("train",)
    assert contents(collection.rows("train")) == {
        "2": {"ids": ["7", "9"], "positives": 1}, "1": {"ids": ["8"], "positives": 1},
    }  # fmt: skip


VALUES = st.lists(st.one_of(st.text(st.characters(exclude_categories=("Cs",)), max_size=5), st.integers()), max_size=5)


@examples
@given(VALUES)
def test_lists_come_back_from_json_and_from_python(values):
    assert parse_list(json.dumps(values), "here") == values
    assert parse_list(repr(values), "here") == values


@pytest.mark.parametrize(
    "text", ["[open('x')]", "[1, 2", "[{'a': 1}]", "[*range(3)]", "[(1, 2)]", "[" * 100_000, "[x for x in ()]"]
)
def test_nothing_but_literals_is_a_list(text):
    with pytest.raises(InputError, match="here: .* is not a list of values"):
        parse_list(text, "here")


# ---------------------------------------------------------------------------------------------- detection, row sets


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("collection.tsv", "0\ttext\n", "corpus"),
        ("para.title.txt", "0\ttitle\n", "titles"),
        ("dev.query.txt", "0\twhat\n", "queries"),
        ("2019qrels-pass.txt", "19335 0 1017759 0\n", "qrels"),
        ("qrels.dev.small.tsv", "300674\t0\t7067032\t1\n", "qrels"),
        ("anything.tsv", "1\t0\t2\t1\n", "qrels"),
        ("bm25.tsv", "1\t2,3\n", "negatives"),
        ("triples.train.small.tsv", "what is\tthis one\tthat one\n", "columns"),
        ("msmarco.run", "1 Q0 2 1 3.5 x\n", "run"),
        ("test.jsonl", '{"anchor": "a", "positive": "b"}\n', "columns"),
        ("corpus.jsonl", '{"docid": "1", "text": "b"}\n', "corpus"),
        ("topics.jsonl", '{"id": "1", "text": "b"}\n', "queries"),
        ("judged.tsv", "query-id\tcorpus-id\tscore\n1\t2\t1\n", "qrels"),
        ("README.txt.md", "words\n", None),
        ("notes.txt", "some words\n", None),
    ],
)
def test_files_show_what_they_are(tmp_path, name, text, kind):
    found = detect(write(tmp_path / name, text))
    assert (None if found is None else found.kind) == kind


@pytest.mark.parametrize(
    ("name", "split"),
    [("qrels.dev.small.tsv", "dev.small"), ("2019qrels-pass.txt", "2019_pass"), ("qrels.tsv", "train"),
     ("msmarco-doctrain-qrels.tsv.gz", "doctrain"), ("qrels/test.tsv", "test")],
)  # fmt: skip
def test_splits_are_called_after_their_files(tmp_path, name, split):
    text = "1\t0\t2\t1\n"
    assert detect(write(tmp_path / name, text, compress=name.endswith(".gz"))).name == split


def test_a_file_of_rows_is_a_row_set(msmarco):
    collection = load_collection(msmarco)
    path = write(msmarco.parent / "bm25.tsv", "10\t3,4\n")
    rows = RowSet.load(path, collection.queries, collection.corpus)
    assert contents(rows) == {"10": {"ids": ["3", "4"], "positives": 0, "sources": ["bm25", "bm25"]}}
    with pytest.raises(InputError, match="bm25.tsv, line 1, field 'document_ids': '77' is not among the 5 documents"):
        RowSet.load(write(path, "10\t77,3\n"), collection.queries, collection.corpus)
    with pytest.raises(InputError, match="nothing.txt: no file to read. A row set lies in .parquet or .jsonl files"):
        RowSet.load(write(msmarco.parent / "nothing.txt", "words\n"), collection.queries, collection.corpus)


def test_pickles_are_refused_where_data_is_read(msmarco, tmp_path):
    collection = load_collection(msmarco)
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "scores.pkl").write_bytes(pickle.dumps({10: {0: 1.0}}))
    for path in (folder, folder / "scores.pkl"):
        with pytest.raises(InputError, match="scores.pkl: a pickle, which is not read here. A pickle can run"):
            RowSet.load(path, collection.queries, collection.corpus)
    with pytest.raises(InputError, match="scores.pkl: a pickle, which is not read here"):
        open_inputs([str(folder / "scores.pkl")])


@examples
@given(st.lists(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), max_size=20), max_size=12))
def test_seen_is_a_dictionary(batches):
    seen, expected = Seen(), {}
    for batch in batches:
        hashes = np.array([key for key, _ in batch], dtype=np.uint64)
        contents = np.array([value for _, value in batch], dtype=np.uint64)
        fresh, same = seen.add(hashes, contents)
        for (key, value), is_fresh, is_same in zip(batch, fresh.tolist(), same.tolist()):
            assert is_fresh == (key not in expected)
            assert is_same == (expected.setdefault(key, value) == value)
    assert len(seen) == len(expected)
    probe = np.arange(32, dtype=np.uint64)
    assert seen.holds(probe).tolist() == [key in expected for key in range(32)]


def test_hashes_are_those_of_the_index(msmarco):
    from hf_distill.data.lookup import IdIndex

    table = load_collection(msmarco).corpus
    index = IdIndex.build(table.ids)
    assert np.sort(hashes_of(list(table.ids))).tolist() == index.hashes.tolist()
    assert hashes_of(pa.array(["a", "é"])).tolist() == hashes_of(["a", "é"]).tolist()


def test_blocks_know_their_places():
    block = Block({"x": [1, 2]}, "file", 5, "line", [5, 9])
    assert block.place(1) == "file, line 9"


def test_converted_folder_is_the_foreign_one(msmarco, tmp_path):
    write(msmarco / "train.negatives.tsv", "10\t3,0,4\n")
    before = load_collection(msmarco)
    convert(open_inputs([str(msmarco)], cache_dir=tmp_path / "cache"), tmp_path / "out")
    after = load_collection(tmp_path / "out")
    assert after.fingerprint == before.fingerprint and after.row_sets == before.row_sets
    assert contents(after.rows("train.negatives")) == contents(before.rows("train.negatives"))
