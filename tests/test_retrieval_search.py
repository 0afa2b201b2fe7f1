"""Search with models and with BM25, against independent computations."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest

from hf_distill.data import Corpus, Run, load_collection
from hf_distill.errors import InputError
from hf_distill.files import cache_folder
from hf_distill.models import CrossEncoderRanker, DenseRetriever
from hf_distill.retrieval import InferenceModel, Searcher, bm25_search, estimate_seconds, search
from hf_distill.retrieval.bm25 import BM25Index
from hf_distill.retrieval.searching import read_search, run_search
from hf_distill.retrieval.shards import ShardedJob


@pytest.fixture()
def collection(micro):
    return load_collection(micro)


@pytest.mark.parametrize("settings", [{"normalize": True}, {"similarity": "cosine"}, {"similarity": "dot"}])
def test_search_equals_sentence_transformers(tiny_bert, collection, tmp_path, settings):
    from sentence_transformers import SentenceTransformer

    model = DenseRetriever.from_pretrained(tiny_bert, query_prompt="ask: ", **settings)
    queries = np.array([5, 2, 40])
    run = search(model, collection, queries, 12, dtype="float32")
    model.save_pretrained(tmp_path / "saved")
    theirs = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    scores = theirs.similarity(
        theirs.encode_query(collection.queries.texts(queries)), theirs.encode_document(collection.corpus.texts())
    ).numpy()
    np.testing.assert_array_equal(run.query, queries)
    np.testing.assert_allclose(run.scores, -np.sort(-scores, axis=1)[:, :12], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(scores, run.documents, 1), run.scores, rtol=1e-5, atol=1e-5)


def test_searching_again_computes_nothing(tiny_bert, collection, monkeypatch):
    model = DenseRetriever.from_pretrained(tiny_bert)
    first = search(model, collection, None, 10)
    for name in ("encode", "score"):
        monkeypatch.setattr(InferenceModel, name, lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr("hf_distill.retrieval.index.Index.search", lambda *_: pytest.fail("searched again"))
    second = search(model, collection, None, 10)
    np.testing.assert_array_equal(first.documents, second.documents)
    np.testing.assert_array_equal(first.scores, second.scores)
    assert len(first) == len(collection.queries)


def test_a_model_in_training_leaves_nothing_behind(tiny_bert, collection):
    model = DenseRetriever.from_pretrained(tiny_bert)
    kept = search(model, collection, [3, 4], 10)
    before = sorted(cache_folder().rglob("*"))
    run = search(model, collection, [3, 4], 10, keep=False)
    np.testing.assert_array_equal(run.documents, kept.documents)
    assert sorted(cache_folder().rglob("*")) == before


def test_more_documents_than_there_are_and_no_queries(tiny_bert, collection):
    model = DenseRetriever.from_pretrained(tiny_bert)
    run = search(model, collection, [0], 10_000)
    assert sorted(run.documents[0]) == list(range(len(collection.corpus)))
    assert search(model, collection, [], 5).documents.shape == (0, 5)
    with pytest.raises(InputError, match="listed twice"):
        search(model, collection, [1, 1], 5)
    with pytest.raises(InputError, match="k is 0"):
        search(model, collection, [1], 0)


def test_an_approximate_index_through_search(tiny_bert, collection):
    model = DenseRetriever.from_pretrained(tiny_bert, normalize=True)
    exact = search(model, collection, None, 5, dtype="float32")
    near = search(model, collection, None, 5, dtype="float32", factory="HNSW32,Flat", search_options="efSearch=200")
    np.testing.assert_allclose(near.scores, exact.scores, atol=1e-5)


def test_searcher_answers_like_search(tiny_bert, collection):
    model = DenseRetriever.from_pretrained(tiny_bert, similarity="cosine", query_prompt="ask: ")
    run = search(model, collection, [7], 4, dtype="float32")
    searcher = Searcher(model, collection.corpus, dtype="float32")
    scores, positions = searcher(collection.queries.texts([7])[0], 4)
    np.testing.assert_array_equal(positions, run.documents[0])
    np.testing.assert_allclose(scores, run.scores[0], atol=1e-6)
    lexical = Searcher("bm25", collection.corpus)
    assert [len(part) for part in lexical("qqqqq zzzzz", 5)] == [0, 0]
    with pytest.raises(InputError, match="'splade' is not a model"):
        Searcher("splade", collection.corpus)


@pytest.mark.parametrize("size", [3, 2**33])
def test_results_survive_their_packed_form(tmp_path, size):
    generator = np.random.default_rng(0)
    documents = generator.integers(-1, size, (11, 4))
    scores = generator.normal(size=(11, 4)).astype(np.float32)
    scores[documents < 0] = -np.inf
    job = ShardedJob(tmp_path, {}, 3)
    run_search(job, 4, 4, lambda start, stop: (scores[start:stop], documents[start:stop]), 11)
    found = read_search(job)
    np.testing.assert_array_equal(found[0], documents)
    np.testing.assert_array_equal(found[1], scores)


# ------------------------------------------------------------------------------------------------------------- BM25


def lucene_bm25(queries, documents, k1=1.2, b=0.75):
    """BM25 as Lucene computes it, word by word; the words come from bm25s."""
    import bm25s
    import Stemmer

    def words(texts):
        return bm25s.tokenize(
            texts, stopwords="en", stemmer=Stemmer.Stemmer("english"), return_ids=False, show_progress=False
        )

    documents, queries = words(documents), words(queries)
    frequency = Counter(word for document in documents for word in set(document))
    mean = sum(map(len, documents)) / len(documents)
    scores = np.zeros((len(queries), len(documents)))
    for i, query in enumerate(queries):
        for word in query:
            idf = math.log(1 + (len(documents) - frequency[word] + 0.5) / (frequency[word] + 0.5))
            for j, document in enumerate(documents):
                count = document.count(word)
                scores[i, j] += idf * count / (count + k1 * (1 - b + b * len(document) / mean))
    return scores


def test_bm25_equals_its_formula(collection):
    run = bm25_search(collection, None, 15)
    scores = lucene_bm25(collection.queries.texts(), collection.corpus.texts())
    expected = -np.sort(-scores, axis=1)[:, :15]
    found = np.where(run.documents >= 0, run.scores, 0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    rows, columns = np.nonzero(run.documents >= 0)
    np.testing.assert_allclose(scores[rows, run.documents[rows, columns]], run.scores[rows, columns], rtol=1e-4)


def test_bm25_returns_only_what_shares_a_word():
    corpus = Corpus.from_records(
        [{"document_id": str(n), "text": text} for n, text in enumerate(["red fox", "blue fox", "green"])]
    )
    scores, positions = BM25Index(corpus).search(["a fox runs", "yellow", "the", ""], 3)
    assert positions.tolist() == [[0, 1, -1], [-1] * 3, [-1] * 3, [-1] * 3]
    assert (scores[positions < 0] == -np.inf).all() and (scores[0, :2] > 0).all()


def test_bm25_does_not_depend_on_blocks_or_titles_being_apart(collection, monkeypatch):
    whole = bm25_search(collection, [1, 2, 3], 10)
    monkeypatch.setattr("hf_distill.retrieval.bm25._BLOCK_TEXTS", 7)
    monkeypatch.setenv("HF_DISTILL_CACHE", str(cache_folder() / "other"))
    parts = bm25_search(collection, [1, 2, 3], 10)
    np.testing.assert_array_equal(whole.documents, parts.documents)
    np.testing.assert_array_equal(whole.scores, parts.scores)


def test_bm25_with_numba_is_the_same(collection, monkeypatch):
    plain = bm25_search(collection, None, 10)
    monkeypatch.setattr("hf_distill.retrieval.bm25._NUMBA_PAIRS", 1)
    fast = bm25_search(collection, None, 10)
    np.testing.assert_allclose(fast.scores, plain.scores, rtol=1e-5)


def test_bm25_settings(collection):
    one = bm25_search(collection, [0], 5)
    assert not np.array_equal(one.scores, bm25_search(collection, [0], 5, k1=0.9, b=0.4).scores)
    assert isinstance(bm25_search(collection, [0], 5, language=None, stopwords=None), Run)
    with pytest.raises(InputError, match="'klingon'.*english"):
        bm25_search(collection, [0], 5, language="klingon")


# --------------------------------------------------------------------------------------------------------- estimate


def test_estimates_grow_with_the_work_and_know_the_cache(tiny_bert, tiny_ranker, collection):
    model = DenseRetriever.from_pretrained(tiny_bert)
    small, large = (estimate_seconds(model, collection, count) for count in (60, 600_000))
    assert 0 < small < 5 and large > 100 * small
    search(model, collection, None, 5)
    assert estimate_seconds(model, collection, len(collection.corpus)) == 0
    ranker = CrossEncoderRanker.from_pretrained(tiny_ranker)
    assert 0 < estimate_seconds(ranker, collection, 1000, pairs=True) < 60
    assert estimate_seconds(ranker, collection, 0, pairs=True) == 0


def test_the_package_is_lazy_and_its_functions_are_not_shadowed():
    import hf_distill.retrieval as package

    assert callable(package.search) and callable(package.mine)
    assert not [name for name in package.__all__ if re.fullmatch(r"[a-z]+", name) and not callable(vars(package).get(
        name, getattr(package, name)))]  # fmt: skip
