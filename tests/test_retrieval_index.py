"""Search of vectors: exact to the tie, whatever the blocks; FAISS for the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.data import Corpus
from hf_distill.errors import InputError
from hf_distill.retrieval import EmbeddingStore, Index
from hf_distill.retrieval import index as index_module
from hf_distill.retrieval.index import best_keys, from_keys


def brute_force(queries, vectors, k):
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    positions = np.lexsort((np.broadcast_to(np.arange(len(vectors)), scores.shape), -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, positions, 1), positions


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 9), st.integers(1, 70), st.integers(1, 20), st.integers(1, 30),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_exact_search_is_exact_with_ties_in_any_blocks(vectors, queries, k, query_block, corpus_block, seed):
    generator = np.random.default_rng(seed)
    # Small whole numbers: many scores are equal, and all are exact in float32.
    corpus = generator.integers(-2, 3, size=(vectors, 3)).astype(np.float32)
    wanted = generator.integers(-2, 3, size=(queries, 3)).astype(np.float32)
    scores, positions = Index.build(corpus).search(wanted, k, query_block=query_block, corpus_block=corpus_block)
    expected = brute_force(wanted, corpus, k)
    assert scores.dtype == np.float32 and positions.dtype == np.int64
    np.testing.assert_array_equal(positions, expected[1])
    np.testing.assert_array_equal(scores, expected[0])


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30))
def test_keys_sort_like_scores_then_positions(values):
    scores = torch.tensor([values])
    found, positions = from_keys(best_keys(scores, len(values), 5))
    order = sorted(range(len(values)), key=lambda position: (-values[position], position))
    assert positions[0].tolist() == [position + 5 for position in order]
    assert found[0].tolist() == [values[position] for position in order]


def test_random_vectors_of_a_store_agree_with_faiss(tmp_path):
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(3000, 24)).astype(np.float32)
    queries = generator.normal(size=(40, 24)).astype(np.float32)
    table = Corpus.from_records([{"document_id": str(n), "text": "t"} for n in range(3000)])
    store = EmbeddingStore.write(tmp_path / "store", vectors, table)
    scores, positions = Index.build(store).search(queries, 50, query_block=7, corpus_block=601)
    import faiss

    flat = faiss.IndexFlatIP(24)
    flat.add(vectors)
    theirs = flat.search(queries, 50)
    np.testing.assert_array_equal(positions, theirs[1])
    np.testing.assert_allclose(scores, theirs[0], rtol=1e-5)
    # Through FAISS itself, from the same store, kept in the cache.
    ours = Index.build(store, "IDMap,Flat", cache_dir=tmp_path).search(queries, 50)
    np.testing.assert_array_equal(ours[1], positions)
    assert len(list((tmp_path / "faiss").glob("*/shard-00000.faiss"))) == 1


def test_cosine(tmp_path):
    generator = np.random.default_rng(1)
    vectors = generator.normal(size=(50, 8)).astype(np.float32) * generator.uniform(0.1, 9, (50, 1))
    queries = generator.normal(size=(6, 8)) * 7
    cosine = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (
        vectors / np.linalg.norm(vectors, axis=1)[:, None]
    ).T
    for factory in ("Flat", "HNSW32,Flat"):
        scores, positions = Index.build(vectors, factory, normalize=True).search(queries, 5)
        np.testing.assert_array_equal(positions, np.argsort(-cosine, axis=1)[:, :5])
        np.testing.assert_allclose(scores, -np.sort(-cosine, axis=1)[:, :5], atol=1e-5)


def test_memory_is_bounded_by_a_block(monkeypatch, tmp_path):
    """Neither more vectors than a block nor more scores than block times block are ever in memory."""
    vectors = np.random.default_rng(0).normal(size=(1000, 4)).astype(np.float32)
    table = Corpus.from_records([{"document_id": str(n), "text": "t"} for n in range(1000)])
    store = EmbeddingStore.write(tmp_path / "store", vectors, table)
    read, scored = [], []
    rows, best = EmbeddingStore.rows, index_module.best_keys
    monkeypatch.setattr(EmbeddingStore, "rows", lambda self, a, z: (read.append(z - a), rows(self, a, z))[1])
    monkeypatch.setattr(
        index_module, "best_keys", lambda scores, *rest: (scored.append(scores.shape), best(scores, *rest))[1]
    )
    Index.build(store).search(vectors[:90], 10, query_block=32, corpus_block=100)
    assert read == [100] * 10
    assert set(scored) == {(32, 100), (26, 100)} and len(scored) == 30
    # By default a block is at most some 100 MB, however wide the vectors are.
    for width in (8, 384, 4096):
        rows_of_a_block = Index.build(np.zeros((1, width), np.float32))._block_rows
        assert 1024 <= rows_of_a_block <= 65536 and rows_of_a_block * width * 4 <= 2**27


def test_approximate_indexes(tmp_path):
    generator = np.random.default_rng(2)
    centers = generator.normal(size=(16, 16)) * 4
    vectors = (centers[generator.integers(0, 16, 2000)] + generator.normal(size=(2000, 16))).astype(np.float32)
    queries = vectors[:50] + generator.normal(size=(50, 16)).astype(np.float32) / 10
    truth = brute_force(queries, vectors, 10)[1]
    for factory, options, least in (
        ("HNSW32,Flat", "efSearch=128", 0.9),
        ("IVF16,Flat", "nprobe=16", 0.99),
        ("IVF16,PQ8x4", "nprobe=16", 0.3),
        ("SQ8", None, 0.8),
    ):
        index = Index.build(vectors, factory, search_options=options)
        scores, positions = index.search(queries, 10)
        recall = np.mean([len(set(one) & set(other)) / 10 for one, other in zip(positions, truth)])
        assert recall >= least, (factory, recall)
        assert (np.diff(scores, axis=1) <= 0).all()
        again = Index.build(vectors, factory, search_options=options).search(queries, 10)
        if "HNSW" not in factory:
            np.testing.assert_array_equal(positions, again[1])


def test_many_lists_are_trained_on_many_vectors(monkeypatch):
    seen, fill = [], Index._fill

    def noted(self, faiss, index, train_rows, seed):
        seen.append(train_rows)
        return fill(self, faiss, index, min(train_rows, 100), seed)

    monkeypatch.setattr(Index, "_fill", noted)
    vectors = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    for factory in ("IVF4,Flat", "HNSW8,Flat"):
        Index.build(vectors, factory)
    Index.build(vectors, "IVF4,Flat", train_rows=50)
    assert seen == [262_144, 262_144, 50]
    lists = [index_module.number_of_lists(index_module.empty_index(one, 64)) for one in ("IVF16384_HNSW8,PQ4", "PQ4")]
    assert lists == [16_384, 0]
    monkeypatch.setattr(index_module, "_TRAIN_ROWS", 10)
    Index.build(vectors, "IVF4,Flat")
    assert seen[-1] == 4 * 39


def test_what_an_approximate_index_does_not_find_is_minus_one():
    vectors = np.random.default_rng(3).normal(size=(400, 8)).astype(np.float32)
    scores, positions = Index.build(vectors, "IVF64,Flat", search_options="nprobe=1").search(vectors[:20], 100)
    nothing = positions < 0
    assert nothing.any() and (scores[nothing] == -np.inf).all() and np.isfinite(scores[~nothing]).all()
    assert (np.diff(nothing.astype(int), axis=1) >= 0).all()  # at the end


def test_k_is_cut_to_the_corpus():
    vectors = np.eye(3, dtype=np.float32)
    for factory in ("Flat", "HNSW8,Flat"):
        scores, positions = Index.build(vectors, factory).search(vectors[:1], 10)
        assert positions.shape == scores.shape == (1, 3) and sorted(positions[0]) == [0, 1, 2]
    assert Index.build(vectors).search(np.empty((0, 3)), 2)[1].shape == (0, 2)


def test_bad_input():
    vectors = np.eye(4, dtype=np.float32)
    with pytest.raises(InputError, match="FAISS cannot make 'Nonsense7'"):
        Index.build(vectors, "Nonsense7")
    with pytest.raises(InputError, match="cannot be trained on 4 vectors"):
        Index.build(vectors, "IVF64,Flat")
    with pytest.raises(InputError, match="'nosuch=1' does not suit HNSW8,Flat"):
        Index.build(vectors, "HNSW8,Flat", search_options="nosuch=1")
    with pytest.raises(InputError, match="exact search has no options"):
        Index.build(vectors, search_options="nprobe=1")
    with pytest.raises(InputError, match="width 4"):
        Index.build(vectors).search(np.ones((2, 5)), 1)
    with pytest.raises(InputError, match="k is 0"):
        Index.build(vectors).search(vectors, 0)
    with pytest.raises(InputError, match="no vectors"):
        Index.build(vectors[:0])
    broken = vectors.copy()
    broken[2, 2] = np.nan
    with pytest.raises(InputError, match="not numbers"):
        Index.build(broken).search(vectors, 2)


def test_search_options_after_a_semicolon():
    """Probing every list of an inverted file is exact search; probing one is not."""
    generator = np.random.default_rng(0)
    vectors, queries = (generator.normal(size=(n, 16)).astype(np.float32) for n in (2000, 30))
    exact = Index.build(vectors).search(queries, 10)[1]
    one = Index.build(vectors, "IVF16,Flat").search(queries, 10)[1]
    every = Index.build(vectors, "IVF16,Flat;nprobe=16").search(queries, 10)[1]
    assert (every == exact).mean() == 1.0
    assert (one == exact).mean() < 0.9
    with pytest.raises(InputError, match="nonsense"):
        Index.build(vectors, "IVF16,Flat;nonsense=3")
