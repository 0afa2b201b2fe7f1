"""Streamed rows: the examples of held rows, in an order that processes share and that goes on anywhere."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_distill.data import Corpus, Queries, RowSet, StreamedRows, StreamedTrainingRows, StreamSampler, TrainingRows
from hf_distill.data.streaming import StreamOrder
from hf_distill.errors import InputError

from .hub_client import RemoteError


NUMBER = 101
OPTIONS = {"num_negatives": 3, "seed": 5, "positive": "random", "score_columns": ["scores", "scores_other"]}


@pytest.fixture(scope="module")
def tables() -> tuple[Queries, Corpus]:
    queries = Queries.from_records([{"query_id": f"q{i}", "text": f"question {i}"} for i in range(30)])
    corpus = Corpus.from_records([{"document_id": f"d{i}", "text": f"passage {i}"} for i in range(200)])
    return queries, corpus


@pytest.fixture(scope="module")
def held(tables) -> RowSet:
    """Rows of 5 to 12 documents with 0 to 2 positives, sources and two columns of scores."""
    generator = np.random.default_rng(1)
    documents = [generator.permutation(200)[: generator.integers(5, 13)] for _ in range(NUMBER)]
    return RowSet.from_arrays(
        *tables,
        generator.integers(0, 30, NUMBER),
        documents,
        generator.integers(0, 3, NUMBER),
        sources=[generator.choice(["bm25", "dense"], len(one)).tolist() for one in documents],
        scores=[generator.normal(size=len(one)) for one in documents],
        scores_other=[generator.normal(size=len(one)) for one in documents],
    )


def stored(held: RowSet, folder: Path) -> pa.Table:
    return pq.read_table(next(held.save(folder).glob("*.parquet")))


def write(table: pa.Table, folder: Path, form: str, cuts=(13, 14, 60), group: int = 7) -> Path:
    """The rows in several files, in one of the forms that are streamed."""
    folder.mkdir(parents=True)
    for number, (start, end) in enumerate(zip((0, *cuts), (*cuts, len(table)))):
        part = table.slice(start, end - start)
        name = folder / f"train-{number:05d}-of-{len(cuts) + 1:05d}"
        if form.startswith("parquet"):
            statistics = form == "parquet"
            pq.write_table(part, f"{name}.parquet", row_group_size=group, write_statistics=statistics)
            continue
        # With blank lines, which count as lines and not as rows.
        lines = "".join(
            json.dumps(record) + ("\n\n" if i % 5 == 0 else "\n") for i, record in enumerate(part.to_pylist())
        )
        if form == "jsonl.gz":
            Path(f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        else:
            Path(f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def table(held, tmp_path_factory) -> pa.Table:
    return stored(held, tmp_path_factory.mktemp("stored") / "rows")


@pytest.fixture(scope="module", params=["parquet", "parquet without statistics", "jsonl", "jsonl.gz"])
def folder(request, table, tmp_path_factory) -> Path:
    return write(table, tmp_path_factory.mktemp("files") / "rows", request.param)


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """Units and blocks of a few lines, so that every row set has many."""
    monkeypatch.setattr("hf_distill.data.stream_files._LINES_OF_A_UNIT", 6)
    monkeypatch.setattr("hf_distill.data.stream_files.READ_ROWS", 4)


def opened(folder, tables, **options) -> StreamedTrainingRows:
    return StreamedTrainingRows(StreamedRows.open(folder, *tables), **{**OPTIONS, **options})


def assert_same_example(one, other) -> None:
    assert (one.row, one.query, one.target) == (other.row, other.query, other.target)
    for name in ("documents", "positives"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.scores.keys() == other.scores.keys()
    for name in one.scores:
        np.testing.assert_array_equal(one.scores[name], other.scores[name])


def epoch_of(sampler: StreamSampler, epoch: int, skip: int = 0) -> list:
    sampler.set_epoch(epoch)
    sampler.skip_next(skip)
    return list(sampler)


@pytest.mark.parametrize("options", [{}, {"sampling": "hardest"}, {"sources": {"bm25": 2, "dense": 1}}])
def test_examples_are_those_of_held_rows(options, folder, tables, held):
    streamed = opened(folder, tables, **options)
    expected = TrainingRows(held, **{**OPTIONS, **options})
    assert len(streamed) == len(expected) == NUMBER
    assert streamed.max_positives == expected.max_positives == 2
    for epoch in (0, 3):
        examples = epoch_of(StreamSampler(streamed, 8, seed=2, shuffle_buffer=30), epoch)
        assert len(examples) == 96 == len({example.row for example in examples})
        for example in examples:
            assert_same_example(example, expected[example.row, epoch])
    for one, other in zip(streamed.first_examples(20), expected.first_examples(20), strict=True):
        assert_same_example(one, other)


def test_shuffled_anew_in_every_epoch(folder, tables):
    streamed = opened(folder, tables)
    rows = [[one.row for one in epoch_of(StreamSampler(streamed, 8, seed=2), epoch)] for epoch in (0, 1, 0)]
    assert rows[0] == rows[2] != rows[1]
    other_seed = [one.row for one in epoch_of(StreamSampler(streamed, 8, seed=3), 0)]
    assert other_seed != rows[0] != sorted(rows[0])
    plain = [one.row for one in epoch_of(StreamSampler(streamed, 8, seed=2, shuffle_buffer=0), 1)]
    assert plain == list(range(96))


@pytest.mark.parametrize("processes", [2, 3, 4, 8])
@pytest.mark.parametrize("buffer", [0, 5, 24, 1000])
def test_processes_share_the_batches_of_one(processes, buffer, folder, tables):
    """Also where there are fewer files, or fewer units, than processes: no row twice, none lost."""
    streamed = opened(folder, tables)
    together = processes * 2
    single = epoch_of(StreamSampler(streamed, together, seed=2, shuffle_buffer=buffer), 1)
    shared = [None] * len(single)
    for rank in range(processes):
        settings = {"seed": 2, "shuffle_buffer": buffer, "processes": processes, "rank": rank}
        own = epoch_of(StreamSampler(streamed, 2, **settings), 1)
        assert len(own) == len(single)
        for place, example in enumerate(own):
            mine = place // 2 % processes == rank
            assert (example is not None) == mine
            if mine:
                shared[place] = example
    for one, other in zip(single, shared, strict=True):
        assert_same_example(one, other)


@pytest.mark.parametrize("skip", [1, 5, 11, 12])
def test_going_on_reads_only_what_follows(skip, folder, tables, monkeypatch):
    streamed = opened(folder, tables)
    sampler = StreamSampler(streamed, 4, seed=2, shuffle_buffer=16, processes=2, rank=1)
    whole = epoch_of(sampler, 2)
    drawn = []
    original = TrainingRows.__getitem__
    monkeypatch.setattr(TrainingRows, "__getitem__", lambda self, key: drawn.append(key) or original(self, key))
    rest = epoch_of(sampler, 2, skip)
    assert rest[: skip * 8] == [None] * (skip * 8)
    assert len(drawn) == (12 - skip) * 4
    for one, other in zip(whole[skip * 8 :], rest[skip * 8 :], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_same_example(one, other)
    assert epoch_of(sampler, 2)[4] is not None  # only one iteration skips


def test_a_stream_reads_no_unit_before_it_needs_it(table, tables, tmp_path, monkeypatch):
    """A process of four reads the lanes of its own rows; after a resume, from the buffer on in which it stopped."""
    from hf_distill.data.stream_files import ParquetRows

    streamed = opened(write(table, tmp_path / "rows", "parquet", group=2), tables)
    read = []
    original = ParquetRows.blocks

    def watched(self, unit, start, columns):
        for block in original(self, unit, start, columns):
            read.append(len(block))
            yield block

    monkeypatch.setattr(ParquetRows, "blocks", watched)
    settings = {"seed": 2, "shuffle_buffer": 16, "processes": 4, "rank": 2}
    epoch_of(StreamSampler(streamed, 4, **settings), 0)
    assert sum(read) < 0.5 * NUMBER
    whole = sum(read)
    read.clear()
    epoch_of(StreamSampler(streamed, 4, **settings), 0, skip=5)
    assert sum(read) < 0.6 * whole


@settings(deadline=None, max_examples=150)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    batch=st.integers(1, 48),
    buffer=st.integers(0, 200),
    seed=st.integers(0, 3),
    data=st.data(),
)
def test_order_visits_every_row_once(sizes, batch, buffer, seed, data):
    order = StreamOrder(np.array(sizes), batch, buffer, seed)
    assert order.batches == sum(sizes) // batch and order.lanes * order.width == batch
    seen = []
    for lane in range(order.lanes):
        rows = [(unit, start + i) for unit, start, count in order.segments(1, lane) for i in range(count)]
        assert len(rows) == order.batches * order.width
        seen += rows
        if rows:
            begin = data.draw(st.integers(0, len(rows)))
            later = [(unit, start + i) for unit, start, count in order.segments(1, lane, begin) for i in range(count)]
            assert later == rows[begin:]
    assert len(set(seen)) == len(seen) == order.batches * batch
    assert all(0 <= row < sizes[unit] for unit, row in seen)


def test_shuffling_mixes_distant_rows(table, tables, tmp_path):
    """Neighbours in a batch come from all over the file, although only some rows are in memory together."""
    streamed = opened(write(table, tmp_path / "rows", "parquet", group=4), tables)
    rows = [example.row for example in epoch_of(StreamSampler(streamed, 16, seed=0, shuffle_buffer=32), 0)]
    spans = [max(batch) - min(batch) for batch in (rows[i : i + 16] for i in range(0, 96, 16))]
    assert min(spans) > NUMBER / 2


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_neither_repeat_nor_lose(workers, folder, tables):
    streamed = opened(folder, tables)
    loader = DataLoader(
        streamed, 8, sampler=StreamSampler(streamed, 8, seed=4), num_workers=workers, collate_fn=list, drop_last=True
    )
    rows = [example.row for batch in loader for example in batch]
    assert rows == [example.row for example in epoch_of(StreamSampler(streamed, 8, seed=4), 0)]


def test_rows_that_were_to_be_passed_over_are_not_trained_on(folder, tables):
    streamed = opened(folder, tables)
    sampler = StreamSampler(streamed, 8)
    sampler.skip_next(1)
    with pytest.raises(RuntimeError, match="to be skipped"):
        next(iter(DataLoader(streamed, 8, sampler=sampler, collate_fn=list)))


# ---- Opening ----
def test_a_file_alone_a_folder_with_a_card_and_a_collection(table, tables, tmp_path):
    file = write(table, tmp_path / "a", "jsonl", cuts=()) / "train-00000-of-00001.jsonl"
    assert len(StreamedRows.open(file, *tables)) == NUMBER
    (tmp_path / "b").mkdir()
    write(table, tmp_path / "b" / "mined", "parquet")
    write(table, tmp_path / "b" / "scored", "parquet", cuts=(3,))
    assert len(StreamedRows.open(tmp_path / "b", *tables, config="scored")) == NUMBER
    with pytest.raises(InputError, match="no row set 'other'.*mined, scored"):
        StreamedRows.open(tmp_path / "b", *tables, config="other")


def test_fingerprints_follow_the_content(table, tables, tmp_path):
    one, again = (
        StreamedRows.open(write(table, tmp_path / name, "parquet"), *tables).fingerprint for name in ("one", "again")
    )
    other = table.set_column(table.column_names.index("scores"), "scores", table.column("scores_other"))
    assert one == again
    assert StreamedRows.open(write(other, tmp_path / "other", "parquet"), *tables).fingerprint != one
    fewer = Corpus.from_records([{"document_id": f"d{i}", "text": f"passage {i}!"} for i in range(200)])
    assert StreamedRows.open(tmp_path / "one", tables[0], fewer).fingerprint != one


def test_rows_without_num_positives_are_unlabelled(table, tables, tmp_path, caplog):
    caplog.set_level("WARNING", logger="hf_distill")
    streamed = opened(write(table.drop_columns(["num_positives"]), tmp_path / "rows", "parquet"), tables)
    examples = epoch_of(StreamSampler(streamed, 8), 0)
    assert {example.target for example in examples} == {-1} and not streamed.rows.has_positives
    assert sum("unlabelled" in record.getMessage() for record in caplog.records) == 1


# ---- Bad input ----
def changed(table: pa.Table, row: int, name: str, value) -> pa.Table:
    values = table.column(name).to_pylist()
    values[row] = value(values[row]) if callable(value) else value
    return table.set_column(table.column_names.index(name), name, pa.array(values, table.schema.field(name).type))


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("query_id", "q999", "'q999' is not among the 30 queries"),
        ("document_ids", lambda ids: [f"no{name}" for name in ids], r"'nod\d+' is not among the 200 documents"),
        ("document_ids", lambda ids: [ids[-1], *ids[1:]], "documents 1 and \\d+ of the row are the same"),
        ("num_positives", 77, "77 positives where the row has"),
        ("scores", [1.0], "1 entries for"),
    ],
)
def test_a_bad_row_is_named(form, name, value, problem, table, tables, tmp_path):
    folder = write(changed(table, 40, name, value), tmp_path / "rows", form)
    with pytest.raises(InputError, match=problem) as error:
        epoch_of(StreamSampler(opened(folder, tables), 101), 0)
    # The 27th row of the third file; one line in five is followed by a blank one.
    place = "00002-of-00004.parquet, row 27" if form == "parquet" else "00002-of-00004.jsonl, line 33"
    assert place in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("rows.parquet", b"PAR1 no parquet", "[Pp]arquet"),
        ("rows.jsonl", b'{"query_id": "q1", "document_ids": ["d1"]}\n{"query_id": ', "line 2: not a JSON object"),
        ("rows.jsonl", b'{"query_id": "q1", "document_ids": ["d1"]}\n\xff\n', "line 2: byte 1 of the line"),
        ("rows.jsonl.gz", gzip.compress(b'{"query_id": "q1", "document_ids": ["d1"]}\n' * 99)[:-9], "cannot be read"),
        ("rows.jsonl", b"\n", "no rows in it"),
        ("rows.jsonl", b'{"query_id": "q1"}\n', "no column 'document_ids'"),
        ("rows.tsv", b"query_id\tdocument_ids\nq1\td1\n", "only parquet and JSON lines"),
    ],
)
def test_a_bad_file_is_named_when_it_is_opened(name, content, problem, tables, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=problem) as error:
        StreamedRows.open(tmp_path / name, *tables)
    assert name in str(error.value)


def test_files_of_other_columns_and_unknown_columns(table, tables, tmp_path):
    folder = write(table, tmp_path / "rows", "parquet")
    with pytest.raises(InputError, match="no column 'scores_third'.*'scores', 'scores_other'"):
        opened(folder, tables, score_columns=["scores_third"])
    pq.write_table(table.drop_columns(["scores"]), folder / "train-00009-of-00010.parquet")
    with pytest.raises(InputError, match="00009-of-00010.parquet.*the same columns"):
        StreamedRows.open(folder, *tables)


def test_a_file_that_vanishes_meanwhile(folder, tables, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "rows")
    streamed = opened(copy, tables)
    shutil.rmtree(copy)
    with pytest.raises(InputError, match="training goes on from its last checkpoint"):
        epoch_of(StreamSampler(streamed, 8), 0)


# ---- The Hub ----
CARD = b"""---
configs:
- config_name: mined
  data_files: [{split: train, path: mined/*.parquet}]
- config_name: lines
  data_files: [{split: train, path: lines/*.jsonl}]
- config_name: corpus
  data_files: [{split: train, path: corpus/*.parquet}]
---
"""


def _stream_from_the_hub(config, skip):
    """What one epoch gives after `skip` batches, and how many bytes were fetched for it."""
    from huggingface_hub.hf_file_system import HfFileSystemFile

    fetched = []
    original = HfFileSystemFile._fetch_range
    HfFileSystemFile._fetch_range = lambda self, start, end: fetched.append(end - start) or original(self, start, end)
    try:
        queries = Queries.from_records([{"query_id": f"q{i}", "text": f"question {i}"} for i in range(30)])
        corpus = Corpus.from_records([{"document_id": f"d{i}", "text": f"passage {i}"} for i in range(200)])
        rows = StreamedRows.open("alice/rows", queries, corpus, config=config)
        streamed = StreamedTrainingRows(rows, num_negatives=3, seed=5)
        sampler = StreamSampler(streamed, 8, seed=2, shuffle_buffer=64)
        sampler.skip_next(skip)
        examples = [(one.row, one.documents.tolist()) for one in sampler if one is not None]
    finally:
        HfFileSystemFile._fetch_range = original
    return {"rows": len(rows), "examples": examples, "bytes": sum(fetched), "fingerprint": rows.fingerprint}


@pytest.fixture()
def hub_rows(hub, held, table, tmp_path):
    """`alice/rows` on the loopback Hub: 30 times the rows of `held` beside columns that nobody asks for."""
    generator = np.random.default_rng(0)
    many = pa.concat_tables([table] * 30)
    lengths = np.array([len(ids) for ids in many.column("document_ids").to_pylist()])
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    for number in range(20):
        values = pa.array(generator.normal(size=lengths.sum()), pa.float32())
        many = many.append_column(f"scores_{number}", pa.ListArray.from_arrays(offsets, values))
    files = {"README.md": CARD}
    for number, start in enumerate((0, 1600)):
        path = tmp_path / f"{number}.parquet"
        part = many.slice(start, 1600 if number == 0 else None)
        pq.write_table(part, path, row_group_size=400)
        files[f"mined/train-0000{number}-of-00002.parquet"] = path.read_bytes()
    lines = "".join(json.dumps(record) + "\n" for record in table.to_pylist())
    files["lines/train.jsonl"] = lines.encode()
    hub.add_repo("alice/rows", files, kind="dataset", private=True)
    return sum(len(content) for name, content in files.items() if name.endswith(".parquet"))


def test_parts_of_files_on_the_hub(hub, hub_client, hub_rows, held):
    seen = hub_client(_stream_from_the_hub, "mined", 0)
    assert seen["rows"] == 30 * NUMBER and len(seen["examples"]) == 30 * NUMBER // 8 * 8
    assert len({row for row, _ in seen["examples"]}) == len(seen["examples"])
    # The examples of a row set of the same rows; nothing was kept, and the columns that were not asked for stayed.
    for row, documents in seen["examples"][::97]:
        assert set(documents) <= set(held.documents_at(row % NUMBER))
    assert 10_000 < seen["bytes"] < 0.6 * hub_rows
    got = {request.status for request in hub.requests if request.method == "GET" and request.path.endswith(".parquet")}
    assert got == {206}  # parts of files, and nothing else
    # Going on near the end fetches little.
    late = hub_client(_stream_from_the_hub, "mined", 370)
    assert late["examples"] == seen["examples"][370 * 8 :]
    assert late["bytes"] < seen["bytes"]
    assert late["fingerprint"] == seen["fingerprint"]


def test_lines_on_the_hub_and_faults(hub, hub_client, hub_rows):
    hub.fail("GET .*lines/train.jsonl", 503, times=3)
    seen = hub_client(_stream_from_the_hub, "lines", 4)
    assert seen["rows"] == NUMBER and len(seen["examples"]) == 96 - 32
    hub.fail("GET .*lines/train.jsonl", 503, times=1000)
    with pytest.raises(RemoteError, match="InputError.*training goes on from its last checkpoint"):
        hub_client(_stream_from_the_hub, "lines", 4)
    with pytest.raises(RemoteError, match="InputError.*several row sets.*Name one of: mined, lines"):
        hub_client(_stream_from_the_hub, None, 0)
    with pytest.raises(RemoteError, match="InputError.*the Hub says"):
        hub_client(_stream_from_the_hub, "mined", 0, env={"HF_TOKEN": "hf_bob"})
