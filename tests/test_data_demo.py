"""The demo collection: cleaning of docstrings, choice of good questions, splits, the saved result."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from hf_distill.data import build_demo_collection, load_collection
from hf_distill.data.demo import (
    module_group,
    passage_text,
    read_docstrings,
    select_records,
    split_by_module,
)
from hf_distill.data.docstrings import DocRecord, documented, package_root, source_files, summary_and_body
from hf_distill.errors import InputError


@pytest.mark.parametrize(
    ("docstring", "summary", "body"),
    [
        ("Sort the `items` in place. It is stable.", "Sort the items in place", "It is stable."),
        # The sentence goes on after an abbreviation, over the end of a line, and over a number.
        (
            "Read files, e.g. those\n    of version 2.0, as text.\n\n    More.",
            "Read files, e.g. those of version 2.0, as text",
            "More.",
        ),
        (
            "Use :class:`~a.b.Reader` or [`~x.Model`].\n\nSee ``c`` and **kwargs.",
            "Use Reader or Model",
            "See c and **kwargs.",
        ),
        ("dot(a, b) -> float\n\nMultiply two vectors. Fast.", "Multiply two vectors", "Fast."),
        (
            "Fit it.\n\nParameters\n----------\nX : array\n    Data.\n\n"
            "Examples\n--------\n>>> 1\n1\n\nNotes\n-----\nSlow.",
            "Fit it",
            "Parameters: X : array Data.\nNotes: Slow.",
        ),
        (
            "Do it.\n\nArgs:\n    x (`int`): Size.\nExample:\n    code()\nReturns:\n    `int`: Sum.",
            "Do it",
            "Args: x (int): Size.\nReturns: int: Sum.",
        ),
        (
            "Do it.\n\n.. versionadded:: 1.2\n   Long ago.\n\n.. note:: Careful.\n\n:param x: size\n:rtype: int",
            "Do it",
            "Note: Careful.\nx: size int",
        ),
        ("Join. For example::\n\n    join(a)\n\nEnd.", "Join", "For example:\nEnd."),
        ("Join.\n\n:func:`a.load <a.load>` reads `this <https://x.y>`_ [1]_.", "Join", "a.load reads this."),
        ("x (`int`): The size.\n\nMore.", "", ""),
        ("The transform of f, defined as\n\n.. math:: x", "", ""),
        (">>> f(1)\n2\n\nText.", "Text", ""),
        ("", "", ""),
    ],
)
def test_cleaning(docstring, summary, body):
    assert summary_and_body(docstring) == (summary, body)


SOURCE = '''
"""Module."""
raise RuntimeError("this package must not be imported")

class Reader(Base):
    """Reads things one after the other. Slowly."""

    def __init__(self, path, *, mode="r", table={"a": "a long default value"}):
        """Not this one. Really."""

    @property
    def size(self):
        """Number of things left to read. An int."""

    @staticmethod
    async def open(path: str, /, *rest, **more) -> "Reader":
        """Opens a path for reading. Or not."""

    def _hidden(self):
        """A hidden thing of no use. Really."""

if True:
    def outer(a, b=1):
        """Does the outer thing well. And more."""
        def inner():
            """Does the inner thing well. And more."""

add_docstr(pack.add, r"""
add(input, other, *, out=None) -> Tensor

Adds two tensors element by element.

