"""Scores of given pairs: equal to sentence-transformers, once a pair, from files too."""

from __future__ import annotations

import numpy as np
import pytest

from hf_distill.data import RowSet, Run, load_collection
from hf_distill.errors import InputError
from hf_distill.models import CrossEncoderRanker, DenseRetriever
from hf_distill.retrieval import (
    InferenceModel,
    bm25_search,
    encode_table,
    mine,
    rerank,
    score_from_run,
    score_rows,
    search,
)


@pytest.fixture()
def collection(micro):
    return load_collection(micro)


@pytest.fixture()
def rows(collection):
    return mine("bm25", collection, "train", depth=12)


@pytest.fixture()
def ranker(tiny_ranker):
    return CrossEncoderRanker.from_pretrained(tiny_ranker)


def texts_of(rows, number):
    query = rows.queries.texts([rows.query[number]])[0]
    return [(query, passage) for passage in rows.corpus.texts(rows.documents_at(number))]


@pytest.mark.parametrize("budget", [40, 4096])
def test_a_cross_encoder_scores_like_sentence_transformers(rows, ranker, tmp_path, budget):
    from sentence_transformers import CrossEncoder

    scored = score_rows(ranker, rows, dtype="float32", token_budget=budget)
    ranker.save_pretrained(tmp_path / "saved")
    theirs = CrossEncoder(str(tmp_path / "saved"), device="cpu")
    for number in range(len(rows)):
        expected = theirs.predict(texts_of(rows, number))
        found = scored.values_at("scores", number)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert scored.columns == [*rows.columns, "scores"]


def test_a_dense_model_scores_by_its_embeddings(rows, collection, tiny_bert):
    model = DenseRetriever.from_pretrained(tiny_bert, similarity="cosine", temperature=0.01)
    scored = score_rows(model, rows, column="scores_dense", dtype="float32")
    full = search(model, collection, rows.query, len(collection.corpus), dtype="float32")
    for number in range(len(rows)):
        lookup = dict(zip(full.documents[number].tolist(), full.scores[number].tolist()))
        expected = [lookup[document] for document in rows.documents_at(number).tolist()]
        np.testing.assert_allclose(scored.values_at("scores_dense", number), expected, atol=1e-6)
    assert scored.metadata["teachers"]["scores_dense"]["kind"] == "dense"


def test_only_what_is_in_use_is_encoded(collection, tiny_bert, monkeypatch):
    model = InferenceModel(DenseRetriever.from_pretrained(tiny_bert), dtype="float32")
    rows = RowSet.from_arrays(
        collection.queries, collection.corpus, [3, 9], np.array([[5, 70], [70, 11]]), np.array([1, 1])
    )
    seen = []
    encode = InferenceModel.encode
    monkeypatch.setattr(InferenceModel, "encode", lambda self, f, *a: (seen.append(len(f)), encode(self, f, *a))[1])
    few = score_rows(model, rows)
    assert sorted(seen) == [2, 3]
    encode_table(model, collection.corpus, "passage")
    seen.clear()
    again = score_rows(model, rows)
    assert seen == []  # the whole corpus is there by now
    for number in range(2):
        np.testing.assert_allclose(few.values_at("scores", number), again.values_at("scores", number), atol=1e-5)


def test_each_pair_is_read_once_and_the_column_comes_back_from_the_cache(collection, ranker, monkeypatch):
    documents = np.array([[5, 6, 7], [7, 5, 8], [5, 6, 9]])
    rows = RowSet.from_arrays(collection.queries, collection.corpus, [3, 3, 4], documents, np.ones(3, np.int64))
    seen = []
    score = InferenceModel.score
    monkeypatch.setattr(InferenceModel, "score", lambda self, f, *a: (seen.append(len(f)), score(self, f, *a))[1])
    scored = score_rows(ranker, rows)
    assert seen == [4 + 3]
    assert scored.values_at("scores", 0)[2] == scored.values_at("scores", 1)[0]
    again = score_rows(ranker, rows, column="scores_second")
    assert seen == [7] and again.values_at("scores_second", 1).tolist() == scored.values_at("scores", 1).tolist()
    score_rows(ranker, rows.select([1, 0, 2]))
    assert len(seen) == 2


def test_provenance_of_a_column(rows, ranker):
    teacher = score_rows(ranker, rows, column="scores_ce", dtype="bfloat16").metadata["teachers"]["scores_ce"]
    assert teacher["kind"] == "cross-encoder" and teacher["dtype"] == "bfloat16"
    assert teacher["weights"] == ranker.weights_fingerprint() and teacher["passage_length"] == 64


