"""The negatives of teleportation episodes."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from hf_distill.data import Corpus, Queries, RowSet, load_collection
from hf_distill.data.collection import Collection
from hf_distill.data.negatives import TrainingRows
from hf_distill.data.qrels import Qrels
from hf_distill.data.run import Run
from hf_distill.errors import InputError
from hf_distill.models import LexicalRetriever, MultiVectorRetriever, load_model
from hf_distill.retrieval import search, teleport
from hf_distill.retrieval.encode import encode_texts
from hf_distill.retrieval.searching import cosine_of_raw_vectors
from hf_distill.retrieval.teleport import EpisodeOptions, first_positives, mine_episode, without


@pytest.fixture
def model(tiny_bert):
    return load_model(tiny_bert)


@pytest.fixture
def collection(micro):
    return load_collection(micro)


def negatives(rows, source):
    """Of each query, the negatives from one source."""
    found = {}
    for row in range(len(rows)):
        names = rows.values_at("sources", row)
        found[int(rows.query[row])] = set(rows.documents_at(row)[names == source].tolist())
    return found


def nearest(vectors, passages, k):
    vectors, passages = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (vectors, passages))
    return np.argsort(-(vectors @ passages.T), axis=1, kind="stable")[:, :k]


def test_an_episode_holds_neighbours_of_queries_and_of_positives(model, collection, tmp_path):
    options = EpisodeOptions(depth=12, query_negatives=40, positive_negatives=40)
    episode = mine_episode(model, collection, "train", 1, options=options, dtype="float32", cache_dir=tmp_path)
    qrels = collection.split("train")
    queries = qrels.query_positions()
    assert cosine_of_raw_vectors(model)  # as `nearest` compares
    passages = encode_texts(model, collection.corpus.texts(), "passage", dtype="float32")
    anchors = first_positives(qrels, queries)
    known = {}
    for part in collection.qrels.values():
        for query, document, grade in zip(part.query.tolist(), part.document.tolist(), part.relevance.tolist()):
            known.setdefault(query, set()).update([document] if grade >= 1 else [])
    vectors = encode_texts(model, collection.queries.texts(queries), "query", dtype="float32")
    near_query = nearest(vectors, passages, 12)
    near_positive = nearest(passages[anchors], passages, 12)
    for source, found in (("query@1", near_query), ("positive@1", near_positive)):
        expected = {int(q): set(row.tolist()) - known[int(q)] for q, row in zip(queries, found)}
        mined = negatives(episode.rows, source)
        assert {q: mined[q] for q in mined} == {q: expected[q] for q in mined}
        assert all(anchor not in mined[int(q)] for q, anchor in zip(queries, anchors) if int(q) in mined)
    assert episode.run.documents.shape == (len(queries), 12)
    assert episode.rows.metadata["teleport"]["episode"] == 1


def test_momentum_keeps_the_whole_pool_before(model, collection, tmp_path):
    options = EpisodeOptions(depth=30, query_negatives=5, positive_negatives=4)
    first = mine_episode(model, collection, "train", 1, options=options, cache_dir=tmp_path)
    second = mine_episode("bm25", collection, "train", 2, previous=first.rows, options=options, cache_dir=tmp_path)
    for row in range(len(first.rows)):
        before = first.rows.documents_at(row).tolist()
        assert second.rows.documents_at(row)[: len(before)].tolist() == before
        sources = second.rows.values_at("sources", row)[len(before) :]
        assert set(sources) <= {"query@2", "positive@2"}
        assert len(sources) <= 9
    again = mine_episode("bm25", collection, "train", 2, previous=first.rows, options=options, cache_dir=tmp_path)
    assert again.rows.fingerprint == second.rows.fingerprint
    other = EpisodeOptions(depth=30, query_negatives=5, positive_negatives=4, seed=7)
    assert (
        mine_episode("bm25", collection, "train", 2, previous=first.rows, options=other, cache_dir=tmp_path)
    ).rows.fingerprint != second.rows.fingerprint


def test_weights_of_sources(model, collection, tmp_path):
    """Query's neighbours, lookahead and momentum have their shares of the draws, however many there are of each."""
    options = EpisodeOptions(depth=30, query_negatives=12, positive_negatives=6)
    assert options.groups == ["query", "lookahead", "momentum"]
    pools = [mine_episode(model, collection, "train", 1, options=options, cache_dir=tmp_path).rows]
    for number in (2, 3):
        mined = mine_episode("bm25", collection, "train", number, previous=pools[-1], options=options,
                             cache_dir=tmp_path)  # fmt: skip
        pools.append(mined.rows)
    first, _, third = pools
    assert third.metadata["source_groups"] == {
        "query": ["query@3"],
        "lookahead": ["positive@3"],
        "momentum": ["positive@1", "positive@2", "query@1", "query@2"],
    }
    third.save(tmp_path / "third")
    third = RowSet.load(tmp_path / "third", collection.queries, collection.corpus)
    weights = {"query": 1, "lookahead": 1, "momentum": 2}
    drawn = Counter()
    training = TrainingRows(third, num_negatives=1, seed=3, sources=weights)
    for row in range(len(third)):
        names, documents = third.values_at("sources", row), third.documents_at(row).tolist()
        for epoch in range(100):
            negative = int(training[row, epoch].documents[1])
            # A passage of several sources counts for each in part.
            found = [name for name, one in zip(names, documents) if one == negative]
            drawn.update({name: 1 / len(found) for name in found})
    assert "positive" not in drawn
    expected = Counter()
    for row in range(len(third)):
        names, documents = third.values_at("sources", row), third.documents_at(row)
        for group, members in third.metadata["source_groups"].items():
            here = documents[np.isin(names, members)]
            for one in here.tolist():
                found = [name for name, document in zip(names, documents.tolist()) if document == one]
                share = 100 * weights[group] / 4 / len(here)
                expected.update({name: share / len(found) for name in found})
    for name, count in expected.items():
        assert drawn[name] == pytest.approx(count, rel=0.1), name
    # No pool is before the first: its own sources share the draws.
    assert first.metadata["source_groups"]["momentum"] == []
    assert TrainingRows(first, num_negatives=2, sources=weights)[0, 0].documents.shape == (3,)
    with pytest.raises(InputError, match="no document has the source 'querry'.*'lookahead', 'momentum'"):
        TrainingRows(third, num_negatives=1, sources={"querry": 1})
    with pytest.raises(InputError, match="the source 'query@3' has two weights"):
        TrainingRows(third, num_negatives=1, sources={"query": 1, "query@3": 1})
    alone = EpisodeOptions(depth=30, query_negatives=5, positive_negatives=0, momentum=False)
    rows = mine_episode("bm25", collection, "train", 2, options=alone, cache_dir=tmp_path).rows
    with pytest.raises(InputError, match="no document has the source 'lookahead'"):
        TrainingRows(rows, num_negatives=1, sources={"query": 1, "lookahead": 1})


