"""Conversion: any format into the contract's folder, resumable, in bounded memory, there only when it is complete."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from hf_distill.data import RowSet, load_collection
from hf_distill.data.formats import conversion
from hf_distill.data.formats.conversion import convert, working_folder
from hf_distill.data.formats.opening import open_inputs
from hf_distill.errors import InputError


def run(inputs, target, **options):
    """A conversion as the command line does it: what is kept on the way lies beside the output."""
    names = ("format", "allow_pickle", "corpus_columns", "revision")
    opening = {name: options.pop(name) for name in names if name in options}
    inputs = [str(item) for item in (inputs if isinstance(inputs, list) else [inputs])]
    return convert(open_inputs(inputs, cache_dir=working_folder(target) / ".cache", **opening), target, **options)


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture()
def msmarco(tmp_path):
    """600 passages with titles, 60 queries, judgements, negatives and triples in random order."""
    folder = tmp_path / "msmarco"
    folder.mkdir()
    generator = random.Random(0)
    passages = [f'{number}\t"passage {number} {"x" * generator.randrange(60)}' for number in range(600)]
    (folder / "collection.tsv").write_text("\n".join(passages))
    (folder / "titles.tsv.gz").write_bytes(
        gzip.compress("".join(f"{number}\ttitle {number}\n" for number in reversed(range(600))).encode())
    )
    (folder / "queries.train.tsv").write_text("".join(f"q{number}\tquery {number}\n" for number in range(60)))
    (folder / "qrels.train.tsv").write_text("".join(f"q{number}\t0\t{number}\t1\n" for number in range(60)))
    negatives = [generator.sample(range(600), 20) for _ in range(60)]
    (folder / "train.negatives.tsv").write_text(
        "".join(f"q{number}\t{','.join(map(str, ids))}\n" for number, ids in enumerate(negatives))
    )
    triples = [f"q{number}\t{number}\t{document}" for number, ids in enumerate(negatives) for document in ids]
    generator.shuffle(triples)
    (folder / "qidpidtriples.train.tsv").write_text("\n".join(triples))
    return folder


def test_every_part_is_there_and_others_read_it(msmarco, tmp_path):
    done = run(msmarco, tmp_path / "out")
    assert {part.label: part.rows for part in done.parts} == {
        "corpus": 600, "queries": 60, "qrels/train": 60, "qidpidtriples.train": 60, "train.negatives": 60,
    }  # fmt: skip
    collection = load_collection(tmp_path / "out", require_positives=True)
    assert collection.corpus.texts([7])[0].startswith('title 7 "passage 7 ')
    rows = collection.rows("qidpidtriples.train")
    assert len(rows) == 60 and set(rows.num_positives.tolist()) == {1}
    again = RowSet.load(tmp_path / "out" / "train.negatives", collection.queries, collection.corpus)
    assert again.fingerprint == collection.rows("train.negatives").fingerprint
    corpus = datasets.load_dataset(str(tmp_path / "out"), "corpus", cache_dir=str(tmp_path / "hf"))
    assert corpus["corpus"].column_names == ["document_id", "title", "text"] and len(corpus["corpus"]) == 600
    facts = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert facts["parts"]["corpus"]["rows"] == 600 and facts["source"] == str(msmarco)
    # Nothing is left beside it.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "msmarco", "out"]


def test_our_own_layout_and_beir_are_converted_too(micro, tmp_path):
    run(micro, tmp_path / "once")
    run(tmp_path / "once", tmp_path / "twice")
    fingerprints = {load_collection(folder).fingerprint for folder in (micro, tmp_path / "once", tmp_path / "twice")}
    assert len(fingerprints) == 1


def test_small_files_hold_the_same_rows(msmarco, tmp_path, monkeypatch):
    run(msmarco, tmp_path / "one")
    monkeypatch.setattr(conversion, "_FILE_ROWS", 1)
    monkeypatch.setattr("hf_distill.data.lines._BLOCK_BYTES", 4000)
    run(msmarco, tmp_path / "many")
    assert len(list((tmp_path / "many" / "corpus").glob("corpus-*-of-*.parquet"))) > 5
    one, many = load_collection(tmp_path / "one"), load_collection(tmp_path / "many")
    assert one.fingerprint == many.fingerprint
    for name in one.row_sets:
        assert one.rows(name).fingerprint == many.rows(name).fingerprint


SCRIPT = """
import sys, time
from hf_distill.data import lines
from hf_distill.data.formats import conversion
from hf_distill.data.formats.conversion import convert, working_folder
from hf_distill.data.formats.opening import open_inputs

