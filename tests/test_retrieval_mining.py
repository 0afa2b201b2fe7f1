"""Hard negatives: never a positive, inside the window, below the margin, the same for a query whatever the others."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.data import Collection, Corpus, Qrels, Queries, RowSet, Run, load_collection
from hf_distill.errors import InputError
from hf_distill.models import CrossEncoderRanker, DenseRetriever
from hf_distill.retrieval import MiningOptions, bm25_search, encode_texts, mine, search
from hf_distill.retrieval import candidates as candidates_module


def task(num_queries: int, num_documents: int, judged: dict[str, list[tuple[int, int, int]]]) -> Collection:
    queries = Queries.from_records([{"query_id": f"q{n}", "text": f"query {n}"} for n in range(num_queries)])
    corpus = Corpus.from_records([{"document_id": f"d{n}", "text": f"text {n}"} for n in range(num_documents)])
    return Collection(
        "task", queries, corpus, {split: Qrels(*np.array(rows).T.reshape(3, -1)) for split, rows in judged.items()}
    )


@st.composite
def mined(draw):
    """A collection, a run over it and options."""
    queries, documents = draw(st.integers(1, 7)), draw(st.integers(3, 14))
    pairs = st.tuples(st.integers(0, queries - 1), st.integers(0, documents - 1))
    train = draw(st.dictionaries(pairs, st.integers(0, 3), min_size=1, max_size=15))
    dev = draw(st.dictionaries(pairs, st.integers(0, 2), max_size=6))
    judged = {
        "train": [(q, d, grade) for (q, d), grade in train.items()],
        "dev": [(q, d, grade) for (q, d), grade in dev.items()],
    }
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    width = draw(st.integers(1, documents))
    found = np.stack([generator.permutation(documents)[:width] for _ in range(queries)])
    scores = -np.sort(-generator.normal(size=found.shape).astype(np.float32).round(1), axis=1)
    empty = generator.random(queries) < 0.2
    found[empty, width // 2 :] = -1
    scores[found < 0] = -np.inf
    first = draw(st.integers(1, 5))
    options = {
        "depth": draw(st.integers(first, 20)),
        "window": draw(st.sampled_from([None, (first, first), (first, first + 3), (first, 50)])),
        "num_negatives": draw(st.sampled_from([None, 1, 2, 5])),
        "margin": draw(st.sampled_from([None, 0.0, 0.3, -0.4])),
        "relative_margin": draw(st.sampled_from([None, 0.0, 0.1])),
        "max_score": draw(st.sampled_from([None, 0.5])),
        "min_score": draw(st.sampled_from([None, -1.0])),
        "sampling": draw(st.sampled_from(["top", "random"])),
        "seed": draw(st.integers(0, 3)),
        "threshold": draw(st.integers(1, 2)),
        "include_unlabelled": draw(st.booleans()),
        "too_few": draw(st.sampled_from(["keep", "drop"])),
    }
    return task(queries, documents, judged), Run(np.arange(queries), found, scores), options


def eligible_by_hand(collection: Collection, run: Run, options: dict, row: int) -> tuple[list[int], list[int]]:
    """The row's positives, best grade first, and its eligible documents by rank: plain Python."""
    query = int(run.query[row])
    grades = {split: {} for split in collection.qrels}
    for split, qrels in collection.qrels.items():
        for q, document, grade in zip(qrels.query.tolist(), qrels.document.tolist(), qrels.relevance.tolist()):
            if q == query and grade >= options["threshold"]:
                grades[split][document] = grade
    anywhere = set().union(*grades.values())
    depth = min(options["depth"], len(collection.corpus))
    documents, scores = run.documents[row, :depth].tolist(), run.scores[row, :depth].tolist()
    known = [score for document, score in zip(documents, scores) if document in grades["train"]]
    reference = min(known) if known else None
    first, last = options["window"] or (1, depth)
    kept = []
    for rank, (document, score) in enumerate(zip(documents, scores), start=1):
        if document < 0 or document in anywhere or not first <= rank <= last:
            continue
        if reference is not None:
            if options["margin"] is not None and score > np.float32(reference - np.float32(options["margin"])):
                continue
            if options["relative_margin"] is not None and score > np.float32(reference) - np.float32(
                options["relative_margin"]
            ) * abs(np.float32(reference)):
                continue
        if options["max_score"] is not None and score > options["max_score"]:
            continue
        if options["min_score"] is not None and score < options["min_score"]:
            continue
        kept.append(document)
    return sorted(grades["train"], key=lambda document: (-grades["train"][document], document)), kept


