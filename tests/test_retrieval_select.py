"""The selection of queries by ranks, against PROD's own and a plain loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.data import Corpus, Queries, RowSet
from hf_distill.errors import InputError
from hf_distill.retrieval.select import PROD_RULE, RankRule, select_rows


GOLDEN = Path(__file__).parent / "golden"


def tables(num_queries: int, num_documents: int) -> tuple[Queries, Corpus]:
    queries = Queries.from_records(
        [{"query_id": f"q{number}", "text": f"query {number}"} for number in range(num_queries)]
    )
    corpus = Corpus.from_records(
        [{"document_id": f"d{number}", "title": "", "text": f"text {number}"} for number in range(num_documents)]
    )
    return queries, corpus


def test_prod_division_on_marco():
    """Student's and teacher's rankings as lists of passages; the original keeps the queries 101, 102, 103, ..."""
    case = np.load(GOLDEN / "prod_division_marco.npz")
    known = np.unique(
        np.concatenate([case["student_ranking"].ravel(), case["teacher_ranking"].ravel(), case["positive"]])
    )
    position = {int(passage): number for number, passage in enumerate(known)}
    queries, corpus = tables(len(case["qids"]), len(known))
    documents, ranks, scores = [], [], []
    for positive, student, teacher in zip(case["positive"], case["student_ranking"], case["teacher_ranking"]):
        pool = [positive, *(passage for passage in student if passage != positive)]
        place = {passage: rank for rank, passage in enumerate(student, start=1)}
        order = {passage: rank for rank, passage in enumerate(teacher)}
        documents.append([position[int(passage)] for passage in pool])
        ranks.append([place.get(passage, 0) for passage in pool])
        scores.append([-float(order.get(passage, 1000)) for passage in pool])
    rows = RowSet.from_arrays(
        queries, corpus, np.arange(len(queries)), documents, [1] * len(queries), ranks=ranks, scores=scores
    )
    selected = select_rows(rows)
    assert case["qids"][selected.query].tolist() == case["selected_qids"].tolist() == [101, 102, 103, 106, 107, 110]
    assert selected.metadata["selection"]["ranks"]["student"]["not retrieved"] == int(
        (case["student_rank0"] < 0).sum()
    )


def test_prod_negatives():
    """The walk down the ranking: the first 5 that are no positives, in rank order."""
    case = np.load(GOLDEN / "prod_negatives_marco.npz")
    known = np.unique(np.concatenate([case["candidates"].ravel(), case["positives"].ravel()]))
    known = known[known >= 0]
    position = {int(passage): number for number, passage in enumerate(known)}
    queries, corpus = tables(len(case["candidates"]), len(known))
    documents, counts, ranks = [], [], []
    for candidates, positives in zip(case["candidates"], case["positives"]):
        own = [int(one) for one in positives if one >= 0]
        pool = [*own, *(int(one) for one in candidates if one >= 0 and one not in own)]
        place = {int(one): rank for rank, one in enumerate(candidates, start=1)}
        documents.append([position[one] for one in pool])
        ranks.append([place.get(one, 0) for one in pool])
        counts.append(len(own))
    # The rows as they come out of mining, shuffled within: the order must come from the ranks.
    generator = np.random.default_rng(0)
    for row, count in enumerate(counts):
        order = np.concatenate([np.arange(count), count + generator.permutation(len(documents[row]) - count)])
        documents[row], ranks[row] = (np.array(values)[order] for values in (documents[row], ranks[row]))
    scores = [np.zeros(len(row)) for row in documents]
    rows = RowSet.from_arrays(queries, corpus, np.arange(len(queries)), documents, counts, ranks=ranks, scores=scores)
    chosen = select_rows(rows, "student >= 1 or student < 1", num_negatives=5)
    assert len(chosen) == len(rows)
    for row, expected in enumerate(case["negatives"]):
        found = known[chosen.documents_at(row)[counts[row] :]]
        assert found.tolist() == [one for one in expected.tolist() if one >= 0]


def reference(documents, positives, ranks, scores) -> tuple[float, float]:
    """Ranks of the first positive by student and teacher, the slow way."""
    shown = [number for number in range(len(documents)) if ranks[number] > 0]
    by_teacher = sorted(shown, key=lambda number: (-scores[number], ranks[number]))
    student = min((ranks[number] for number in shown if number < positives), default=np.inf)
    teacher = next((rank for rank, number in enumerate(by_teacher, start=1) if number < positives), np.inf)
    return student, teacher


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["2 <= student <= 4 and teacher == 1", "teacher < student", "not (student == 1)"]),
)
def test_ranks_are_those_of_a_plain_loop(seed, rule):
    generator = np.random.default_rng(seed)
    queries, corpus = tables(6, 12)
    documents, counts, ranks, scores = [], [], [], []
    for _ in range(6):
        size = int(generator.integers(3, 12))
        documents.append(generator.choice(12, size, replace=False))
        counts.append(int(generator.integers(1, 3)))
        order = generator.permutation(size) + 1
        order[: counts[-1]][generator.random(counts[-1]) < 0.3] = 0
        ranks.append(order)
        scores.append(generator.integers(0, 4, size).astype(float))  # with ties
    rows = RowSet.from_arrays(queries, corpus, np.arange(6), documents, counts, ranks=ranks, scores=scores)
    expected = []
    for number in range(6):
        student, teacher = reference(documents[number], counts[number], ranks[number], scores[number])
        if eval(rule, {}, {"student": student, "teacher": teacher}):
            expected.append(number)
    if not expected:
        with pytest.raises(InputError, match="0 of 6 queries satisfy"):
            select_rows(rows, rule)
        return
    chosen = select_rows(rows, rule, num_negatives=2)
    assert chosen.query.tolist() == expected
    for row, number in enumerate(expected):
        count, pool = counts[number], np.arange(counts[number], len(documents[number]))
        best = pool[np.argsort(np.where(ranks[number][pool] > 0, ranks[number][pool], 10**6), kind="stable")][:2]
        wanted = np.concatenate([np.arange(count), best])
        assert chosen.documents_at(row).tolist() == documents[number][wanted].tolist()
        assert chosen.values_at("scores", row).tolist() == scores[number][wanted].tolist()
        assert chosen.num_positives[row] == count


def test_passages_with_an_answer_count_as_positives_and_are_no_negatives():
    queries = Queries.from_records([{"query_id": "q", "text": "who"}, {"query_id": "r", "text": "what"}])
    texts = ["gold", "It was Ada Lovelace.", "nobody", "lovelace, ADA", "Adas"]
    corpus = Corpus.from_records([{"document_id": str(n), "title": "", "text": text} for n, text in enumerate(texts)])
    columns = {"ranks": [[0, 3, 1, 4, 2]] * 2, "scores": [[0.0, 9.0, 1.0, 2.0, 3.0]] * 2}
    rows = RowSet.from_arrays(queries, corpus, [0, 1], [[0, 1, 2, 3, 4]] * 2, [1, 1], **columns)
    chosen = select_rows(rows, "teacher < student and teacher <= 15", answers={"q": ["Ada Lovelace"], "r": ["x"]})
    assert chosen.query.tolist() == [0] and chosen.documents_at(0).tolist() == [0, 2, 4, 3]


@pytest.mark.parametrize(
    "rule",
    ["student", "student <", "__import__('os')", "student.x == 1", "student == 'a'", "pupil == 1", "1 and student"],
)
def test_other_rules_are_refused(rule):
    with pytest.raises(InputError, match="no condition on ranks"):
        RankRule(rule, ["student", "teacher"])


def test_almost_none_is_said(caplog):
    queries, corpus = tables(300, 4)
    ranks, scores = [[1, 2, 3]] * 299 + [[2, 1, 3]], [[9.0, 1.0, 0.0]] * 300
    rows = RowSet.from_arrays(
        queries, corpus, np.arange(300), [[0, 1, 2]] * 300, [1] * 300, ranks=ranks, scores=scores
    )
    assert len(select_rows(rows, PROD_RULE)) == 1
    assert "1 of 300 queries satisfy" in caplog.text and "rank 1: 299" in caplog.text
    with pytest.raises(InputError, match="by student rank 1: 299, rank 2: 1; by teacher rank 1: 300"):
        select_rows(rows, PROD_RULE, fewest=2)
    with pytest.raises(InputError, match="0 of 300 queries satisfy 'student == 3'.*rank 2: 1; by teacher rank 1: 300"):
        select_rows(rows, "student == 3")
    with pytest.raises(InputError, match="no column 'scores_big'"):
        select_rows(rows, "big == 1", columns={"big": "scores_big"})
