"""Measures by hand, by brute force with ties and gaps, and against stored figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.errors import InputError
from hf_distill.evaluation import evaluate_run


GOLDEN = Path(__file__).parent / "golden"


def brute_force(qrels, run, name: str, k: int | None, threshold: int) -> dict[str, float]:
    """Measures from their definitions, after a stable double sort."""
    values = {}
    for query, grades in qrels.items():
        relevant = {document for document, grade in grades.items() if grade >= threshold}
        if not relevant:
            continue
        ranking = sorted(sorted(run.get(query, {}), reverse=True), key=lambda document: -run[query][document])
        ranking = ranking[:k]
        hits = [document in relevant for document in ranking]
        if name == "RR":
            value = next((1 / rank for rank, hit in enumerate(hits, 1) if hit), 0.0)
        elif name == "AP":
            value = sum(sum(hits[:rank]) / rank for rank, hit in enumerate(hits, 1) if hit) / len(relevant)
        elif name == "R":
            value = sum(hits) / len(relevant)
        elif name == "P":
            value = sum(hits) / k
        elif name == "Success":
            value = float(any(hits))
        else:
            gains = [max(0, grades.get(document, 0)) for document in ranking]
            ideal = sorted((max(0, grade) for grade in grades.values()), reverse=True)[:k]
            dcg, best = (sum(g / math.log2(r + 1) for r, g in enumerate(row, 1)) for row in (gains, ideal))
            value = dcg / best
        values[query] = value
    return values


IDS = ["d1", "d10", "d2", "Ä", "a b"]
MEASURES = [(name, k) for name in ("nDCG", "RR", "AP") for k in (None, 1, 3)]
MEASURES += [(name, k) for name in ("R", "P", "Success") for k in (1, 4)]


@settings(max_examples=150, deadline=None)
@given(
    qrels=st.dictionaries(
        st.sampled_from(["q1", "q2", "q3"]), st.dictionaries(st.sampled_from(IDS), st.integers(0, 3), min_size=1)
    ),
    run=st.dictionaries(
        st.sampled_from(["q1", "q2", "q3", "q9"]),
        st.dictionaries(st.sampled_from([*IDS, "other"]), st.sampled_from([-1.5, 0.0, 0.25, 7.0])),
    ),
    threshold=st.sampled_from([1, 2]),
)
def test_against_brute_force(qrels, run, threshold):
    if not any(grade >= threshold for grades in qrels.values() for grade in grades.values()):
        with pytest.raises(InputError, match=f"no query has a document of grade {threshold}"):
            evaluate_run(qrels, run, relevance_threshold=threshold)
        return
    names = [name if k is None else f"{name}@{k}" for name, k in MEASURES]
    result = evaluate_run(qrels, run, names, relevance_threshold=threshold)
    for label, (name, k) in zip(names, MEASURES):
        expected = brute_force(qrels, run, name, k, threshold)
        assert {query: row[label] for query, row in result.per_query.items()} == pytest.approx(expected), label
        assert result.means[label] == pytest.approx(sum(expected.values()) / len(expected)), label
    assert result.means["n_queries"] == len(result.per_query) == len(expected)


def test_by_hand():
    qrels = {"q1": {"a": 1, "b": 1}, "q2": {"c": 1}, "q3": {"d": 1}, "q4": {"e": 0}}
    run = {"q1": {"x": 3.0, "a": 2.0, "y": 1.0, "b": 0.0}, "q2": {"x": 2.0, "y": 1.0}, "stranger": {"a": 1.0}}
    means = evaluate_run(qrels, run, ["RR@10", "RR@1", "AP@10", "AP@2", "R@2", "nDCG@10", "Success@4", "P@4"]).means
    ndcg = (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3))
    expected = {
        "RR@10": 1 / 2,
        "RR@1": 0,
        "AP@10": (1 / 2 + 2 / 4) / 2,
        "AP@2": 1 / 4,
        "R@2": 1 / 2,
        "nDCG@10": ndcg,
        "Success@4": 1,
        "P@4": 2 / 4,
    }
    # Three queries have a relevant document: q2 found none, q3 is missing from the run; q4 does not count.
    assert means == pytest.approx({name: value / 3 for name, value in expected.items()} | {"n_queries": 3})


def test_ties_go_to_the_greater_document_id_also_at_the_cut():
    qrels = {"q": {"d1": 1}}
    tied = {"q": {"d1": 1.0, "d2": 1.0, "d3": 0.5}}
    assert evaluate_run(qrels, tied, ["RR@1", "RR@2"]).means == {"RR@1": 0.0, "RR@2": 0.5, "n_queries": 1}
    assert evaluate_run({"q": {"d2": 1}}, tied, ["RR@1"]).means["RR@1"] == 1.0


def test_reciprocal_ranks_at_every_depth():
    run = {"q": {f"d{rank:04}": -float(rank) for rank in range(1, 1001)}}
    for rank in (1, 3, 7, 10, 11, 49, 100, 997, 1000):
        means = evaluate_run({"q": {f"d{rank:04}": 1}}, run, [f"RR@{rank}", f"RR@{max(1, rank - 1)}", "RR"]).means
        assert means[f"RR@{rank}"] == means["RR"] == 1 / rank
        assert rank == 1 or means[f"RR@{rank - 1}"] == 0


def test_other_names_and_number_types():
    qrels = {"q": {"a": np.int64(1)}}
    run = {"q": {"a": np.float32(0.5), "b": np.float32(0.7)}}
    means = evaluate_run(qrels, run, ["MRR@10", "map@10", "Recall@5", "ndcg@3"]).means
    assert means["MRR@10"] == means["map@10"] == 0.5 and means["Recall@5"] == 1.0
    assert list(means) == ["MRR@10", "map@10", "Recall@5", "ndcg@3", "n_queries"]


@pytest.mark.parametrize(
    "measure, message",
    [
        ("nDGC@10", "unknown measure 'nDGC@10'.*nDCG, RR"),
        ("nDCG@0", "unknown measure"),
        ("nDCG@", "unknown measure"),
        ("R", "lacks a cut-off.*R@100"),
        ("", "unknown measure"),
    ],
)
def test_unknown_measures(measure, message):
    with pytest.raises(InputError, match=message):
        evaluate_run({"q": {"a": 1}}, {}, [measure])


def test_bad_scores_and_thresholds():
    with pytest.raises(InputError, match="query 'q'.*score of document 'a' is not a number"):
        evaluate_run({"q": {"a": 1}}, {"q": {"a": float("nan")}})
    with pytest.raises(InputError, match="threshold 0"):
        evaluate_run({"q": {"a": 1}}, {}, relevance_threshold=0)
    with pytest.raises(InputError, match="no query has a document"):
        evaluate_run({}, {})


def test_conventions_of_marco_and_led():
    case = json.loads((GOLDEN / "tele_mrr.json").read_text())
    qrels = {query: {str(document): 1 for document in documents} for query, documents in case["qrels"].items()}
    run = {query: {str(d): -float(rank) for rank, d in enumerate(ids)} for query, ids in case["run"].items()}
    means = evaluate_run(qrels, run, ["RR@10"]).means
    assert means == {"RR@10": case["metrics"]["MRR @10"], "n_queries": case["metrics"]["QueriesRanked"]}

    with np.load(GOLDEN / "led_metrics.npz") as arrays:
        stored = {key: float(value) for key, value in zip(arrays["v2_keys"], arrays["v2_vals"])}
        qrels, run = json.loads(str(arrays["qrels_json"])), json.loads(str(arrays["run_json"]))
        ranked = {key: float(value) for key, value in zip(arrays["v1_keys"], arrays["v1_vals"])}
        columns = zip(arrays["qids"].tolist(), arrays["scores"].tolist(), arrays["labels"].tolist())
        judged, scored = {}, {}
        for row, (query, score, label) in enumerate(columns):
            judged.setdefault(str(query), {})[f"d{row}"] = label
            scored.setdefault(str(query), {})[f"d{row}"] = score
    means = evaluate_run(qrels, run, ["RR@10", "Success@1", "Success@2", "Success@3"]).means
    assert means["RR@10"] == pytest.approx(stored["MRR@10"], abs=1e-6)
    for k in (1, 2, 3):  # their "recall" is the share of queries with a hit
        assert means[f"Success@{k}"] == pytest.approx(stored[f"recall@{k}"], abs=1e-6)
    unanswered = {query for query, labels in judged.items() if not any(labels.values())}
    means = evaluate_run(judged, scored, ["RR@10"]).means
    assert means["RR@10"] * means["n_queries"] / (means["n_queries"] + len(unanswered)) == pytest.approx(
        ranked["MRR@10"]
    )
