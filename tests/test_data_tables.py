"""Queries and corpus: lookup, texts, fingerprints, and what happens to bad rows."""

from __future__ import annotations

import csv
import gzip
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.data import lookup
from hf_distill.data.arrow import Column, ContentHash
from hf_distill.data.readers import read_blocks
from hf_distill.data.tables import DEFAULT_TEMPLATE, Corpus, Queries, render_passage
from hf_distill.errors import InputError


# Any text that UTF-8 can hold; identifiers also do without the characters that would break a TREC line.
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
IDS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\t\n\v\f\r\0"), min_size=1, max_size=6)


# The machine may be busy; a slow example is no failure.
examples = settings(deadline=None, max_examples=50)


def corpus_of(*ids: str) -> Corpus:
    return Corpus.from_records([{"document_id": name, "text": f"text of {name}"} for name in ids])


def test_passage_with_and_without_title():
    assert render_passage("Moon", "It is far.") == "Moon It is far."
    assert render_passage("", "It is far.") == render_passage(None, "It is far.") == "It is far."
    assert render_passage("Moon", "") == "Moon"
    assert render_passage("Moon", "It is far.", "{title}[SEP]{text}") == "Moon[SEP]It is far."
    assert render_passage("{text}", "{title}") == "{text} {title}"


@pytest.mark.parametrize("template", ["{title}", "{text} {author}", "{text", "{title.__class__} {text}", "plain"])
def test_template_that_is_none(template):
    with pytest.raises(InputError, match="passage template"):
        render_passage("a", "b", template)


@examples
@given(title=TEXTS, text=TEXTS)
def test_corpus_renders_as_the_one_function_does(title, text):
    corpus = Corpus.from_records([{"document_id": "x", "title": title, "text": text}])
    expected = (title + " " + text).strip()
    assert corpus.texts() == [expected] == [render_passage(title, text, DEFAULT_TEMPLATE)]


@examples
@given(ids=st.lists(IDS, unique=True, max_size=40), others=st.lists(IDS, max_size=10))
def test_lookup_equals_a_dictionary(ids, others):
    table = corpus_of(*ids)
    places = {name: number for number, name in enumerate(ids)}
    wanted = [*others, *reversed(ids)]
    assert table.positions(wanted).tolist() == [places.get(name, -1) for name in wanted]
    assert table.positions(pa.array(wanted, pa.string())).tolist() == [places.get(name, -1) for name in wanted]
    assert table.ids_at(range(len(ids))) == list(table.ids) == table.ids[:] == ids


def test_lookup_where_hashes_collide(monkeypatch):
    def poor_hashes(ids, count):
        return np.fromiter((len(name) for name in ids), dtype=np.uint64, count=count)

    monkeypatch.setattr(lookup, "hash_ids", poor_hashes)
    ids = [f"{number:02d}" for number in range(50)] + ["a", "b"]
    table = corpus_of(*ids)
    assert table.positions([*ids[::-1], "zz", "c", "longer"]).tolist() == [*range(51, -1, -1), -1, -1, -1]
    with pytest.raises(InputError, match="'07' is used twice"):
        corpus_of(*ids, "07")


def test_integers_and_impossible_strings_as_identifiers():
    table = Queries.from_records([{"_id": 3, "text": "three"}, {"_id": "4", "text": "four"}])
    assert list(table.ids) == ["3", "4"]
    assert table.positions([4, "3", "\ud800"]).tolist() == [1, 0, -1]


@examples
@given(st.data())
def test_rows_of_a_chunked_column(data):
    chunks = data.draw(st.lists(st.lists(TEXTS, max_size=5), min_size=1, max_size=6))
    flat = [text for chunk in chunks for text in chunk]
    column = Column(pa.chunked_array([pa.array(chunk, pa.string()) for chunk in chunks], pa.string()))
    positions = data.draw(st.lists(st.integers(0, len(flat) - 1), max_size=12)) if flat else []
    assert column.take(positions).to_pylist() == [flat[position] for position in positions]
    for bad in (-1, len(flat)):
        with pytest.raises(IndexError):
            column.take([*positions, bad])


def test_selection_shows_other_rows_in_other_order():
    table = corpus_of("a", "b", "c", "d")
    part = table.select([3, 1]).select([1, 0])
    assert list(part.ids) == ["b", "d"] and part.texts() == ["text of b", "text of d"]
    assert part.positions(["d", "a", "b"]).tolist() == [1, -1, 0]
    assert part.dataset["document_id"][:] == ["b", "d"]
    assert part.fingerprint == corpus_of("b", "d").fingerprint != table.fingerprint
    assert isinstance(part, Corpus)
    for bad in ([4], [-1]):
        with pytest.raises(IndexError):
            table.select(bad)
        with pytest.raises(IndexError):
            part.texts(bad)