@settings(max_examples=150, deadline=None)
@given(mined())
def test_mined_rows_are_those_that_plain_python_allows(case):
    collection, run, options = case
    run = run.sorted(collection.corpus)
    judged = set(collection.qrels["train"].query.tolist()) | set(collection.qrels["dev"].query.tolist())
    expected = {}
    for row in range(len(run)):
        positives, allowed = eligible_by_hand(collection, run, options, row)
        wanted = bool(positives) or (options["include_unlabelled"] and int(run.query[row]) not in judged)
        number = options["num_negatives"]
        if wanted and allowed and not (number and options["too_few"] == "drop" and len(allowed) < number):
            expected[row] = (positives, allowed)
    if not expected:
        with pytest.raises(InputError, match="no query"):
            mine(run, collection, "train", **options)
        return
    rows = mine(run, collection, "train", **options)
    assert rows.query.tolist() == sorted(expected)
    for number, row in enumerate(sorted(expected)):
        positives, allowed = expected[row]
        documents = rows.documents_at(number).tolist()
        count = int(rows.num_positives[number])
        assert documents[:count] == positives
        negatives = documents[count:]
        size = len(allowed) if options["num_negatives"] is None else min(len(allowed), options["num_negatives"])
        if options["sampling"] == "top":
            assert negatives == allowed[:size]
        else:
            assert len(negatives) == size and [one for one in allowed if one in negatives] == negatives
        results = run.documents[row].tolist()
        ranks = rows.values_at("ranks", number).tolist()
        depth = min(options["depth"], len(collection.corpus))
        assert ranks[count:] == [results.index(one) + 1 for one in negatives]
        assert ranks[:count] == [results.index(one) + 1 if one in results[:depth] else 0 for one in positives]
        scores = rows.values_at("retriever_scores", number)
        assert scores[count:].tolist() == [run.scores[row, results.index(one)] for one in negatives]
        assert rows.values_at("sources", number).tolist() == ["positive"] * count + ["run"] * len(negatives)
    report = rows.metadata["mining"]
    assert report["rows"] == len(rows)
    assert report["negatives"] == int(rows.lengths.sum() - rows.num_positives.sum())
    assert sum(report["margins"]["counts"]) <= report["negatives"]


@pytest.fixture()
def collection(micro):
    return load_collection(micro)


@pytest.fixture()
def model(tiny_bert):
    return DenseRetriever.from_pretrained(tiny_bert, normalize=True)


def negatives_of(rows: RowSet) -> dict[int, list[int]]:
    return {
        int(query): rows.documents_at(number)[rows.num_positives[number] :].tolist()
        for number, query in enumerate(rows.query)
    }


def test_a_sample_depends_on_seed_and_query_only(collection, model):
    settings = {"depth": 40, "num_negatives": 5, "sampling": "random"}
    together = negatives_of(mine(model, collection, "train", **settings))
    queries = sorted(together)
    some = negatives_of(mine(model, collection, "train", query_positions=queries[3:9], **settings))
    assert some == {query: together[query] for query in queries[3:9]}
    other = negatives_of(mine(model, collection, "train", seed=7, **settings))
    assert sum(other[query] == together[query] for query in queries) < len(queries) / 2
    # It is a sample of the whole window, not its head.
    run = search(model, collection, queries, 40)
    ranks = [
        run.documents[row].tolist().index(one) for row, query in enumerate(run.query) for one in together[int(query)]
    ]
    assert 12 < np.mean(ranks) < 28