{input} And broadcasts over :math:`\\\\mathbb{{R}}`.
""".format(**common))
'''


@pytest.fixture()
def package(tmp_path, monkeypatch):
    root = tmp_path / "site" / "pack"
    (root / "tests").mkdir(parents=True)
    (root / "_impl").mkdir()
    for name in ("__init__.py", "_reader.py", "tests/test_reader.py", "_impl/code.py"):
        (root / name).write_text("" if name == "__init__.py" else SOURCE, encoding="utf-8")
    (root / "broken.py").write_text('"""Not Python."""\ndef (', encoding="utf-8")
    monkeypatch.syspath_prepend(root.parent)
    return root


def test_sources_are_parsed_and_not_imported(package):
    assert package_root("pack") == package
    assert [path.name for path in source_files("pack")] == ["__init__.py", "_reader.py", "broken.py"]
    assert list(documented("pack", package / "broken.py")) == []
    records = {record.name: record for record in documented("pack", package / "_reader.py")}
    assert {name: record.signature for name, record in records.items()} == {
        "pack._reader.Reader": "class Reader(path, *, mode='r', table=...)",
        "pack._reader.Reader.size": "size",
        "pack._reader.Reader.open": "async open(path, *rest, **more)",
        "pack._reader.outer": "outer(a, b=1)",
        "pack.add": "add(input, other, *, out=None)",
    }
    reader = records["pack._reader.Reader"]
    assert (reader.title, reader.summary, reader.body) == (
        "pack.Reader",
        "Reads things one after the other",
        "Slowly.",
    )
    added = records["pack.add"]
    assert added.summary == "Adds two tensors element by element"
    assert added.body == "And broadcasts over R."


def test_no_source_no_package():
    assert package_root("no_such_package_at_all") is None
    assert package_root("os.path") is None and source_files("no_such_package_at_all") == []
    assert any(path.name == "textwrap.py" for path in source_files("python"))


def record(name, summary, body="It takes the first of the given things and walks over all others twice.", package="p"):
    return DocRecord(name, name, package, f"{name.rsplit('.', 1)[-1]}()", summary, body)


def test_bad_questions_and_copies_are_left_out():
    good = [
        record(
            "p.a.join",
            "Glue many short strings to a long one",
            "alpha beta gamma delta epsilon zeta eta theta iota kappa",
        ),
        record(
            "p.b.fog", "Estimate how dense the fog will be", "one two three four five six seven eight nine ten eleven"
        ),
    ]
    family = [
        record(
            f"p.{name.lower()}.{name}Tokenizer",
            f"Construct a fast {name} tokenizer from a vocabulary file",
            f"The {name} tokenizer is based on word pieces and lower cases every text before it is split at blanks.",
        )
        for name in ("Bert", "Roberta", "Deberta")
    ]
    bad = [
        record("p.c.short", "Too few words"),
        record("p.c.get_user_name", "Return the user's name for this"),
        record("p.c.thin", "Estimate how dense the snow will be", "Only few words here."),
        record(
            "p.c.echo",
            "Estimate how dense the rain will be",
            "Yes: estimate how dense the rain will be in " + "x " * 20,
        ),
        record("p.c.old", "Deprecated way to estimate the wind speed"),
        record("p.c.template", "Estimate the {thing} of the given weather"),
        *[record(f"p.d.fit{i}", "Fit the model to training data", f"number {i} " * 12) for i in range(3)],
        record("p.e.join", good[0].summary, "completely other words stand in this body but the question is the same"),
    ]
    chosen = {r.name for r in select_records([*good, *family, *bad], 100, seed=0)}
    assert chosen == {"p.a.join", "p.b.fog", "p.bert.BertTokenizer"}


def many_records():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(3000)]

    def text(count):
        return " ".join(rng.choice(words, count))

    names = [f"p{i % 4}.m{int(m)}.f{i}" for i, m in enumerate(rng.integers(0, 60, 1200))]
    return [record(name, text(8), text(30), package=name.split(".")[0]) for name in names]


def test_choice_and_splits_follow_the_seed_only():
    records = many_records()
    chosen = select_records(records, 300, seed=1)
    assert len(chosen) == 300 and chosen == sorted(chosen, key=lambda r: r.name)
    assert chosen == select_records(records, 300, seed=1)
    assert chosen != select_records(records, 300, seed=2)
    splits = split_by_module(chosen, seed=1)
    assert splits == split_by_module(chosen, seed=1) != split_by_module(chosen, seed=2)
    share = {name: sum(splits[module_group(r)] == name for r in chosen) / 300 for name in ("train", "dev", "test")}
    assert 0.7 < share["train"] < 0.85 and 0.08 <= share["dev"] < 0.12 and 0.12 <= share["test"] < 0.16


def test_no_package_crowds_out_the_others():
    records = [record(f"big.m{i}.f", r.summary, r.body, "big") for i, r in enumerate(many_records()[:1000])]
    records += [record(f"s{i}.m.f", r.summary, r.body, f"s{i}") for i, r in enumerate(many_records()[1000:1100])]
    chosen = select_records(records, 110, seed=0)
    assert sum(r.package == "big" for r in chosen) == int(0.15 * 110)
    # But a collection is filled up where the others have no more.
    assert len(select_records(records, 400, seed=0)) == 400


def test_passages_are_cut_after_a_word():
    long = passage_text(record("p.m.f", "A question of some length", "word " * 500))
    assert long.startswith("f()\nword word") and long.endswith("word …") and len(long.split()) == 161


def test_a_collection_of_the_standard_library(tmp_path):
    built = build_demo_collection(tmp_path / "demo", num_passages=400, modules=["python"])
    collection = load_collection(tmp_path / "demo", require_positives=True)
    assert collection.fingerprint == built.fingerprint and collection.name == "demo"
    assert len(collection.corpus) == len(collection.queries) == 400
    assert set(collection.qrels) == {"train", "dev", "test"}

    questions = collection.queries.texts()
    assert len({text.lower() for text in questions}) == 400
    assert all(4 <= len(text.split()) <= 30 for text in questions)
    modules = defaultdict(set)
    seen = 0
    for split, qrels in collection.qrels.items():
        for query, documents in qrels.as_dict(collection.queries, collection.corpus).items():
            assert documents == {query.removesuffix("?"): 1}
            modules[split].add(query.split(".")[0])
            seen += 1
    assert seen == 400
    assert not (
        modules["train"] & modules["test"] or modules["train"] & modules["dev"] or modules["dev"] & modules["test"]
    )
    passages = collection.corpus.texts(template="{text}")
    assert all(question.lower() not in passage.lower() for question, passage in zip(questions, passages))
    assert not any("`" in text or ">>>" in text for text in questions)

    card = (tmp_path / "demo" / "README.md").read_text(encoding="utf-8")
    assert "# Python documentation search" in card and "PSF-2.0" in card and "config_name: corpus" in card
    again = build_demo_collection(tmp_path / "again", num_passages=400, modules=["python"])
    assert again.fingerprint == built.fingerprint


def test_what_cannot_be_built_is_said_at_once(tmp_path, package):
    with pytest.raises(InputError, match="no package 'no_such_package'"):
        build_demo_collection(tmp_path / "demo", modules=["python", "no_such_package"])
    with pytest.raises(InputError, match="usable docstrings, too few"):
        build_demo_collection(tmp_path / "demo", modules=["pack"])
    with pytest.raises(InputError, match="0 is not a size"):
        build_demo_collection(tmp_path / "demo", num_passages=0)
    assert not (tmp_path / "demo").exists()


def test_reading_is_in_a_fixed_order():
    records = read_docstrings(["rich"])
    assert records == read_docstrings(["rich"]) and len(records) > 100