source, target, pause = sys.argv[1:]
lines._BLOCK_BYTES = 2000
conversion._FILE_ROWS = 40
write = conversion._write_file

def slowly(*arguments):
    time.sleep(float(pause))
    write(*arguments)

conversion._write_file = slowly
convert(open_inputs([source], cache_dir=working_folder(target) / ".cache"), target)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_the_same_bytes(msmarco, tmp_path):
    environment = {**os.environ, "HF_DISTILL_PROGRESS": "0"}

    def start(target: Path, pause: float) -> subprocess.Popen:
        command = [sys.executable, "-c", SCRIPT, str(msmarco), str(target), str(pause)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    reference = start(tmp_path / "whole", 0)
    assert reference.wait(120) == 0, reference.stderr.read()
    expected = files_of(tmp_path / "whole")
    target, generator, kept = tmp_path / "killed", random.Random(1), []
    work = working_folder(target)
    for _ in range(5):
        process = start(target, 0.05)
        goal = (kept or [0])[-1] + generator.randrange(5)
        while process.poll() is None and len(list(work.rglob("*.parquet"))) < goal:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.1))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept.append(len(list(work.rglob("*.parquet"))))
        assert not target.exists()
    assert len(kept) >= 3 and kept == sorted(kept) and kept[-1] > 0
    last = start(target, 0)
    assert last.wait(120) == 0, last.stderr.read()
    assert files_of(target) == expected
    assert not work.exists() and not list(tmp_path.glob(".killed*"))


