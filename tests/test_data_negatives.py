"""Draws from negative pools: determinism, shares, short and empty pools, epochs."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.data import Corpus, EpochSampler, PositiveIndex, Queries, RowSet, TrainingRows
from hf_distill.errors import InputError


NUM_DOCUMENTS = 60
QUERIES = Queries.from_records([{"query_id": f"q{i}", "text": f"query {i}"} for i in range(20)])
CORPUS = Corpus.from_records([{"document_id": f"d{i}", "text": f"document {i}"} for i in range(NUM_DOCUMENTS)])


def make_rows(sizes, positives, seed=0, sources=None) -> RowSet:
    """Rows whose documents are random and whose score is a function of the document, so that a swap is seen."""
    rng = np.random.default_rng(seed)
    documents = [rng.permutation(NUM_DOCUMENTS)[:size] for size in sizes]
    columns = {"scores": [d * 0.5 for d in documents], "scores_other": [-1.0 * d for d in documents]}
    if sources is not None:
        columns["sources"] = [[sources(int(d)) for d in row] for row in documents]
    return RowSet.from_arrays(QUERIES, CORPUS, np.arange(len(sizes)) % 20, documents, positives, **columns)


def same(left, right) -> bool:
    return (
        left[:2] == right[:2]
        and left.target == right.target
        and np.array_equal(left.documents, right.documents)
        and np.array_equal(left.positives, right.positives)
        and left.scores.keys() == right.scores.keys()
        and all(np.array_equal(left.scores[name], right.scores[name]) for name in left.scores)
    )


@st.composite
def row_shapes(draw):
    shapes = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12)), min_size=1, max_size=6))
    return [p + n for p, n in shapes], [p for p, _ in shapes]


@given(
    shapes=row_shapes(),
    num_negatives=st.integers(0, 9),
    sampling=st.sampled_from(["random", "hardest"]),
    positive=st.sampled_from(["first", "random"]),
    epoch=st.integers(0, 1000),
    seed=st.integers(0, 2**63),
)
@settings(max_examples=120, deadline=None)
def test_every_example_obeys_the_law(shapes, num_negatives, sampling, positive, epoch, seed):
    sizes, positives = shapes
    options = {"num_negatives": num_negatives, "sampling": sampling, "positive": positive, "seed": seed}
    rows = make_rows(sizes, positives)
    dataset = TrainingRows(rows, score_columns=["scores", "scores_other"], **options)
    again = TrainingRows(rows, score_columns=["scores", "scores_other"], **options)
    for row in reversed(range(len(rows))):
        example = dataset[row, epoch]
        documents = rows.documents_at(row).tolist()
        own, pool = documents[: positives[row]], documents[positives[row] :]
        negatives = example.documents[1:] if own else example.documents
        assert example.query == row % 20 and example.row == row
        assert len(example.documents) == 1 + num_negatives
        assert example.target == (0 if own else -1)
        assert example.positives.tolist() == own
        if own:
            assert example.documents[0] in (own if positive == "random" else own[:1])
        assert set(negatives.tolist()) <= set(pool)
        # Without replacement while the pool lasts, then the same order over and over.
        assert len(set(negatives.tolist())) == min(len(pool), len(negatives))
        assert negatives.tolist() == [negatives[i % len(pool)] for i in range(len(negatives))]
        if sampling == "hardest":
            assert negatives.tolist() == [pool[i % len(pool)] for i in range(len(negatives))]
        assert np.array_equal(example.scores["scores"], (example.documents * 0.5).astype(np.float32))
        assert np.array_equal(example.scores["scores_other"], (example.documents * -1.0).astype(np.float32))
        assert same(example, again[row, epoch])


def test_draws_differ_between_epochs_rows_and_seeds_and_are_uniform():
    rows = make_rows([21] * 400, [1] * 400)
    dataset = TrainingRows(rows, num_negatives=4, seed=1)
    other = TrainingRows(rows, num_negatives=4, seed=2)
    draws = [dataset[7, epoch].documents[1:].tolist() for epoch in range(50)]
    assert len(set(map(tuple, draws))) > 45
    assert [other[7, epoch].documents[1:].tolist() for epoch in range(50)] != draws
    # Over rows and epochs every place of the pool comes first equally often: 20 places, 4000 draws, 200 each.
    first = Counter()
    for row in range(400):
        pool = rows.documents_at(row)[1:].tolist()
        first.update(pool.index(dataset[row, epoch].documents[1]) for epoch in range(10))
    assert len(first) == 20 and all(130 < count < 270 for count in first.values())


def test_shares_of_sources_do_not_depend_on_the_pool():
    rows = make_rows([41] * 300, [1] * 300, sources=lambda d: "rare" if d < 6 else "common" if d < 50 else "unused")
    dataset = TrainingRows(rows, num_negatives=1, sources={"rare": 3, "common": 1})
    first = Counter("rare" if dataset[row, e].documents[1] < 6 else "common" for row in range(300) for e in range(10))
    assert 0.69 < first["rare"] / first.total() < 0.79  # 3 of 4, and nothing where a pool lacks it
    drawn = TrainingRows(rows, num_negatives=30, sources={"rare": 3, "common": 1})
    assert all((drawn[row, 0].documents[1:] < 50).all() for row in range(300))
    hardest = TrainingRows(rows, num_negatives=3, sampling="hardest", sources={"common": 1})
    pool = [d for d in rows.documents_at(5)[1:].tolist() if 6 <= d < 50]
    assert hardest[5, 0].documents[1:].tolist() == pool[:3]


@pytest.mark.parametrize("sources", [{"common": 1.0}, None])
def test_an_empty_pool_is_refused_before_training(sources):
    sizes, positives = [5, 1, 5, 1], [1, 1, 1, 1]
    rows = make_rows(sizes, positives, sources=lambda d: "common")
    with pytest.raises(InputError, match=r"2 of 4 rows have no candidates.*'q1'") as raised:
        TrainingRows(rows, num_negatives=3, sources=sources)
    assert "Mine negatives" in raised.value.cure
    assert len(TrainingRows(rows, num_negatives=0)[1, 0].documents) == 1


def test_a_small_pool_is_said():
    rows = make_rows([5, 3, 5, 3], [1, 1, 1, 0], sources=lambda d: "common")
    assert TrainingRows(rows, num_negatives=2).repeated is None
    said = TrainingRows(rows, num_negatives=3).repeated
    assert "2 of 4 rows have fewer candidates than the 3 negatives" in said and "'q1' with 2" in said


def test_a_pool_without_the_wanted_source_is_empty():
    rows = make_rows([4, 4], [1, 1], sources=lambda d: "a")
    documents = [[1, 2, 3], [4, 5, 6]]
    rows = RowSet.from_arrays(QUERIES, CORPUS, [0, 1], documents, [1, 1], sources=[["b", "a", "a"], ["b", "b", "a"]])
    assert TrainingRows(rows, num_negatives=1, sources={"a": 1})[1, 0].documents.tolist() == [4, 6]
    with pytest.raises(InputError, match="1 of 2 rows.*from 'b'.*'q0'"):  # its only 'b' is the positive
        TrainingRows(rows, num_negatives=1, sources={"b": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "hard"}, "'hard' is not one of"),
        ({"positive": "all"}, "'all' is not one of"),
        ({"num_negatives": -1}, "-1 is not a number"),
        ({"score_columns": ["scores_teacher"]}, "no column 'scores_teacher'.*'scores_other'"),
        ({"sources": {"bm52": 1}}, "no document has the source 'bm52'.*'bm25'"),
        ({"sources": {"bm25": -1}}, "-1 is not a weight"),
        ({"sources": {"bm25": float("nan")}}, "nan is not a weight"),
        ({"sampling": "hardest", "sources": {"bm25": 1, "dense": 2}}, "different weights"),
    ],
)
def test_wrong_options_are_named(options, message):
    rows = make_rows([5, 5], [1, 1], sources=lambda d: "bm25" if d % 2 else "dense")
    with pytest.raises(InputError, match=message):
        TrainingRows(rows, **{"num_negatives": 2, **options})


def test_known_positives_come_from_the_row_and_the_judgements():
    rows = make_rows([4, 4, 4], [1, 2, 0])
    index = PositiveIndex(np.array([0, 0, 2]), np.array([58, 59, 57]))
    dataset = TrainingRows(rows, num_negatives=2, positives=index)
    own = rows.documents_at(0)[0]
    assert set(dataset[0, 0].positives.tolist()) == {own, 58, 59}
    assert dataset[1, 0].positives.tolist() == rows.documents_at(1)[:2].tolist()
    assert dataset[2, 0].positives.tolist() == [57] and dataset[2, 0].target == -1
    assert dataset.max_positives == len(dataset[0, 0].positives)
    assert TrainingRows(rows, num_negatives=2).max_positives == 2


def test_a_random_positive_changes_with_the_epoch():
    rows = make_rows([8], [3])
    dataset = TrainingRows(rows, num_negatives=2, positive="random")
    seen = {int(dataset[0, epoch].documents[0]) for epoch in range(40)}
    assert seen == set(rows.documents_at(0)[:3].tolist())


@given(num_rows=st.integers(1, 300), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_sampler_visits_every_row_once(num_rows, seed, epoch):
    sampler = EpochSampler(num_rows, seed)
    sampler.set_epoch(epoch)
    keys = list(sampler)
    assert sorted(keys) == [(row, epoch) for row in range(num_rows)]
    assert list(sampler) == keys and len(sampler) == num_rows
    again = EpochSampler(num_rows, seed)
    again.set_epoch(epoch)
    assert list(again) == keys
    if num_rows > 20:
        again.set_epoch(epoch + 1)
        assert [row for row, _ in again] != [row for row, _ in keys]
    unshuffled = EpochSampler(num_rows, seed, shuffle=False)
    unshuffled.set_epoch(epoch)
    assert list(unshuffled) == [(row, epoch) for row in range(num_rows)]


def identity(examples):
    return examples


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_and_epochs_change_nothing(context):
    rows = make_rows([9] * 24, [1] * 24)
    dataset = TrainingRows(rows, num_negatives=3, score_columns=["scores"], seed=5)

    def epochs(workers):
        sampler = EpochSampler(len(dataset), seed=5)
        extra = {"multiprocessing_context": context, "persistent_workers": True} if workers else {}
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=4, sampler=sampler, num_workers=workers, collate_fn=identity, **extra
        )
        for epoch in range(2):
            sampler.set_epoch(epoch)
            yield [example for batch in loader for example in batch]

    alone, with_workers = list(epochs(0)), list(epochs(2))
    for left, right in zip(alone, with_workers):
        assert len(left) == len(right) == 24 and all(same(a, b) for a, b in zip(left, right))
    by_row = {example.row: example for example in alone[1]}
    assert any(not same(example, by_row[example.row]) for example in alone[0])  # the second epoch drew anew


def test_accelerate_deals_the_same_epoch_to_any_number_of_processes():
    from accelerate.data_loader import BatchSamplerShard

    def batches(world, rank):
        sampler = EpochSampler(40, seed=3)
        sampler.set_epoch(4)
        inner = torch.utils.data.BatchSampler(sampler, batch_size=4, drop_last=True)
        return list(BatchSamplerShard(inner, num_processes=world, process_index=rank))

    shards = [batches(2, rank) for rank in range(2)]
    assert [batch for pair in zip(*shards) for batch in pair] == batches(1, 0)


def test_a_pickle_of_memory_mapped_rows_is_small(tmp_path):
    rows = make_rows([50] * 2000, [1] * 2000)
    rows.save(tmp_path / "rows")
    rows = RowSet.load(tmp_path / "rows", QUERIES, CORPUS)
    dataset = TrainingRows(rows, num_negatives=3, score_columns=["scores"])
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 100_000  # the columns have 1.6 MB
    assert same(pickle.loads(pickled)[11, 3], dataset[11, 3])


def test_windows_are_those_of_the_released_code():
    """The golden examples name a passage by its first token, which stands for its position here."""
    golden = json.loads((Path(__file__).parent / "golden" / "tele_sampling.json").read_text())
    corpus = Corpus.from_records([{"document_id": str(i), "title": "", "text": f"passage {i}"} for i in range(4000)])
    queries = Queries.from_records([{"query_id": str(i), "text": f"query {i}"} for i in range(5)])
    documents = [[text[0] for text in (*row["positives"], *row["negatives"])] for row in golden["rows"]]
    rows = RowSet.from_arrays(
        queries, corpus, np.arange(5), documents, np.array([len(row["positives"]) for row in golden["rows"]])
    )
    seen = 0
    for case in golden["cases"]:
        examples = TrainingRows(
            rows,
            num_negatives=case["train_n_passages"] - 1,
            sampling="hardest" if case["negative_passage_no_shuffle"] else "window",
            positive="first" if case["positive_passage_no_shuffle"] else "rotate",
            seed=case["seed"],
        )
        for row, (_, passages) in enumerate(case["examples"]):
            drawn = examples[row, int(case["state_epoch"])].documents.tolist()
            assert drawn == [text[1] for text in passages]
            seen += 1
    assert seen == 5 * 42


def test_draws_of_led_and_lexmae():
    """A short pool is repeated, one of the right size is used whole, of a larger one a part is drawn."""
    with np.load(Path(__file__).parent / "golden" / "led_sample_negatives.npz") as case:
        corpus = Corpus.from_records([{"document_id": str(i), "text": f"passage {i}"} for i in range(120)])
        for kind, wanted in (("short", int(case["want_short"])), ("eq", 3), ("big", int(case["want_big"]))):
            pool, expected = case[f"pool_{kind}"], case[f"got_{kind}"].tolist()
            rows = RowSet.from_arrays(QUERIES, corpus, [0], [[0, *pool]], [1])
            drawn = [TrainingRows(rows, num_negatives=wanted, seed=42)[0, e].documents[1:].tolist() for e in range(30)]
            if kind == "big":  # another generator draws other ones
                assert all(len(set(one)) == len(expected) and set(one) <= set(pool.tolist()) for one in drawn)
                assert set().union(*drawn) == set(pool.tolist())
            else:
                # Theirs begins the cycle at the pool's first passage, ours anywhere.
                times = sorted(Counter(expected).values())
                assert all(sorted(Counter(one).values()) == times and set(one) == set(expected) for one in drawn)
                ordered = TrainingRows(rows, num_negatives=wanted, sampling="hardest")[0, 0].documents[1:]
                assert ordered.tolist() == expected


def test_a_window_returns_only_after_the_whole_pool():
    pool = np.arange(1, 41)
    rows = RowSet.from_arrays(QUERIES, CORPUS, [0], [[0, *pool]], [1])
    examples = TrainingRows(rows, num_negatives=8, sampling="window", seed=3)
    drawn = [examples[0, epoch].documents[1:].tolist() for epoch in range(6)]
    assert sorted(sum(drawn[:5], [])) == pool.tolist()
    assert drawn[5] == drawn[0]


def test_streams_are_keyed_counters_and_draw_no_entropy(monkeypatch):
    from hf_distill.data.negatives import random_stream

    def refuse(bits: int) -> int:
        raise AssertionError("the system was asked for entropy")

    monkeypatch.setattr(np.random.bit_generator, "randbits", refuse)
    with pytest.raises(AssertionError, match="entropy"):
        np.random.Philox(key=np.array([1, 2], np.uint64))
    drawn = random_stream(-3, 2, 17, 1).integers(0, 2**63, 5)
    monkeypatch.undo()
    expected = np.random.Philox(key=np.array([2**64 - 3, 2], np.uint64), counter=np.array([0, 0, 17, 1], np.uint64))
    assert drawn.tolist() == np.random.Generator(expected).integers(0, 2**63, 5).tolist()
