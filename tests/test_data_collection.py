"""Collections: every layout that is read, what is written, and bad input."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.data import sources
from hf_distill.data.collection import Collection, load_collection
from hf_distill.data.export import add_row_set, save_collection
from hf_distill.data.qrels import Qrels
from hf_distill.data.rows import RowSet
from hf_distill.data.tables import Corpus, Queries
from hf_distill.errors import InputError
from hf_distill.files import cache_folder


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
IDS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\t\n\v\f\r\0"), min_size=1, max_size=5)

CORPUS = '{"_id": "d1", "title": "One", "text": "first"}\n{"_id": "d2", "text": "second"}\n'
QUERIES = '{"_id": "q1", "text": "which is first?"}\n{"_id": "q2", "text": "which is second?"}\n'
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq2\td2\t1\nq2\td1\t0\n"


@pytest.fixture()
def beir(tmp_path) -> Path:
    """A BEIR folder of two queries and two documents; tests break it."""
    folder = tmp_path / "tiny"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(CORPUS, encoding="utf-8")
    (folder / "queries.jsonl").write_text(QUERIES, encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text(QRELS, encoding="utf-8")
    return folder


def judgements(collection: Collection) -> dict:
    return {split: part.as_dict(collection.queries, collection.corpus) for split, part in collection.qrels.items()}


def test_beir_folder(micro):
    collection = load_collection(micro)
    corpus = [json.loads(line) for line in (micro / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    queries = [json.loads(line) for line in (micro / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    assert collection.name == "micro" and collection.source == str(micro) and collection.revision is None
    assert list(collection.corpus.ids) == [record["_id"] for record in corpus]
    assert collection.corpus.texts() == [f"{r.get('title', '')} {r['text']}".strip() for r in corpus]
    assert list(collection.queries.ids) == [record["_id"] for record in queries]
    assert collection.queries.texts() == [record["text"] for record in queries]
    expected = {}
    for path in (micro / "qrels").glob("*.tsv"):
        with open(path, encoding="utf-8") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                split = expected.setdefault(path.stem, {})
                split.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
    assert judgements(collection) == expected
    assert load_collection(micro, splits=["dev"]).qrels.keys() == {"dev"}
    assert load_collection(micro, name="other").name == "other"


def test_second_load_parses_nothing(beir, monkeypatch):
    first = load_collection(beir)
    moved = shutil.move(beir, beir.parent / "moved")
    monkeypatch.setattr(sources, "read_blocks", lambda path: pytest.fail(f"{path} was parsed again"))
    second = load_collection(moved)
    assert second.fingerprint == first.fingerprint and judgements(second) == judgements(first)
    assert second.corpus.where.startswith(str(moved))
    monkeypatch.undo()


def test_changed_file_is_read_again(beir):
    first = load_collection(beir)
    (beir / "corpus.jsonl").write_text(CORPUS.replace("second", "other!"), encoding="utf-8")
    second = load_collection(beir)
    assert second.corpus.texts() == ["One first", "other!"] and second.fingerprint != first.fingerprint


def test_large_file_is_hashed_once(beir, monkeypatch):
    monkeypatch.setattr(sources, "_ALWAYS_HASHED", 10)
    first = load_collection(beir)
    monkeypatch.setattr(sources, "file_fingerprint", lambda path: pytest.fail(f"{path} was hashed again"))
    assert load_collection(beir).fingerprint == first.fingerprint
    monkeypatch.undo()
    monkeypatch.setattr(sources, "_ALWAYS_HASHED", 10)
    (beir / "corpus.jsonl").write_text(CORPUS.replace("second", "longer text"), encoding="utf-8")
    assert load_collection(beir).corpus.texts()[1] == "longer text"


def test_processes_that_start_together_parse_once(beir, monkeypatch):
    parsed = []
    read = sources.read_blocks

    def slow(path):
        parsed.append(path.name)
        time.sleep(0.05)
        yield from read(path)

    monkeypatch.setattr(sources, "read_blocks", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_collection(beir).fingerprint, range(4)))
    assert len(set(found)) == 1
    assert sorted(parsed) == ["corpus.jsonl", "queries.jsonl", "test.tsv"]


def test_interrupted_parse_leaves_nothing(beir):
    (beir / "corpus.jsonl").write_text(CORPUS + "{", encoding="utf-8")
    with pytest.raises(InputError):
        load_collection(beir)
    assert not [path for path in (cache_folder() / "data").iterdir() if not path.name.startswith(".")]
    assert not list((cache_folder() / "data").glob(".*.tmp"))


def test_compressed_and_with_integer_ids(beir):
    plain = load_collection(beir)
    for name in ("corpus", "queries"):
        path = beir / f"{name}.jsonl"
        (beir / f"{name}.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert load_collection(beir).fingerprint == plain.fingerprint
    (beir / "corpus.jsonl.gz").write_bytes(gzip.compress(CORPUS.replace('"d1"', "1").replace('"d2"', "2").encode()))
    (beir / "qrels" / "test.tsv").write_text(QRELS.replace("\td", "\t"), encoding="utf-8")
    assert judgements(load_collection(beir)) == {"test": {"q1": {"1": 2}, "q2": {"2": 1, "1": 0}}}


def test_contract_folder_without_a_card(tmp_path):
    for folder in ("corpus", "queries", "qrels", "mined"):
        (tmp_path / folder).mkdir()
    # Two shards of one corpus, judgements in JSON lines, a row set.
    pq.write_table(
        pa.table({"document_id": ["a"], "title": [None], "text": ["x"]}), tmp_path / "corpus" / "p-0.parquet"
    )
    pq.write_table(
        pa.table({"document_id": ["b"], "title": ["T"], "text": ["y"]}), tmp_path / "corpus" / "p-1.parquet"
    )
    pq.write_table(pa.table({"query_id": ["q"], "text": ["?"]}), tmp_path / "queries" / "all.parquet")
    (tmp_path / "qrels" / "dev.jsonl").write_text('{"query_id": "q", "document_id": "b", "relevance": 3}\n')
    row = {"query_id": "q", "document_ids": ["b", "a"], "num_positives": 1}
    (tmp_path / "mined" / "train.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "notes.jsonl").write_text("not a table\n")
    collection = load_collection(tmp_path)
    assert collection.corpus.texts() == ["x", "T y"]
    assert judgements(collection) == {"dev": {"q": {"b": 3}}}
    assert collection.row_sets == ("mined",)
    assert collection.rows("mined").dataset[0] == {"query": 0, "documents": [1, 0], "num_positives": 1}
    with pytest.raises(InputError, match="no row set 'other'.*mined"):
        collection.rows("other")


def test_collection_of_unlabelled_queries(beir):
    shutil.rmtree(beir / "qrels")
    collection = load_collection(beir)
    assert collection.qrels == {} and len(collection.queries) == 2
    with pytest.raises(InputError, match="no split 'test'"):
        collection.split("test")
    with pytest.raises(InputError, match="no judgements.*qrels"):
        load_collection(beir, splits=["test"])


# -- writing ----------------------------------------------------------------------------------------------------


def test_saved_collection_opens_in_datasets(micro, tmp_path):
    collection = load_collection(micro)
    rows = RowSet.from_qrels(collection, "train")
    rows = rows.with_column("scores", np.arange(rows.lengths.sum()), model="some/teacher")
    folder = save_collection(collection, tmp_path / "saved", row_sets={"gold": rows})
    read = {
        name: datasets.load_dataset(str(folder), name, cache_dir=str(tmp_path / "hf")) for name in _configs(folder)
    }
    assert set(read) == {"corpus", "queries", "qrels", "gold"}
    assert read["corpus"]["corpus"]["document_id"][:] == list(collection.corpus.ids)
    assert read["queries"]["queries"]["text"][:] == collection.queries.texts()
    assert set(read["qrels"]) == set(collection.qrels)
    first = read["gold"]["train"][0]
    assert first["query_id"] == collection.queries.ids[int(rows.query[0])]
    assert first["document_ids"] == collection.corpus.ids_at(rows.documents_at(0))
    again = load_collection(folder)
    assert again.fingerprint == collection.fingerprint and again.name == "micro" and again.row_sets == ("gold",)
    assert again.rows("gold").fingerprint == rows.fingerprint


def test_large_corpus_is_written_in_several_files(micro, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_distill.data.tables.BLOCK_ROWS", 10)
    monkeypatch.setattr("hf_distill.data.export.BLOCK_ROWS", 10)
    monkeypatch.setattr("hf_distill.data.export._BLOCKS_PER_FILE", 3)
    collection = load_collection(micro)
    folder = save_collection(collection, tmp_path / "saved")
    count = -(-len(collection.corpus) // 30)
    names = [f"corpus-{n:05d}-of-{count:05d}.parquet" for n in range(count)]
    assert count > 1 and sorted(path.name for path in (folder / "corpus").iterdir()) == names
    assert load_collection(folder).fingerprint == collection.fingerprint
    read = datasets.load_dataset(str(folder), "corpus", cache_dir=str(tmp_path / "hf"))["corpus"]
    assert read["document_id"][:] == list(collection.corpus.ids)


def _configs(folder) -> list[str]:
    return datasets.get_dataset_config_names(str(folder))


def test_row_set_is_added_to_the_card(micro, tmp_path):
    collection = load_collection(micro)
    card = "---\nlicense: mit\ntags:\n- über\n---\n# Mine\n\nText --- with dashes.\n"
    folder = save_collection(collection, tmp_path / "saved", card=card)
    rows = RowSet.from_qrels(collection, "train")
    add_row_set(folder, "gold", rows)
    add_row_set(folder, "gold", rows.select([0, 1]))
    add_row_set(folder, "dev.gold", RowSet.from_qrels(collection, "dev"))
    assert _configs(folder) == ["corpus", "queries", "qrels", "gold", "dev.gold"]
    loaded = datasets.load_dataset(str(folder), "gold", cache_dir=str(tmp_path / "hf"))["train"]
    assert loaded["query_id"][:] == collection.queries.ids_at(rows.query[:2])
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in text and "über" in text and text.endswith("# Mine\n\nText --- with dashes.\n")
    assert load_collection(folder).row_sets == ("gold", "dev.gold")
    with pytest.raises(InputError, match="'qrels' is no name for a row set"):
        add_row_set(folder, "qrels", rows)
    with pytest.raises(InputError, match="no README.md"):
        add_row_set(tmp_path, "gold", rows)


def test_row_set_of_another_corpus_is_not_added(micro, beir, tmp_path):
    folder = save_collection(load_collection(beir), tmp_path / "saved")
    with pytest.raises(InputError, match="'gold' was made for other queries"):
        add_row_set(folder, "gold", RowSet.from_qrels(load_collection(micro), "train"))


def test_folder_in_use_and_bad_split_names(beir, tmp_path):
    collection = load_collection(beir)
    with pytest.raises(InputError, match="not empty"):
        save_collection(collection, beir)
    collection.qrels["test-2"] = collection.qrels["test"]
    with pytest.raises(InputError, match="'test-2' is no name for a split"):
        save_collection(collection, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_round_trip_of_any_texts(tmp_path_factory, data):
    ids = data.draw(st.lists(IDS, unique=True, min_size=1, max_size=5))
    query_ids = data.draw(st.lists(IDS, unique=True, min_size=1, max_size=4))
    corpus = Corpus.from_records([{"_id": i, "title": data.draw(TEXTS), "text": data.draw(TEXTS)} for i in ids])
    queries = Queries.from_records([{"_id": i, "text": data.draw(TEXTS)} for i in query_ids])
    cells = [(q, d) for q in range(len(query_ids)) for d in range(len(ids))]
    pairs = data.draw(st.lists(st.sampled_from(cells), unique=True, min_size=1))
    grades = data.draw(st.lists(st.integers(-2, 4), min_size=len(pairs), max_size=len(pairs)))
    qrels = Qrels([q for q, _ in pairs], [d for _, d in pairs], grades)
    collection = Collection("any", queries, corpus, {"test": qrels})
    folder = save_collection(collection, tmp_path_factory.mktemp("any") / "saved")
    again = load_collection(folder)
    assert again.fingerprint == collection.fingerprint
    assert judgements(again) == judgements(collection)
    assert again.corpus.dataset.to_list() == corpus.dataset.to_list()


# -- the Hub ----------------------------------------------------------------------------------------------------


class FakeHub:
    """Stands at the one seam to the Hub: repositories of data sets in memory."""

    def __init__(self, monkeypatch):
        self.repos: dict[str, dict[str, dict[str, datasets.Dataset]]] = {}
        self.asked: list[tuple] = []
        monkeypatch.setattr(sources, "resolve_revision", lambda repo, revision: revision or "c0ffee")
        monkeypatch.setattr(sources, "fetch_configs", lambda repo, revision: list(self.repos[repo]))
        monkeypatch.setattr(sources, "fetch", self.fetch)
        monkeypatch.setattr(sources, "fetch_file", lambda repo, path, revision: None)

    def fetch(self, repo, config, revision):
        self.asked.append((repo, config, revision))
        return datasets.DatasetDict(self.repos[repo][config])


@pytest.fixture()
def hub(monkeypatch) -> FakeHub:
    return FakeHub(monkeypatch)


def table(**columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def test_mteb_layout(hub):
    hub.repos["mteb/tiny"] = {
        "default": {"test": table(**{"query-id": ["q1", "q2"], "corpus-id": ["d1", "d2"], "score": [1.0, 2.0]})},
        "corpus": {"corpus": table(_id=["d1", "d2"], title=["One", ""], text=["first", "second"])},
        "queries": {"queries": table(_id=["q1", "q2"], text=["a", "b"])},
    }
    collection = load_collection("mteb/tiny", revision="v1")
    assert collection.name == "tiny" and collection.source == "mteb/tiny" and collection.revision == "v1"
    assert collection.corpus.texts() == ["One first", "second"]
    assert judgements(collection) == {"test": {"q1": {"d1": 1}, "q2": {"d2": 2}}}
    assert collection.row_sets == ()
    assert {revision for _, _, revision in hub.asked} == {"v1"}


def test_beir_layout_with_integer_judgements(hub):
    hub.repos["BeIR/tiny"] = {
        "corpus": {"corpus": table(_id=["10", "20"], title=["One", ""], text=["first", "second"])},
        "queries": {"queries": table(_id=["1", "2"], title=["", ""], text=["a", "b"])},
    }
    hub.repos["BeIR/tiny-qrels"] = {
        "default": {
            "train": table(**{"query-id": [1], "corpus-id": [20], "score": [1]}),
            "test": table(**{"query-id": [2], "corpus-id": [10], "score": [1]}),
        }
    }
    collection = load_collection("BeIR/tiny")
    assert judgements(collection) == {"train": {"1": {"20": 1}}, "test": {"2": {"10": 1}}}
    assert load_collection("BeIR/tiny", splits=["test"]).qrels.keys() == {"test"}


def test_own_layout_on_the_hub(hub):
    hub.repos["me/tiny"] = {
        "queries": {"queries": table(query_id=["q1"], text=["a"])},
        "corpus": {"corpus": table(document_id=["d1", "d2"], title=["", ""], text=["first", "second"])},
        "qrels": {"test": table(query_id=["q1"], document_id=["d2"], relevance=[1])},
        "mined": {
            "train": table(query_id=["q1"], document_ids=[["d2", "d1"]], num_positives=[1], scores=[[0.5, 0.25]])
        },
    }
    collection = load_collection("me/tiny")
    assert collection.row_sets == ("mined",) and collection.revision == "c0ffee"
    rows = collection.rows("mined")
    assert rows.dataset[0] == {"query": 0, "documents": [1, 0], "num_positives": 1, "scores": [0.5, 0.25]}
    hub.repos["me/tiny"]["qrels"]["test"] = table(query_id=["q1"], document_id=["d7"], relevance=[1])
    with pytest.raises(InputError, match="me/tiny, config 'qrels', split 'test', row 1, field 'document_id': 'd7'"):
        load_collection("me/tiny")
    hub.repos["me/rows"] = {"default": {"train": table(anchor=["a"], positive=["b"])}}
    with pytest.raises(InputError, match="me/rows: no corpus .found the configs 'default'"):
        load_collection("me/rows")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("Dataset scripts are no longer supported, but found x.py"),
            "loading script.*refs/convert/parquet",
        ),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist"), "doesn't exist.*Check the name"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset"), "gated.*Ask for access"),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "cannot be reached.*HF_HUB_OFFLINE"),
        (ValueError("BuilderConfig 'x' not found"), "BuilderConfig 'x' not found.*README"),
    ],
)
def test_what_the_hub_may_answer(monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "get_dataset_config_names", fail)
    with pytest.raises(InputError, match=f"^a/b.*{message}"):
        load_collection("a/b")


def test_offline_id_that_is_neither_folder_nor_cached():
    with pytest.raises(InputError, match="nobody/nothing: no such folder here, and the Hub cannot be reached"):
        load_collection("nobody/nothing")


# -- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("corpus.jsonl", CORPUS + '{"text": "x"}\n', r"corpus.jsonl, line 3, field '_id': the identifier is missing"),
        ("corpus.jsonl", '{"text": "x"}\n', r"corpus.jsonl, line 1: no column 'document_id' \(found: 'text'\)"),
        (
            "corpus.jsonl",
            CORPUS + CORPUS,
            r"jsonl, line 3, field '_id': .*'d1' is used twice, also in .*jsonl, line 1",
        ),
        ("queries.jsonl", QUERIES + "\n" + QUERIES, r"queries.jsonl, line 4, .*'q1' is used twice, also in .*line 1"),
        ("corpus.jsonl", CORPUS + '{"_id": "d3"}\n', r"corpus.jsonl, line 3, field 'text': the text is missing"),
        ("corpus.jsonl", CORPUS + "[1]\n", r"corpus.jsonl, line 3: a JSON list"),
        ("corpus.jsonl", CORPUS + "\n\n{'_id'}\n", r"corpus.jsonl, line 5: not a JSON object \(.*column 2\)"),
        ("corpus.jsonl", "", r"corpus.jsonl: no documents in it"),
        ("queries.jsonl", "\n", r"queries.jsonl: no queries in it"),
        ("qrels/test.tsv", QRELS + "q1\td9\t1\n", r"test.tsv, line 5, field 'corpus-id': 'd9' is not among the 2 doc"),
        ("qrels/test.tsv", QRELS + "q9\td1\t1\n", r"test.tsv, line 5, field 'query-id': 'q9' is not among the 2 que"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", r"test.tsv: no judgements in it"),
        ("qrels/test.tsv", "", r"test.tsv: the file is empty.*header"),
        (
            "qrels/test.tsv",
            "q1\td1\t1\nq2\td2\t1\n",
            r"test.tsv, line 2: no column 'query_id' \(found: 'q1', 'd1', '1'\). Name it 'query_id' in the first line",
        ),
        ("qrels/test.tsv", "query-id\tscore\nq1\t1\n", r"test.tsv, line 2: no column 'document_id'.*'corpus-id'"),
        ("qrels/test.tsv", QRELS + "q1\td2\tyes\n", r"test.tsv, line 5, field 'score': 'yes' is not a whole number"),
        ("qrels/test.tsv", QRELS + "q1\td2\t0.5\n", r"test.tsv, line 5, field 'score': '0.5' is not a whole number"),
        ("qrels/test.tsv", QRELS + "q1 d2 1\n", r"test.tsv, line 5: 1 fields where the header has 3.*tabs"),
        ("README.md", "---\nconfigs: [\n---\n", r"README.md, line \d: the YAML header is broken"),
        (
            "README.md",
            "---\nconfigs:\n- config_name: corpus\n  data_files: c/*.parquet\n---\n",
            r"README.md: no file fits 'c/\*.parquet' of the config 'corpus'",
        ),
    ],
)
def test_bad_files(beir, file, content, message):
    (beir / file).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_collection(beir)


def test_bytes_that_are_not_utf8(beir):
    (beir / "corpus.jsonl").write_bytes(CORPUS.encode() + '{"_id": "d3", "text": "café"}\n'.encode("latin-1"))
    with pytest.raises(
        InputError, match=r"corpus.jsonl, line 3: byte 27 of the line \(b'\\xe9'\) is not UTF-8.*iconv"
    ):
        load_collection(beir)


@pytest.fixture()
def compressed(beir) -> Path:
    """The corpus as a gzip of 3,000 lines."""
    lines = [json.dumps({"_id": f"d{n}", "title": "", "text": f"{n * n} {os.urandom(8).hex()}"}) for n in range(3000)]
    (beir / "corpus.jsonl").unlink()
    (beir / "corpus.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return beir / "corpus.jsonl.gz"


def test_malformed_line_in_the_middle_of_a_gzip(compressed):
    lines = gzip.decompress(compressed.read_bytes()).split(b"\n")
    lines[1500] = lines[1500][:-4]
    compressed.write_bytes(gzip.compress(b"\n".join(lines)))
    with pytest.raises(InputError, match=r"corpus.jsonl.gz, line 1501: not a JSON object .*Mend or remove the line"):
        load_collection(compressed.parent)


def test_truncated_gzip(compressed):
    whole = compressed.read_bytes()
    compressed.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"corpus.jsonl.gz: the compressed file ends too early after line 1\d\d\d\."):
        load_collection(compressed.parent)
    compressed.write_bytes(whole[:5000] + b"\0" * 300 + whole[5300:])
    with pytest.raises(InputError, match=r"corpus.jsonl.gz: broken gzip|corpus.jsonl.gz, line \d+: "):
        load_collection(compressed.parent)


def test_unknown_layout_says_what_was_looked_for(tmp_path):
    (tmp_path / "data.bin").write_bytes(b"x")
    with pytest.raises(
        InputError, match=r"no corpus \(found: data.bin\)\. A BEIR folder has corpus.jsonl.*mteb/<name>"
    ):
        load_collection(tmp_path)
    with pytest.raises(InputError, match="a file where a folder is expected"):
        load_collection(tmp_path / "data.bin")
    with pytest.raises(InputError, match="no such folder"):
        load_collection(tmp_path / "nothing")
    with pytest.raises(InputError, match="no split 'train'.*Its splits are: test"):
        folder = tmp_path / "b"
        (folder / "qrels").mkdir(parents=True)
        (folder / "corpus.jsonl").write_text(CORPUS)
        (folder / "queries.jsonl").write_text(QUERIES)
        (folder / "qrels" / "test.tsv").write_text(QRELS)
        load_collection(folder, splits=["train"])


def test_judgements_that_may_be_dropped_or_doubled(beir, caplog):
    (beir / "qrels" / "test.tsv").write_text(QRELS + "q1\td9\t1\nq2\td2\t3\n", encoding="utf-8")
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            collection = load_collection(beir, unknown_ids="drop")
        assert judgements(collection) == {"test": {"q1": {"d1": 2}, "q2": {"d2": 3, "d1": 0}}}
        assert "1 judgements of unknown queries or documents were dropped" in caplog.text
        assert "1 judgements are given twice" in caplog.text
    with pytest.raises(InputError, match="unknown_ids"):
        load_collection(beir, unknown_ids="ignore")


def test_queries_without_positives(beir, caplog):
    (beir / "queries.jsonl").write_text(QUERIES + '{"_id": "q3", "text": "?"}\n', encoding="utf-8")
    (beir / "qrels" / "test.tsv").write_text(QRELS.replace("q1\td1\t2", "q1\td1\t0"), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        load_collection(beir)
    assert "split 'test': 1 judged queries have no relevant document, for example 'q1'" in caplog.text
    assert "1 of 3 queries are in no split of the judgements, for example 'q3'" in caplog.text
    with pytest.raises(InputError, match=r"tiny: split 'test': 1 judged queries .*'q1'.*Judge a relevant document"):
        load_collection(beir, require_positives=True)