def test_blocks_do_not_matter(collection, model, monkeypatch, tmp_path):
    settings = {"depth": 30, "num_negatives": 4, "sampling": "random", "margin": 0.0}
    whole = mine(model, collection, "train", **settings)
    monkeypatch.setattr(candidates_module, "_BLOCK_QUERIES", 5)
    parts = mine(model, collection, "train", cache_dir=tmp_path / "other", **settings)
    assert parts.table.to_pylist() == whole.table.to_pylist()
    assert parts.metadata == whole.metadata


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_positives_have_the_retrievers_true_scores(collection, model):
    rows = mine(model, collection, "train", depth=3, num_negatives=2, dtype="float32")
    missed = 0
    for number, query in enumerate(rows.query):
        vectors = encode_texts(model, collection.corpus.texts(rows.documents_at(number)), dtype="float32")
        question = encode_texts(model, collection.queries.texts([query]), "query", dtype="float32")[0]
        np.testing.assert_allclose(rows.values_at("retriever_scores", number), vectors @ question, atol=1e-5)
        missed += int((rows.values_at("ranks", number) == 0).sum())
    assert missed, "the depth is small enough that some positives are not retrieved"


def test_a_teacher_filters_and_its_scores_are_kept(collection, tiny_ranker):
    ranker = CrossEncoderRanker.from_pretrained(tiny_ranker)
    run = bm25_search(collection, None, 50)
    rows = mine(run, collection, "train", depth=50, filter_teacher=ranker, margin=0.0, dtype="float32")
    everything = mine(run, collection, "train", depth=50)
    assert "scores" in rows.score_columns and "scores" not in everything.score_columns
    from sentence_transformers import CrossEncoder

    ranker.save_pretrained("saved")
    theirs = CrossEncoder("saved", device="cpu")
    kept = negatives_of(rows)
    for number, query in enumerate(everything.query.tolist()):
        documents = everything.documents_at(number)
        text = collection.queries.texts([query])[0]
        scores = theirs.predict([(text, passage) for passage in collection.corpus.texts(documents)])
        positives = int(everything.num_positives[number])
        limit = scores[:positives].min()
        margin = np.abs(scores[positives:] - limit)
        allowed = documents[positives:][scores[positives:] <= limit]
        if margin.min(initial=1) > 1e-4:
            assert kept.get(query, []) == allowed.tolist()
    for number in range(len(rows)):
        scores, count = rows.values_at("scores", number), rows.num_positives[number]
        assert (scores[count:] <= scores[:count].min()).all()
    assert rows.metadata["teachers"]["scores"]["weights"] == ranker.weights_fingerprint()
    assert 0 < rows.metadata["mining"]["filtered_by_score"]


def test_unlabelled_queries_become_rows_but_test_queries_never_do(collection):
    kept = collection.qrels["train"].query_positions()[:5]
    dropped = collection.qrels["train"].query_positions()[5:]
    part = Collection(
        "part",
        collection.queries,
        collection.corpus,
        {**collection.qrels, "train": collection.qrels["train"].subset(kept)},
    )
    rows = mine("bm25", part, "train", depth=10, include_unlabelled=True)
    assert set(rows.query[rows.num_positives > 0]) == set(kept)
    judged = np.concatenate([qrels.query for qrels in part.qrels.values()])
    unlabelled = rows.query[rows.num_positives == 0]
    assert len(unlabelled) and set(dropped) & set(unlabelled) and not set(unlabelled) & set(judged)
    only = mine("bm25", Collection("none", part.queries, part.corpus, {}), None, depth=5, include_unlabelled=True)
    assert (only.num_positives == 0).all() and only.metadata["split"] is None
    with pytest.raises(InputError, match="no split"):
        mine("bm25", part, None)


def test_provenance_tells_how_the_rows_were_made(collection, model, tmp_path):
    rows = mine(model, collection, "train", depth=20, num_negatives=3, window=(2, 15), margin=0.0, source="dense@0")
    mining = rows.metadata["mining"]
    assert mining["retriever"]["weights"] == model.weights_fingerprint()
    assert mining["retriever"]["index"] == "Flat" and mining["source"] == "dense@0"
    assert (mining["depth"], mining["window"], mining["num_negatives"], mining["margin"]) == (20, [2, 15], 3, 0.0)
    assert mining["positives_removed"] > 0 and mining["seed"] == 42 and mining["sampling"] == "top"
    counts, edges = mining["margins"]["counts"], mining["margins"]["edges"]
    assert len(edges) == len(counts) + 1 and sum(counts) == mining["negatives"] and edges[0] >= 0
    again = RowSet.load(rows.save(tmp_path / "rows"), collection.queries, collection.corpus)
    assert again.metadata["mining"] == mining
    assert again.table.to_pylist() == rows.table.to_pylist()