def test_columns_that_are_no_scores_are_refused(rows, ranker):
    with pytest.raises(InputError, match="'ranks' is no column of scores"):
        score_rows(ranker, rows, column="ranks")


def test_a_trec_run_can_teach(rows, collection, tmp_path):
    generator = np.random.default_rng(0)
    everything = np.tile(np.arange(len(collection.corpus)), (len(rows), 1))
    run = Run(rows.query, everything, generator.normal(size=everything.shape)).sorted(collection.corpus)
    path = run.save(tmp_path / "teacher", collection.queries, collection.corpus)
    scored = score_from_run(rows, path, column="scores_file")
    for number in range(len(rows)):
        lookup = dict(zip(run.documents[number].tolist(), run.scores[number].tolist()))
        expected = [lookup[document] for document in rows.documents_at(number).tolist()]
        assert scored.values_at("scores_file", number).tolist() == expected
    assert scored.metadata["teachers"]["scores_file"]["run"] == str(path)
    row = int(np.flatnonzero(rows.lengths > 1)[0])
    query, document = rows.query[row], rows.documents_at(row)[1]
    names = f"{rows.queries.ids_at([query])[0]!r}", f"{rows.corpus.ids_at([document])[0]!r}"
    lines = [line for line in path.read_text().splitlines() if line.split()[:3:2] != [n.strip("'") for n in names]]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=f"1 of .* candidates have no score.*document {names[1]} of query {names[0]}"):
        score_from_run(rows, path)


def test_reranking(collection, ranker, tmp_path):
    from sentence_transformers import CrossEncoder

    run = bm25_search(collection, [1, 2, 3], 20)
    best = rerank(ranker, run, collection, depth=8, dtype="float32")
    assert best.documents.shape == (3, 8)
    ranker.save_pretrained(tmp_path / "saved")
    theirs = CrossEncoder(str(tmp_path / "saved"), device="cpu")
    for row, query in enumerate(run.query):
        documents = run.documents[row, :8][run.documents[row, :8] >= 0]
        text = collection.queries.texts([query])[0]
        scores = theirs.predict([(text, passage) for passage in collection.corpus.texts(documents)])
        order = np.argsort(-scores)
        np.testing.assert_allclose(best.scores[row, : len(order)], scores[order], atol=1e-5)
        assert set(best.documents[row, : len(order)]) == set(documents)
        assert (best.scores[row, len(order) :] == -np.inf).all() and (best.documents[row, len(order) :] == -1).all()


def test_reranking_nothing(collection, ranker):
    nothing = Run([0, 1], np.full((2, 3), -1), np.full((2, 3), -np.inf))
    assert (rerank(ranker, nothing, collection).documents == -1).all()


def test_a_dense_model_reranks_and_keeps_nothing_if_told_so(collection, tiny_bert):
    from hf_distill.files import cache_folder

    model = DenseRetriever.from_pretrained(tiny_bert, normalize=True)
    run = bm25_search(collection, [1, 2], 10)
    before = sorted(cache_folder().rglob("*"))
    best = rerank(model, run, collection, dtype="float32", keep=False)
    assert sorted(cache_folder().rglob("*")) == before
    full = search(model, collection, [1, 2], len(collection.corpus), dtype="float32")
    for row in range(2):
        wanted = set(run.documents[row].tolist())
        expected = [one for one in full.documents[row].tolist() if one in wanted - {-1}]
        assert best.documents[row][best.documents[row] >= 0].tolist() == expected


def test_the_verb_samples_estimates_and_warns_of_another_length(micro, tiny_ranker, tmp_path, capsys):
    from hf_distill.cli.main import main

    rows = tmp_path / "rows"
    main(["mine", "--data", str(micro), "--model", "bm25", "--mine_depth", "10", "--output_dir", str(rows)])
    command = ["score", "--data", str(micro), "--rows", str(rows), "--model", str(tiny_ranker), "--max_queries", "5"]
    main([*command, "--output_dir", str(tmp_path / "plan"), "--plan_only", "true"])
    said = capsys.readouterr().err
    assert all(words in said for words in ("pairs of 5 queries", "about", "device hours in all"))
    assert not (tmp_path / "plan").exists()
    assert "was made for texts of" not in said
    for name, length in (("full", 64), ("short", 12)):
        main([*command, "--output_dir", str(tmp_path / name), "--length", str(length)])
    assert "was made for texts of 64 tokens and will read 12" in capsys.readouterr().err
    collection = load_collection(micro)
    full, short = (RowSet.load(tmp_path / n, collection.queries, collection.corpus) for n in ("full", "short"))
    assert len(full) == len(short) == 5 and full.query.tolist() == short.query.tolist()
    assert not np.allclose(full.values_at("scores", 0), short.values_at("scores", 0))
