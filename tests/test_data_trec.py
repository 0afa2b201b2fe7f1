"""Runs and judgements: arrays, dictionaries, TREC files."""

from __future__ import annotations

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.data.qrels import PositiveIndex, Qrels
from hf_distill.data.run import Run, load_trec, load_trec_qrels, write_trec_qrels
from hf_distill.data.tables import Corpus, Queries
from hf_distill.errors import InputError


IDS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\t\n\v\f\r\0"), min_size=1, max_size=4)
SCORES = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


@pytest.fixture()
def queries() -> Queries:
    return Queries.from_records([{"_id": f"q{n}", "text": "x"} for n in range(3)])


@pytest.fixture()
def corpus() -> Corpus:
    return Corpus.from_records([{"_id": name, "text": "y"} for name in ("d1", "d10", "d2", "é", "Z")])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(-1, 3)), unique_by=lambda t: t[:2]))
def test_qrels_against_dictionaries(judged):
    qrels = Qrels(*zip(*judged)) if judged else Qrels([], [], [])
    for threshold in (1, 2):
        relevant = {}
        for query, document, grade in judged:
            if grade >= threshold:
                relevant.setdefault(query, []).append(document)
        index = qrels.positives(threshold)
        assert {q: index.of(q).tolist() for q in range(6) if len(index.of(q))} == {
            query: sorted(documents) for query, documents in relevant.items()
        }
        assert qrels.query_positions(threshold).tolist() == sorted(relevant)
        assert index.max_positives == max(map(len, relevant.values()), default=0)
    part = qrels.subset([0, 3])
    assert list(zip(part.query, part.document, part.relevance)) == [row for row in judged if row[0] in (0, 3)]
    shuffled = Qrels(*zip(*judged[::-1])) if judged else qrels
    assert shuffled.fingerprint == qrels.fingerprint
    if judged:
        assert Qrels(qrels.query, qrels.document, qrels.relevance + 1).fingerprint != qrels.fingerprint


def test_positive_index_of_nothing():
    index = PositiveIndex(np.empty(0, np.int64), np.empty(0, np.int64))
    assert index.of(0).tolist() == [] and index.of(0).dtype == np.int64 and index.max_positives == 0


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError):
        Run([0], np.zeros((2, 1)), np.zeros((2, 1)))
    with pytest.raises(ValueError):
        Run([0], np.zeros((1, 2)), np.zeros((1, 1)))
    with pytest.raises(ValueError):
        Qrels([0], [0, 1], [1])


def test_ties_are_ordered_by_descending_id(corpus, queries):
    # Among equal scores é > d2 > d10 > d1 > Z, as C compares the bytes.
    run = Run([1], [[0, 1, 2, 3, 4]], [[1.0, 1, 1, 1, 1]]).sorted(corpus)
    assert corpus.ids_at(run.documents[0]) == ["é", "d2", "d10", "d1", "Z"]
    short = Run([1], [[-1, 4, 0]], [[9.0, 0.5, 2.0]]).sorted(corpus)
    assert short.documents.tolist() == [[0, 4, -1]] and short.scores.tolist() == [[2.0, 0.5, -np.inf]]
    assert short.cut(1).as_dict(queries, corpus) == {"q1": {"d1": 2.0}}