def write_corpus(folder, records) -> dict[str, object]:
    """The same corpus in every format that is read."""
    paths = {kind: folder / f"corpus.{kind}" for kind in ("jsonl", "jsonl.gz", "parquet", "csv", "tsv")}
    lines = "".join(json.dumps(record) + "\n" for record in records)
    paths["jsonl"].write_text(lines, encoding="utf-8")
    paths["jsonl.gz"].write_bytes(gzip.compress(lines.encode()))
    table = pa.table({name: [record[name] for record in records] for name in records[0]})
    # Two row groups and other string types: what was written differently has the same content.
    table = table.set_column(2, "text", table.column("text").cast(pa.large_string()))
    pq.write_table(table, paths["parquet"], row_group_size=2)
    with open(paths["csv"], "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    rows = [list(records[0]), *([record[name] for name in records[0]] for record in records)]
    paths["tsv"].write_text("".join("\t".join(row) + "\r\n" for row in rows), encoding="utf-8")
    return paths


def test_fingerprint_is_of_the_content_not_of_the_file(tmp_path):
    records = [
        {"_id": "d1", "title": "", "text": 'He said "no".'},
        {"_id": "é2", "title": "Mond", "text": "weit\u2028weg, 月"},
        {"_id": "3 x", "title": "a", "text": ""},
    ]
    expected = Corpus.from_records(records)
    for kind, path in write_corpus(tmp_path, records).items():
        table = Corpus.from_blocks(read_blocks(path), kind, where=str(path))
        assert table.dataset.to_list() == expected.dataset.to_list(), kind
        assert table.fingerprint == expected.fingerprint, kind
    moved = [{**records[0], "title": "H", "text": 'e said "no".'}, *records[1:]]
    for other in (records[::-1], records[:2], moved):
        assert Corpus.from_records(other).fingerprint != expected.fingerprint


@examples
@given(texts=st.lists(TEXTS, max_size=12), cut=st.integers(0, 12))
def test_content_hash_does_not_see_blocks(texts, cut):
    whole, parts = ContentHash(["x"]), ContentHash(["x"])
    table = pa.table({"x": pa.array(texts, pa.string())})
    whole.update(table)
    parts.update(table.slice(0, cut))
    parts.update(table.slice(cut))
    assert whole.hexdigest() == parts.hexdigest()


def test_csv_fields_with_line_breaks(tmp_path):
    path = tmp_path / "corpus.csv"
    path.write_text('_id,text\nd1,"two\nlines"\n\nd2,one\nd1,again\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"corpus.csv, line 6, .*'d1' is used twice, also in .*corpus.csv, line 2"):
        Corpus.from_blocks(read_blocks(path), "x", where=str(path))
    path.write_text('_id,text\nd1,"two\nlines"\nd2,"open\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"corpus.csv, line 4: not a row of comma-separated values"):
        Corpus.from_blocks(read_blocks(path), "x", where=str(path))


def test_memory_mapped_table_travels_as_paths(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(f'{{"_id": "d{i}", "text": "{"x" * 500}"}}\n' for i in range(2000)), encoding="utf-8")
    table = Corpus.from_blocks(read_blocks(path), "x", where=str(path))
    table.positions(["d7"]), table.texts([7])
    sent = pickle.dumps(table)
    assert len(sent) < 20_000
    copy = pickle.loads(sent)
    assert copy.positions(["d1999"]).tolist() == [1999] and copy.fingerprint == table.fingerprint


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"text": "a"}], "records.*no column 'document_id'.*_id"),
        ([{"_id": "1", "text": "a"}, {"text": "b"}], "records, row 2, field '_id'.*missing"),
        ([{"_id": "1", "text": "a"}, {"_id": "", "text": "b"}], "records, row 2, field '_id'.*empty"),
        ([{"_id": "1", "text": "a"}, {"_id": "1", "text": "b"}], "row 2, .*'1' is used twice, also in .*row 1"),
        ([{"_id": 1, "text": "a"}, {"_id": "1", "text": "b"}], "row 2, .*'1' is used twice, also in .*row 1"),
        ([{"_id": "a\tb", "text": "a"}], "row 1, field '_id'.*tab, line break"),
        ([{"_id": True, "text": "a"}], "row 1, field '_id'.*'True' is a bool"),
        ([{"_id": 1.5, "text": "a"}], "row 1, field '_id'.*'1.5' is a float"),
        ([{"_id": "1"}], "no column 'text'"),
        ([{"_id": "1", "text": "a"}, {"_id": "2", "text": None}], "row 2, field 'text'.*text is missing"),
        ([{"_id": "1", "text": "a"}, {"_id": "2", "text": 7}], "row 2, field 'text'.*'7' is a int"),
        ([{"_id": "1", "text": "a"}, {"_id": "2", "text": "\ud83d"}], "row 2, field 'text'.*surrogate"),
        ([{"_id": "1", "text": "a", "title": ["x"]}], "row 1, field 'title'.*is a list"),
    ],
)
def test_bad_records(records, message):
    with pytest.raises(InputError, match=message):
        Corpus.from_records(records)


def test_bad_parquet(tmp_path):
    path = tmp_path / "corpus.parquet"
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    pq.write_table(pa.table({"_id": ["a"], "text": broken}), path)
    with pytest.raises(InputError, match="corpus.parquet, row 1, field 'text'.*not UTF-8"):
        Corpus.from_blocks(read_blocks(path), "x", where=str(path))
    pq.write_table(pa.table({"_id": [1.5], "text": ["a"]}), path)
    with pytest.raises(InputError, match="corpus.parquet, field '_id'.*type double"):
        Corpus.from_blocks(read_blocks(path), "y", where=str(path))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="corpus.parquet: not a readable parquet file"):
        Corpus.from_blocks(read_blocks(path), "z", where=str(path))


@examples
@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=8))
def test_json_lines_round_trip(tmp_path_factory, pairs):
    path = tmp_path_factory.mktemp("lines") / "corpus.jsonl"
    records = [{"_id": str(i), "title": title, "text": text} for i, (title, text) in enumerate(pairs)]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    read = [dict(zip(block.columns, values)) for block in read_blocks(path) for values in zip(*block.columns.values())]
    assert read == records