@pytest.mark.parametrize("kind", ["sparse", "tokens"])
def test_other_retrievers_mine_as_well(kind, tiny_bert, collection, tmp_path):
    """Lexical and multi-vector models find a positive's neighbours with its text as the query."""
    miner = {"sparse": LexicalRetriever, "tokens": MultiVectorRetriever}[kind].from_pretrained(
        tiny_bert, **({"new_head": "random"} if kind == "sparse" else {})
    )
    options = EpisodeOptions(depth=10, query_negatives=4, positive_negatives=3)
    rows = mine_episode(miner, collection, "train", 1, options=options, dtype="float32", cache_dir=tmp_path).rows
    assert {name for row in range(len(rows)) for name in rows.values_at("sources", row)} == {
        "positive", "query@1", "positive@1"
    }  # fmt: skip
    anchors = first_positives(collection.split("train"), rows.query)
    stand_in = Queries.from_records([{"query_id": "0", "text": collection.corpus.texts(anchors[:1])[0]}])
    near = search(miner, Collection("one", stand_in, collection.corpus, {}), None, 10, dtype="float32")
    assert negatives(rows, "positive@1")[int(rows.query[0])] <= set(near.documents[0].tolist())


def test_an_index_that_lacks_passages_is_refused(model, collection, tmp_path):
    """A file of the cache that holds another index than its name says."""
    faiss = pytest.importorskip("faiss")
    mining = {"options": EpisodeOptions(depth=10), "factory": "HNSW8,Flat", "cache_dir": tmp_path}
    mine_episode(model, collection, "train", 1, **mining)
    (file,) = tmp_path.rglob("*.faiss")
    index = faiss.read_index(str(file))
    smaller = faiss.index_factory(index.d, "HNSW8,Flat", faiss.METRIC_INNER_PRODUCT)
    smaller.add(np.zeros((len(collection.corpus) - 1, index.d), np.float32))
    file.unlink()
    faiss.write_index(smaller, str(file))
    for job in tmp_path.glob("search*"):
        shutil.rmtree(job)
    with pytest.raises(InputError, match=f"holds {len(collection.corpus) - 1} of {len(collection.corpus)} vectors"):
        mine_episode(model, collection, "train", 1, **mining)