def test_shortages_are_reported(collection, caplog):
    run = bm25_search(collection, None, 80)
    caplog.set_level(logging.INFO, "hf_distill")
    logging.getLogger("hf_distill").propagate = True
    rows = mine(run, collection, "train", depth=500, num_negatives=30)
    assert "depth 500 is more than the" in caplog.text and "have fewer than 30 negatives" in caplog.text
    few = rows.metadata["mining"]["queries_with_too_few"]
    assert few > 0 and rows.metadata["mining"]["depth"] == len(collection.corpus)
    dropped = mine(run, collection, "train", depth=500, num_negatives=30, too_few="drop")
    assert len(dropped) == 36 - few and (dropped.lengths - dropped.num_positives == 30).all()
    with pytest.raises(InputError, match=r"query 'q\d+' keeps \d+ negatives of the 30"):
        mine(run, collection, "train", depth=500, num_negatives=30, too_few="error")
    with pytest.raises(InputError, match=r"no query keeps a negative \(\d+ results were positives"):
        mine(run, collection, "train", depth=500, max_score=-1.0)


def test_bad_options(collection, model):
    for options, message in (
        ({"depth": 0}, "depth is 0"),
        ({"window": (0, 5)}, "not a window"),
        ({"window": (9, 5)}, "not a window"),
        ({"window": (300, 400)}, "begins at rank 300, below the depth of 200"),
        ({"num_negatives": 0}, "0 negatives"),
        ({"sampling": "hardest"}, "'hardest' is not a sampling"),
        ({"too_few": "ignore"}, "'ignore' is not a choice"),
        ({"relative_margin": 1.5}, "1.5 is not a share"),
        ({"marign": 1}, r"unknown options \['marign'\]"),
    ):
        with pytest.raises(InputError, match=message):
            mine(model, collection, "train", **options)
    with pytest.raises(InputError, match="no split 'trian'"):
        mine(model, collection, "trian")
    with pytest.raises(InputError, match="'tfidf' is not a retriever"):
        mine("tfidf", collection, "train")
    stranger = collection.qrels["test"].query_positions()[:1]
    with pytest.raises(InputError, match="are not among those of split 'train'"):
        mine(model, collection, "train", query_positions=stranger)
    run = bm25_search(collection, stranger, 10)
    with pytest.raises(InputError, match="no query to mine for"):
        mine(run, collection, "train")
    assert MiningOptions(window=(3, 9)).window == (3, 9)


def test_a_relative_margin_lowers_negative_scores_too():
    collection = task(1, 5, {"train": [(0, 0, 1)]})
    scores = np.array([[-1.0, -1.05, -1.2, -1.3]], dtype=np.float32)
    run = Run([0], np.array([[0, 1, 2, 3]]), scores)
    assert negatives_of(mine(run, collection, "train", relative_margin=0.1)) == {0: [2, 3]}
    positive = Run([0], np.array([[1, 0, 2, 3]]), np.array([[2.0, 1.0, 0.95, 0.5]], dtype=np.float32))
    assert negatives_of(mine(positive, collection, "train", relative_margin=0.1)) == {0: [3]}


def test_without_a_positives_score_a_margin_drops_nothing():
    collection = task(1, 5, {"train": [(0, 4, 1)]})
    run = Run([0], np.array([[0, 1]]), np.array([[3.0, 2.0]], dtype=np.float32))
    rows = mine(run, collection, "train", margin=0.5)
    assert negatives_of(rows) == {0: [0, 1]} and rows.metadata["mining"]["queries_without_reference"] == 1
    assert rows.values_at("retriever_scores", 0).tolist() == [2.0, 3.0, 2.0]
    assert rows.values_at("ranks", 0).tolist() == [0, 1, 2]