def test_finished_files_are_not_written_again(msmarco, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_distill.data.sources._ALWAYS_HASHED", 10)
    write, written = conversion._write_file, []
    monkeypatch.setattr("hf_distill.data.lines._BLOCK_BYTES", 4000)
    monkeypatch.setattr(conversion, "_FILE_ROWS", 100)

    def counted(path, *arguments, limit=None):
        if len(written) == limit:
            raise KeyboardInterrupt
        written.append(f"{path.parent.name}/{path.name}")
        write(path, *arguments)

    monkeypatch.setattr(conversion, "_write_file", partial(counted, limit=5))
    with pytest.raises(KeyboardInterrupt):
        run(msmarco, tmp_path / "out")
    assert len(written) == 5 and not (tmp_path / "out").exists()
    monkeypatch.setattr(conversion, "_write_file", counted)
    assert run(msmarco, tmp_path / "out").resumed
    assert len(written) > 5 and len(set(written)) == len(written)
    total = len(written)
    assert run(msmarco, tmp_path / "out").resumed  # done already: nothing is written
    assert len(written) == total and not working_folder(tmp_path / "out").exists()


def test_changed_input_starts_anew(msmarco, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_publish", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(msmarco, tmp_path / "out")
    text = (msmarco / "collection.tsv").read_text().replace("passage 7 ", "another 7 ")
    (msmarco / "collection.tsv").write_text(text)
    with caplog.at_level("WARNING", "hf_distill"):
        assert not run(msmarco, tmp_path / "out").resumed
    assert "unfinished work on other input or settings is removed" in caplog.text
    assert "another 7 " in load_collection(tmp_path / "out").corpus.texts([7])[0]
    with pytest.raises(InputError, match="out: the folder is not empty"):
        run(msmarco, tmp_path / "out", name="other")


def test_one_conversion_at_a_time(msmarco, tmp_path):
    with FileLock(tmp_path / ".out.lock"):
        with pytest.raises(InputError, match="out: another process is working on this"):
            run(msmarco, tmp_path / "out")


def test_repositories_on_the_hub_beside_files(msmarco, tmp_path, monkeypatch):
    (tmp_path / "snapshot").mkdir()
    (msmarco / "train.negatives.tsv").rename(tmp_path / "snapshot" / "bm25.tsv")
    (tmp_path / "snapshot" / "scores.pkl").write_bytes(pickle.dumps({"q0": {number: 1.5 for number in range(600)}}))
    asked = []

    def fetch(repo, revision, patterns):
        asked.append((repo, revision, "*.pkl" in patterns))
        return tmp_path / "snapshot"

    monkeypatch.setattr("hf_distill.data.formats.opening.fetch_data_files", fetch)
    files = [
        f"{role}={msmarco / name}" for role, name in (("corpus", "collection.tsv"), ("queries", "queries.train.tsv"))
    ]
    run(["me/negatives", *files], tmp_path / "plain", revision="v1")
    run(["me/negatives", *files], tmp_path / "scored", revision="v1", allow_pickle=True)
    assert asked == [("me/negatives", "v1", False), ("me/negatives", "v1", True)]
    plain, scored = (load_collection(tmp_path / name).rows("bm25") for name in ("plain", "scored"))
    assert len(plain) == 60 and plain.columns == ["sources"]
    assert len(scored) == 1 and set(scored.values_at("scores", 0).tolist()) == {1.5}


def test_unknown_identifiers(msmarco, tmp_path):
    (msmarco / "qrels.train.tsv").write_text("q0\t0\t0\t1\nq99\t0\t1\t1\nq1\t0\t999\t1\n")
    (msmarco / "train.negatives.tsv").write_text("q0\t0,5,777\nq99\t1\nq1\t888\n")
    with pytest.raises(InputError, match="qrels.train.tsv, line 2, field 'query_id': 'q99' is not among"):
        run(msmarco, tmp_path / "out")
    done = run(msmarco, tmp_path / "out", unknown_ids="drop")
    notes = {
        part.label: {reason: entry["count"] for reason, entry in part.notes.counts.items()} for part in done.parts
    }
    assert notes["qrels/train"] == {
        "rows name unknown queries and were left out": 1, "rows name unknown documents and were left out": 1,
    }  # fmt: skip
    assert notes["train.negatives"]["rows name unknown queries and were left out"] == 1
    assert notes["train.negatives"]["entries name unknown documents and were left out"] == 2 + 1
    collection = load_collection(tmp_path / "out")
    rows = collection.rows("train.negatives")
    assert rows.num_positives.tolist() == [1] and collection.corpus.ids_at(rows.documents_at(0)) == ["0", "5"]


def test_rows_without_a_collection(msmarco, tmp_path):
    run([msmarco / "train.negatives.tsv"], tmp_path / "rows")
    run([msmarco], tmp_path / "out")
    collection = load_collection(tmp_path / "out")
    rows = RowSet.load(tmp_path / "rows" / "train.negatives", collection.queries, collection.corpus)
    assert len(rows) == 60 and set(rows.num_positives.tolist()) == {0}


def test_files_that_say_what_they_are(tmp_path):
    (tmp_path / "a.txt").write_text("1\tone passage\tOne\n2\ttwo passage\tTwo\n")
    (tmp_path / "b.txt").write_text("q\twhat is it\n")
    (tmp_path / "c.txt").write_text("q\t2\n")
    inputs = [f"corpus={tmp_path / 'a.txt'}", f"queries={tmp_path / 'b.txt'}", f"negatives:hard={tmp_path / 'c.txt'}"]
    run(inputs, tmp_path / "out", corpus_columns=["document_id", "text", "title"], name="mine")
    collection = load_collection(tmp_path / "out")
    assert collection.name == "mine" and collection.corpus.texts() == ["One one passage", "Two two passage"]
    assert collection.row_sets == ("hard",)
    with pytest.raises(InputError, match="b.txt: it does not show what it is. Say it, for example --input"):
        run([tmp_path / "b.txt"], tmp_path / "other")
    with pytest.raises(InputError, match="--format: 'tsv' is no format. Choose one of: auto, collection, corpus"):
        run([tmp_path / "b.txt"], tmp_path / "other", format="tsv")
    with pytest.raises(InputError, match="nowhere/at/all: no such file or folder"):
        run(["nowhere/at/all"], tmp_path / "other")


def test_triples_of_texts(tmp_path):
    (tmp_path / "triples.train.small.tsv").write_text(
        'what is it\t"one passage\ttwo passage\nwhat is it\t"one passage\tthree\n\nwho\ttwo passage\tthree\n'
    )
    done = run([tmp_path / "triples.train.small.tsv"], tmp_path / "out")
    assert {part.label: part.rows for part in done.parts} == {
        "corpus": 3, "queries": 2, "qrels/train": 2, "train": 3,
    }  # fmt: skip
    collection = load_collection(tmp_path / "out")
    assert collection.corpus.texts() == ['"one passage', "two passage", "three"]
    rows = collection.rows("train")
    assert [rows.documents_at(row).tolist() for row in range(3)] == [[0, 1], [0, 2], [1, 2]]
    assert run([tmp_path / "triples.train.small.tsv"], tmp_path / "out").resumed


def test_bad_rows_name_their_place(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    table = pa.table({"query_id": ["q"], "document_ids": [["a", "a"]], "num_positives": [1]})
    pq.write_table(table, folder / "train.parquet")
    with pytest.raises(InputError, match="train.parquet, row 1, field 'document_ids': documents 1 and 2 of the row"):
        run(folder, tmp_path / "out")


MEMORY = """
import sys
from hf_distill.data import lines, readers
from hf_distill.data.formats import grouping
from hf_distill.data.formats.conversion import convert, working_folder
from hf_distill.data.formats.opening import open_inputs

lines._BLOCK_BYTES = 2**19
readers.BLOCK_ROWS = 256
grouping._BUCKET_BYTES, grouping._LINES = 2**17, 4096
convert(open_inputs([sys.argv[1]], cache_dir=working_folder(sys.argv[2]) / ".cache"), sys.argv[2])
assert "torch" not in sys.modules
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["collection.tsv", "train.jsonl.gz", "triples.tsv"])
def test_memory_does_not_grow_with_the_input(tmp_path, kind):
    def line(number: int) -> str:
        if kind == "collection.tsv":
            return f"{number}\t{number} {'word ' * 200}\n"
        if kind == "triples.tsv":
            return f"q{number * 7919 % 5000}\tpositive {number % 97}\t{number}\n".replace("positive ", "p")
        passage = [{"docid": str(number), "title": "", "text": f"{number} {'word ' * 200}"}]
        return json.dumps({"query_id": number, "query": "q", "positive_passages": passage}) + "\n"

    # Arrow's own allocator keeps what was freed for later, more of it on a busy machine.
    environment = {"HF_DISTILL_PROGRESS": "0", "OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    peaks = []
    size = {"collection.tsv": 12_000, "train.jsonl.gz": 3_000, "triples.tsv": 40_000}[kind]
    for factor in (1, 4):
        folder = tmp_path / str(factor)
        folder.mkdir()
        text = "".join(line(number) for number in range(size * factor)).encode()
        (folder / kind).write_bytes(gzip.compress(text, 1) if kind.endswith(".gz") else text)
        output = subprocess.run(
            [sys.executable, "-c", MEMORY, str(folder), str(tmp_path / f"out{factor}")],
            capture_output=True, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        assert output.returncode == 0, output.stderr
        peaks.append(int(output.stdout) / 1024)
    # Three times as much text would be 36 MiB (9 and 2 of the other two) and more, in several copies.
    assert peaks[1] - peaks[0] < 12, peaks