def test_draws_fit_the_released_code(tmp_path):
    """Which passages can be drawn, and how many, as in the original's mining; its random numbers are its own."""
    golden = json.loads((Path(__file__).parent / "golden" / "tele_mine_marco.json").read_text())
    documents = sorted(
        {p for rows in golden["rank"].values() for p, _ in rows} | set(sum(golden["qrels"].values(), []))
    )
    names = list(golden["rank"])
    queries = Queries.from_records([{"query_id": name, "text": name} for name in names])
    corpus = Corpus.from_records([{"document_id": one, "text": f"passage {one}"} for one in documents])
    pairs = [(names.index(q), documents.index(p)) for q, listed in golden["qrels"].items() for p in listed]
    qrels = Qrels(*zip(*pairs), np.ones(len(pairs)))
    collection = Collection("golden", queries, corpus, {"train": qrels})
    width = max(map(len, golden["rank"].values()))
    table, scores = np.full((len(names), width), -1), np.full((len(names), width), -np.inf)
    for row, name in enumerate(names):
        # The original takes the lines of a ranking as they stand, whatever their scores.
        ranked = [passage for passage, _ in golden["rank"][name]]
        table[row, : len(ranked)] = [documents.index(passage) for passage in ranked]
        scores[row, : len(ranked)] = -np.arange(len(ranked))
    run = Run(np.arange(len(names)), table, scores)
    for case in golden["cases"]:
        options = EpisodeOptions(depth=200, pool_depth=case["depth"], query_negatives=case["n_sample"])
        rows = teleport._draw(run, collection, "train", "query@1", case["n_sample"], 1, options, tmp_path)
        for row, (name, positives, drawn) in enumerate(case["out"]):
            ours = [documents[one] for one in rows.documents_at(row)]
            assert sorted(ours[: rows.num_positives[row]]) == sorted(positives)
            mined = ours[rows.num_positives[row] :]
            allowed = [
                documents[one] for one in table[names.index(name)] if one >= 0 and documents[one] not in positives
            ][: case["depth"]]
            assert len(mined) == len(drawn) and set(mined) <= set(allowed) and set(drawn) <= set(allowed)
            if case["n_sample"] >= len(allowed):
                assert set(mined) == set(drawn)


def test_answers_make_positives_and_forbid_negatives(model, tmp_path):
    texts = ["the river Rhine flows north", "Bonn lies on the Rhine", "a film", "Cologne is a city", "the sea"] * 4
    corpus = Corpus.from_records(
        [{"document_id": f"d{i}", "title": "Rhine", "text": f"{text} {i}"} for i, text in enumerate(texts)]
    )
    queries = Queries.from_records(
        [{"query_id": name, "text": text} for name, text in (("a", "which river"), ("b", "which city"), ("c", "none"))]
    )
    collection = Collection("qa", queries, corpus, {"train": Qrels([1], [3], [1])})
    answers = {0: ["Rhine"], 1: ["Cologne", "Bonn"], 2: ["nowhere"]}
    options = EpisodeOptions(depth=20, query_negatives=20, positive_negatives=20)
    rows = mine_episode(model, collection, "train", 1, options=options, answers=answers, cache_dir=tmp_path).rows
    assert rows.query.tolist() == [0, 1]
    for row, words in enumerate((("Rhine",), ("Cologne", "Bonn"))):
        listed = corpus.texts(rows.documents_at(row), "{text}")
        has = [any(word in text for word in words) for text in listed]
        assert has[: rows.num_positives[row]] == [True] * int(rows.num_positives[row])
        assert not any(has[rows.num_positives[row] :]) and len(has) > 5
    assert rows.documents_at(1)[0] == 3


def test_without():
    run = Run([0], [[4, 5, 6, -1]], [[3.0, 2.0, 1.0, -np.inf]])
    kept = without(run, np.array([[False, True, False, False]]))
    assert kept.documents.tolist() == [[4, 6, -1, -1]]
    assert kept.scores.tolist() == [[3.0, 1.0, -np.inf, -np.inf]]


def test_bad_input(model, collection, micro, tmp_path):
    def mining(number=1, **more):
        return mine_episode("bm25", collection, "train", number, cache_dir=tmp_path, **more)

    small = EpisodeOptions(depth=20)
    with pytest.raises(InputError, match="the depth is 100000, and the corpus has"):
        mining(options=EpisodeOptions(depth=100_000))
    with pytest.raises(InputError, match="no pool before it"):
        mining(previous=RowSet.from_qrels(collection, "train"), options=small)
    with pytest.raises(InputError, match="momentum needs the pool"):
        mining(2, options=small)
    with pytest.raises(InputError, match="query_negatives"):
        EpisodeOptions(query_negatives=0, positive_negatives=0)
    first = mining(options=small).rows
    with pytest.raises(InputError, match="that of episode 1"):
        mining(3, previous=first, options=small)
    other = Corpus.from_records([{"document_id": f"d{i}", "text": "another"} for i in range(60)])
    foreign = RowSet.from_arrays(collection.queries, other, [0], [[0, 1]], [1], sources=[["positive", "x"]])
    with pytest.raises(InputError, match="another corpus"):
        mining(2, previous=foreign, options=small)
