"""The restricted reader of pickles: it reads what scores are made of, runs nothing, and keeps nothing."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import pickletools
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.data import load_collection
from hf_distill.data.formats import open_inputs
from hf_distill.data.formats.conversion import convert
from hf_distill.data.formats.pickles import read_pickled_items
from hf_distill.errors import InputError


KEYS = st.one_of(st.integers(), st.text(max_size=6), st.booleans())
FLOATS = st.floats(allow_nan=False)
SCALARS = st.one_of(
    FLOATS,
    st.integers(),
    st.floats(width=32, allow_nan=False).map(np.float32),
    FLOATS.map(np.float64),
    st.integers(-(2**31), 2**31 - 1).map(np.int32),
    st.booleans().map(np.bool_),
)
VALUES = st.recursive(
    st.one_of(SCALARS, st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)


def pickled(path, value, protocol=4, compress=False):
    data = pickle.dumps(value, protocol=protocol)
    path.write_bytes(gzip.compress(data) if compress else data)
    return path


@settings(max_examples=150, deadline=None)
@given(value=st.dictionaries(KEYS, VALUES, max_size=6), protocol=st.integers(2, 5), compress=st.booleans())
def test_reads_what_pickle_writes(tmp_path_factory, value, protocol, compress):
    path = pickled(tmp_path_factory.mktemp("pickles") / "x.pkl", value, protocol, compress)
    found = list(read_pickled_items(path))
    assert [key for key, _ in found] == list(value)
    assert dict(found) == value
    if all(type(inner) is np.float32 for inner in value.values()):
        assert all(type(inner) is float for _, inner in found)


def test_every_type_of_number_and_byte_order(tmp_path):
    values = {kind: np.array([3], dtype=kind)[0] for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u8")}
    path = pickled(tmp_path / "x.pkl", values)
    assert dict(read_pickled_items(path)) == dict.fromkeys(values, 3)
    # The scalar of a type of the other byte order, as a machine of that order would have written it.
    data = pickle.dumps({"x": np.float32(1.5)}, protocol=2).replace(b"X\x01\x00\x00\x00<", b"X\x01\x00\x00\x00>")
    (tmp_path / "big.pkl").write_bytes(data)
    assert dict(read_pickled_items(tmp_path / "big.pkl"))["x"] == float(
        np.frombuffer(np.float32(1.5).tobytes(), ">f4")[0]
    )


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, target, function=os.system):
        self.target, self.function = target, function

    def __reduce__(self):
        return self.function, (f"touch {self.target}",)


def malicious(target) -> dict[str, bytes]:
    command = f"touch {target}"
    opcodes = {
        "global": b"cos\nsystem\n(X" + len(command).to_bytes(4, "little") + command.encode() + b"tR.",
        "inst": b"(X" + len(command).to_bytes(4, "little") + command.encode() + b"ios\nsystem\n.",
        "obj": b"(cos\nsystem\nX" + len(command).to_bytes(4, "little") + command.encode() + b"o.",
        "newobj": b"cbuiltins\nobject\n)\x81.",
        "persid": b"Pname\n.",
        "ext": b"\x82\x01.",
    }
    return {
        "system": pickle.dumps({1: Evil(target)}),
        "system, protocol 2": pickle.dumps({1: Evil(target)}, protocol=2),
        "outside": pickle.dumps(Evil(target)),
        "eval": pickle.dumps({1: {2: Evil(target, eval)}}),
        "key": pickle.dumps({(1, 2): 3}),
        "set": pickle.dumps({1: {2, 3}}),
        "bytes": pickle.dumps({1: b"x"}),
        "none": pickle.dumps({1: None}),
        "ordered": pickle.dumps(OrderedDict(a=1)),
        "array": pickle.dumps({1: np.zeros(3)}),
        "object dtype": pickle.dumps({1: np.dtype("O")}),
        "complex": pickle.dumps({1: np.complex64(1)}),
        "function": pickle.dumps({1: len}),
        "list": pickle.dumps([1, 2]),
        "number": pickle.dumps(3),
        **{f"raw {name}": code for name, code in opcodes.items()},
        **{f"in a dictionary, {name}": b"\x80\x04}K\x01" + code[:-1] + b"s." for name, code in opcodes.items()},
    }


def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path):
    target = tmp_path / "was_here"
    path = tmp_path / "x.pkl"
    for name, data in malicious(target).items():
        path.write_bytes(data)
        with pytest.raises(InputError, match="x.pkl: (the pickle is refused|not a complete pickle)"):
            list(read_pickled_items(path))
        assert not target.exists(), name
    path.write_bytes(pickle.dumps({1: Evil(target)}))
    with pytest.raises(InputError, match=r"the pickle is refused: it asks for (posix|nt|os).system"):
        list(read_pickled_items(path))
    pickle.loads(path.read_bytes())  # the bait is real
    assert target.exists()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_broken_pickles_end_in_a_sentence(tmp_path_factory, data):
    whole = pickle.dumps({"a": {1: np.float32(2), 2: 3.5}, "b": ["x", 7]}, protocol=data.draw(st.integers(2, 5)))
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    broken = broken[: data.draw(st.integers(0, len(broken)))]
    path = tmp_path_factory.mktemp("pickles") / "x.pkl"
    path.write_bytes(bytes(broken))
    try:
        list(read_pickled_items(path))
    except InputError as error:
        assert "x.pkl: " in str(error)


def test_lengths_that_lie_take_no_memory(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04}X\xff\xff\xff\xff" + b"x" * 10)
    with pytest.raises(InputError, match="a string of 4294967295 bytes"):
        list(read_pickled_items(path))


def test_entries_come_while_the_file_is_read(tmp_path):
    """The first entries are there before the end is, and what was handed on is not kept."""
    value = {query: {document: float(document) for document in range(100)} for query in range(5000)}
    path = pickled(tmp_path / "x.pkl", value)
    size = path.stat().st_size
    (tmp_path / "cut.pkl").write_bytes(path.read_bytes()[: size // 2])
    found = []
    with pytest.raises(InputError, match="not a complete pickle"):
        for item in read_pickled_items(tmp_path / "cut.pkl"):
            found.append(item)
    assert 2000 <= len(found) < 2600 and dict(found) == {query: value[query] for query in range(len(found))}


def test_memory_does_not_grow_with_the_file(tmp_path):
    script = (
        "import sys\n"
        "from hf_distill.data.formats.pickles import read_pickled_items\n"
        "count = sum(len(value) for _, value in read_pickled_items(sys.argv[1]))\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(count, int(peak.split()[1]) // 1024)\n"
    )
    peaks = {}
    for queries in (2000, 10000):
        value = {query: {document: np.float32(document) for document in range(20)} for query in range(queries)}
        path = pickled(tmp_path / f"{queries}.pkl", value)
        output = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
        count, peaks[queries] = map(int, output.stdout.split())
        assert count == queries * 20
    assert peaks[10000] - peaks[2000] < 5, peaks


def test_references_within_an_entry_and_to_strings(tmp_path):
    shared = "d" * 3
    inner = {shared: 1.0}
    value = {"q1": inner, "q2": {shared: 2.0}}
    assert dict(read_pickled_items(pickled(tmp_path / "x.pkl", value))) == value
    far = {**{f"q{number}": {} for number in range(1500)}}
    far["q0"], far["q1400"] = inner, inner
    with pytest.raises(InputError, match="it refers back to an entry that was read before"):
        list(read_pickled_items(pickled(tmp_path / "x.pkl", far)))
    looped: dict = {}
    looped["a"] = looped
    with pytest.raises(InputError, match="a dictionary that holds itself"):
        list(read_pickled_items(pickled(tmp_path / "x.pkl", looped)))


def test_reader_and_pickletools_agree_on_what_is_used():
    stream = io.BytesIO(pickle.dumps({1: {"d": np.float32(1)}}, protocol=4))
    names = {operation.name for operation, _, _ in pickletools.genops(stream)}
    assert {"STACK_GLOBAL", "REDUCE", "BUILD", "MEMOIZE"} <= names  # the tests above do go through these


# -- in a conversion -------------------------------------------------------------------------------------------------


@pytest.fixture()
def files(tmp_path):
    folder = tmp_path / "msmarco"
    folder.mkdir()
    (folder / "collection.tsv").write_text("".join(f"{number}\tpassage {number}\n" for number in range(6)))
    (folder / "queries.train.tsv").write_text("10\tten\n11\televen\n12\ttwelve\n")
    (folder / "hard.jsonl").write_text(
        '{"qid": 10, "pos": [0], "neg": {"bm25": [1, 2], "dense": [2]}}\n'
        '{"qid": 11, "pos": [1], "neg": {"bm25": [3]}}\n'
    )
    (folder / "qrels.train.tsv").write_text("10\t0\t0\t1\n11\t0\t1\t1\n")
    return folder


def rows_of(folder, name):
    collection = load_collection(folder)
    rows = collection.rows(name)
    return [
        (
            collection.queries.ids_at([rows.query[row]])[0],
            collection.corpus.ids_at(rows.documents_at(row)),
            int(rows.num_positives[row]),
            rows.values_at("scores", row).tolist(),
        )
        for row in range(len(rows))
    ]


def test_scores_join_the_rows(files, tmp_path):
    scores = {10: {0: np.float32(9.5), 2: -1.25, 5: 0.0}, 12: {1: 1.0}}
    pickled(files / "scores.pkl.gz", scores, compress=True)
    done = convert(open_inputs([str(files)], cache_dir=tmp_path / "cache", allow_pickle=True), tmp_path / "out")
    assert rows_of(tmp_path / "out", "hard") == [("10", ["0", "2", "2"], 1, [9.5, -1.25, -1.25])]
    notes = {part.label: part.notes.counts for part in done.parts}["hard"]
    assert {reason: entry["count"] for reason, entry in notes.items()} == {
        "documents have no score and were left out": 3,
        "rows have no document with a score and were left out": 1,
    }


def test_scores_alone_are_rows(files, tmp_path):
    (files / "hard.jsonl").unlink()
    pickled(files / "ce.pkl", {10: {2: 1.5, 0: 2.5}, 12: {1: 1.0}})
    convert(open_inputs([str(files)], cache_dir=tmp_path / "cache", allow_pickle=True), tmp_path / "out")
    assert rows_of(tmp_path / "out", "ce") == [("10", ["0", "2"], 1, [2.5, 1.5]), ("12", ["1"], 0, [1.0])]


def test_pickled_lists_are_negatives(files, tmp_path):
    pickled(files / "co-stg1.pkl", {10: [3, 0, 4], 12: ["5"]})
    convert(open_inputs([str(files)], cache_dir=tmp_path / "cache", allow_pickle=True), tmp_path / "out")
    collection = load_collection(tmp_path / "out")
    rows = collection.rows("co_stg1")
    assert collection.corpus.ids_at(rows.documents_at(0)) == ["0", "3", "4"]
    assert rows.num_positives.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({10: {0: float("nan")}}, r"scores.pkl, query 10: the score of document 0 is nan"),
        ({10: {0: "x"}}, r"scores.pkl, query 10: the score of document 0 is 'x'"),
        ({10: {0: 1.0}, 11: [3]}, r"scores.pkl, query 11: \[3\] where scores by document are expected"),
        ({10: {0: 1.0}, "10": {0: 1.0}}, r"scores.pkl: query '10' has scores twice"),
        ({10: [1], 11: {1: 2.0}}, r"scores.pkl, query 11: .* where a list of identifiers is expected"),
    ],
)
def test_broken_scores(files, tmp_path, value, message):
    pickled(files / "scores.pkl", value)
    with pytest.raises(InputError, match=message):
        convert(open_inputs([str(files)], cache_dir=tmp_path / "cache", allow_pickle=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()