def test_order_is_that_of_trec_eval(queries, corpus):
    """With one relevant document, the reciprocal rank that trec_eval computes is its place in our order."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.integers(0, 3, size=(1, 5)).astype(np.float32)
        run = Run([0], [[0, 1, 2, 3, 4]], scores)
        ordered = run.sorted(corpus)
        for place, document in enumerate(corpus.ids_at(ordered.documents[0]), start=1):
            evaluator = pytrec_eval.RelevanceEvaluator({"q0": {document: 1}}, {"recip_rank"})
            assert evaluator.evaluate(run.as_dict(queries, corpus))["q0"]["recip_rank"] == pytest.approx(1 / place)


def test_file_of_a_run(queries, corpus, tmp_path):
    run = Run([2, 0], [[0, 3, 1], [4, -1, -1]], [[0.1, 0.1, 1 / 3], [-7.0, -np.inf, -np.inf]])
    path = run.save(tmp_path / "bm25", queries, corpus, tag="my run")
    assert path == tmp_path / "bm25.trec"
    assert path.read_text(encoding="utf-8").splitlines() == [
        "q2 Q0 d10 1 0.333333343 my_run",
        "q2 Q0 é 2 0.100000001 my_run",
        "q2 Q0 d1 3 0.100000001 my_run",
        "q0 Q0 Z 1 -7 my_run",
    ]
    assert run.save(tmp_path, queries, corpus, tag="x") == tmp_path / "x.trec"
    assert run.save(tmp_path / "a.b.trec", queries, corpus) == tmp_path / "a.b.trec"
    with open(path, encoding="utf-8") as file:
        parsed = pytrec_eval.parse_run(file)
    assert {q: {d: np.float32(score) for d, score in part.items()} for q, part in parsed.items()} == run.as_dict(
        queries, corpus
    )
    again = load_trec(path, queries, corpus)
    assert again.query.tolist() == [0, 2]
    assert again.as_dict(queries, corpus) == run.as_dict(queries, corpus)
    assert again.documents.tolist() == [[4, -1, -1], [1, 3, 0]]


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_round_trip(tmp_path_factory, data):
    query_ids = data.draw(st.lists(IDS, unique=True, min_size=1, max_size=3))
    document_ids = data.draw(st.lists(IDS, unique=True, min_size=1, max_size=6))
    queries = Queries.from_records([{"_id": name, "text": "x"} for name in query_ids])
    corpus = Corpus.from_records([{"_id": name, "text": "y"} for name in document_ids])
    count = len(document_ids)
    rows = [data.draw(st.permutations(range(count))) for _ in query_ids]
    scores = [data.draw(st.lists(SCORES, min_size=count, max_size=count)) for _ in query_ids]
    run = Run(range(len(query_ids)), rows, scores)
    folder = tmp_path_factory.mktemp("trec")
    again = load_trec(run.save(folder / "any", queries, corpus, tag="tag"), queries, corpus)
    expected = run.sorted(corpus)
    assert again.query.tolist() == expected.query.tolist()
    assert again.documents.tolist() == expected.documents.tolist()
    assert again.scores.tolist() == expected.scores.tolist()
    qrels = Qrels(np.arange(len(query_ids)), [row[0] for row in rows], np.arange(len(query_ids)) - 1)
    path = write_trec_qrels(folder / "qrels.trec", qrels, queries, corpus)
    read = load_trec_qrels(path, queries, corpus)
    assert read.as_dict(queries, corpus) == qrels.as_dict(queries, corpus)


RUN = "q0 Q0 d1 1 2.5 t\nq0 Q0 d2 2 1.5 t\n"
QRELS = "q0 0 d1 1\nq1\t0\td2\t0\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"no results in it"),
        (RUN + "q0 Q0 d10 3 1.0\n", r"line 3: 5 fields where 6 are expected.*query Q0 document rank score tag"),
        (RUN + "\nq9 Q0 d10 3 1.0 t\n", r"line 4, field 'query': unknown query 'q9', not among the 3 queries"),
        (RUN + "q0 Q0 d7 3 1.0 t\n", r"line 3, field 'document': unknown document 'd7'"),
        (RUN + "q0 Q0 d10 3 high t\n", r"line 3, field 'score': 'high' is not a finite number"),
        (RUN + "q0 Q0 d10 3 nan t\n", r"line 3, field 'score': 'nan' is not a finite number"),
        (RUN + "q0 Q0 d10 3 1e39 t\n", r"line 3, field 'score': '1e39' is not a finite number"),
        (
            RUN + "q0 Q0 d1 3 0 t\n",
            r"line 3, field 'document': document 'd1' is listed twice for query 'q0', also in line 1",
        ),
    ],
)
def test_bad_runs(queries, corpus, tmp_path, content, message):
    path = tmp_path / "bad.trec"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"bad.trec(, |: ){message}"):
        load_trec(path, queries, corpus)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"no judgements in it"),
        (QRELS + "q0 d1 1\n", r"line 3: 3 fields where 4 are expected"),
        (QRELS + "q7 0 d1 1\n", r"line 3, field 'query': unknown query 'q7'"),
        (QRELS + "q0 0 d7 1\n", r"line 3, field 'document': unknown document 'd7'"),
        (QRELS + "q0 0 d2 1.5\n", r"line 3, field 'grade': '1.5' is not a whole number"),
        (QRELS + "q0 0 d1 2\n", r"line 3, field 'grade': grade 2 for a document that has grade 1 in line 1"),
    ],
)
def test_bad_qrels(queries, corpus, tmp_path, content, message):
    path = tmp_path / "bad.trec"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"bad.trec(, |: ){message}"):
        load_trec_qrels(path, queries, corpus)


def test_qrels_as_others_write_them(queries, corpus, tmp_path):
    path = tmp_path / "qrels.txt"
    path.write_text("q0  0 d1   2\r\n\r\nq1\t0\td2\t-1\nq0 0 d1 2\n")
    assert load_trec_qrels(path, queries, corpus).as_dict(queries, corpus) == {"q0": {"d1": 2}, "q1": {"d2": -1}}
    with pytest.raises(InputError, match="cannot be read"):
        load_trec_qrels(tmp_path / "nothing.txt", queries, corpus)
