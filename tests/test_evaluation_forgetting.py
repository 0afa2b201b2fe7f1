"""Forgetting and learning between episodes, and where negatives come from."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.data.collection import load_collection
from hf_distill.data.qrels import Qrels
from hf_distill.data.rows import RowSet
from hf_distill.data.run import Run
from hf_distill.errors import InputError
from hf_distill.evaluation.forgetting import (
    changes,
    composition,
    negative_keys,
    overlap,
    positive_ranks,
    read_ranks,
    write_ranks,
)


def run_of(query, documents):
    documents = np.asarray(documents, np.int64)
    return Run(np.asarray(query), documents, -np.arange(documents.size, dtype=np.float32).reshape(documents.shape))


def test_positive_ranks():
    run = run_of([7, 2, 5], [[4, 1, 3], [0, 3, -1], [8, 9, 6]])
    qrels = Qrels([2, 2, 5, 7, 7, 9], [3, 0, 6, 3, 1, 4], [1, 1, 1, 1, 0, 1])
    ranks = positive_ranks(run, qrels, np.array([2, 5, 7, 9]))
    assert ranks.tolist() == [1, 3, 3, 0]
    assert positive_ranks(run, qrels, np.array([2, 5, 7, 9]), depth=2).tolist() == [1, 0, 0, 0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_positive_ranks_equal_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    queries = rng.permutation(12)[: rng.integers(1, 12)]
    run = run_of(queries, [rng.permutation(20)[:6] - (rng.random() < 0.2) for _ in queries])
    qrels = Qrels(rng.integers(0, 12, 15), rng.integers(0, 20, 15), rng.integers(0, 3, 15))
    expected = []
    for query in range(12):
        good = set(qrels.document[(qrels.query == query) & (qrels.relevance >= 1)].tolist())
        row = np.flatnonzero(run.query == query)
        listed = run.documents[row[0]].tolist() if len(row) else []
        expected.append(next((i + 1 for i, one in enumerate(listed) if one in good), 0))
    assert positive_ranks(run, qrels, np.arange(12)).tolist() == expected


def test_the_published_panel():
    golden = json.loads((Path(__file__).parent / "golden" / "tele_reported_curves.json").read_text())
    panel = golden["per_query_mrr100_example_ance_tele"]
    episodes = [name for name in panel if name.startswith("epi")]
    reciprocal = np.array([panel[name] for name in episodes], dtype=float)
    ranks = np.where(reciprocal > 0, np.rint(1 / np.maximum(reciprocal, 1e-9)), 0).astype(int)
    found = changes(episodes, ranks)
    for change, expected in zip(found[1:], golden["worked_example_on_panel"], strict=True):
        assert (change.forgotten, change.learned, change.n_queries) == (
            expected["forgotten"],
            expected["learned"],
            expected["n"],
        )
        assert change.forgetting == pytest.approx(expected["forgotten"] / expected["n"])


def test_changes():
    ranks = np.array([[1, 2, 0, 5], [2, 1, 4, 5], [1, 0, 4, 6]])
    first, second, third = changes(["1", "2", "3"], ranks, [None, np.array([2, 3, 4, 1]), None])
    assert first.forgetting is None and first.rr == pytest.approx((1 + 1 / 2 + 1 / 5) / 4)
    assert (second.forgotten, second.learned, second.lost) == (1, 2, 0.25)
    assert second.mean_loss == pytest.approx(0.5)
    assert second.noise == 0.25
    assert (third.forgotten, third.learned) == (2, 1)
    assert third.mean_loss == pytest.approx((1 + 1 / 5 - 1 / 6) / 2)
    assert third.lost == 0.25  # the second query was first once; the first one is first again
    assert "noise" not in third.as_dict()


def test_wrong_shapes():
    with pytest.raises(InputError, match="2 episodes"):
        changes(["1", "2"], np.zeros((1, 3), int))
    with pytest.raises(InputError, match="other seed"):
        changes(["1"], np.zeros((1, 3), int), [np.zeros(2, int)])


def test_composition_and_overlap():
    keys = [np.array([1, 2, 3, 4]), np.array([3, 4, 5, 6]), np.array([1, 5, 7, 8]), np.array([], int)]
    shares = composition(keys)
    assert shares[0].tolist() == [1, 0, 0, 0]
    assert shares[1].tolist() == [0.5, 0.5, 0, 0]
    assert shares[2].tolist() == [0.25, 0.25, 0.5, 0]
    assert shares[3].tolist() == [0, 0, 0, 0]
    assert overlap(keys)[1].tolist() == [0.5, 1, 0.25, 0]


def test_negative_keys(micro):
    collection = load_collection(micro)
    rows = RowSet.from_arrays(
        collection.queries,
        collection.corpus,
        np.array([3, 1]),
        [[5, 2, 9, 2], [7, 8]],
        num_positives=np.array([1, 0]),
        sources=[["positive", "a", "b", "b"], ["b", "a"]],
    )
    size = len(collection.corpus)
    assert negative_keys(rows).tolist() == [size + 7, size + 8, 3 * size + 2, 3 * size + 9]
    assert negative_keys(rows, ["a"]).tolist() == [size + 8, 3 * size + 2]
    assert negative_keys(rows.select([1]), ["b"]).tolist() == [size + 7]
    with pytest.raises(InputError, match="sources"):
        negative_keys(RowSet.from_qrels(collection, "train"), ["a"])


def test_ranks_are_kept_for_every_query(tmp_path):
    write_ranks(tmp_path / "ranks.parquet", ["a", "b"], ["1", "2"], np.array([[1, 0], [3, 2]]))
    assert pq.read_table(tmp_path / "ranks.parquet").to_pydict() == {"query_id": ["a", "b"], "1": [1, 0], "2": [3, 2]}
    assert {name: ranks.tolist() for name, ranks in read_ranks(tmp_path / "ranks.parquet").items()} == {
        "1": [1, 0],
        "2": [3, 2],
    }
