"""Sparse vectors on disk and their inverted index: exact, resumable, through the same functions as dense models."""

from __future__ import annotations

import json
import shutil
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix, random_array

from hf_distill.data import load_collection
from hf_distill.errors import InputError
from hf_distill.evaluation.in_loop import RetrievalEvaluation
from hf_distill.evaluation.measures import evaluate_run
from hf_distill.evaluation.terms import text_terms
from hf_distill.models import LexicalRetriever
from hf_distill.retrieval import InferenceModel, Searcher, encode_table, encode_texts, mine, score_rows, search
from hf_distill.retrieval import inverted as module
from hf_distill.retrieval.inverted import InvertedIndex, parse_factory, quantise
from hf_distill.retrieval.pisa import PisaIndex, write_pisa
from hf_distill.retrieval.score import score_pairs
from hf_distill.retrieval.searching import check_factory
from hf_distill.retrieval.sparse_export import export_anserini, export_ciff
from tests.killing import digests
from tests.test_losses_golden import GOLDEN


@pytest.fixture(scope="module")
def collection(micro, tmp_path_factory):
    return load_collection(micro, cache_dir=tmp_path_factory.mktemp("collection"))


@pytest.fixture(scope="module")
def model(tiny_bert_source):
    """A masked language model whose head has been moved, so that about half of the terms are active."""
    model = LexicalRetriever.from_pretrained(tiny_bert_source, new_head="identity", pooled_tokens="text")
    with torch.no_grad():
        model.backbone.get_output_embeddings().bias.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def sparse(rows: int, columns: int, share: float, seed: int) -> csr_matrix:
    generator = np.random.default_rng(seed)
    return csr_matrix(random_array((rows, columns), density=share, rng=generator, dtype=np.float32))


def all_scores(queries: csr_matrix, documents: csr_matrix, scale: int | None) -> np.ndarray:
    """Every query with every document, the ordinary way."""
    if scale is None:
        return queries.toarray().astype(np.float64) @ documents.toarray().astype(np.float64).T
    whole = [np.rint(part.toarray() * scale).astype(np.int64) for part in (queries, documents)]
    return whole[0] @ whole[1].T


def test_impacts_of_the_papers():
    with np.load(GOLDEN / "led_quant.npz") as case:
        impacts = quantise(csr_matrix(case["vec"][None]), int(case["factor"]))
        assert [f"t{term}" for term in impacts.indices] == case["doc_terms"].tolist()
        assert impacts.data.tolist() == case["doc_weights"].tolist()


def test_quantising_leaves_its_input_alone():
    rows = csr_matrix(np.array([[0.001, 0.5, 0.0], [0.0, 0.004, 2.0]], np.float32))
    before = rows.toarray()
    assert quantise(rows).toarray().tolist() == [[0, 50, 0], [0, 0, 200]]
    np.testing.assert_array_equal(rows.toarray(), before)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 12), st.integers(1, 40), st.floats(0.0, 0.6), st.sampled_from([None, 100, 3]),
    st.integers(0, 10**6),
)  # fmt: skip
def test_search_is_exact(documents, queries, k, share, scale, seed):
    """Scores of a full product, ties in the order of positions, nothing that shares no term."""
    corpus, questions = sparse(documents, 30, share, seed), sparse(queries, 30, share, seed + 1)
    scores, positions = InvertedIndex.build(corpus, scale).search(questions, k)
    expected = all_scores(questions, corpus, scale)
    k = min(k, documents)
    assert scores.shape == positions.shape == (queries, k)
    for row in range(queries):
        found = positions[row] >= 0
        assert found.sum() == min(k, (expected[row] > 0).sum())
        assert np.isneginf(scores[row][~found]).all()
        unit = 1.0 if scale is None else scale**2
        np.testing.assert_allclose(scores[row][found] * unit, expected[row][positions[row][found]], rtol=2e-6)
        np.testing.assert_allclose(scores[row][found] * unit, -np.sort(-expected[row])[: found.sum()], rtol=2e-6)
        if scale is not None:  # whole numbers: the order is exact too
            order = np.lexsort((np.arange(documents), -expected[row]))[: found.sum()]
            assert positions[row][found].tolist() == order.tolist()


def test_many_segments_and_far_more_than_k(monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_ROWS", 700)
    corpus, questions = sparse(5000, 50, 0.2, 1), sparse(20, 50, 0.3, 2)
    for scale in (None, 100):
        index = InvertedIndex.build(corpus, scale)
        assert len(index._segments) == 8 and len(index) == 5000
        expected = all_scores(questions, corpus, scale)
        for k in (1, 10, 1500):
            scores, positions = index.search(questions, k)
            best = -np.sort(-expected, axis=1)[:, :k]
            np.testing.assert_allclose(np.take_along_axis(expected, positions, 1), best, rtol=1e-6)
            assert all(len(set(row)) == k for row in positions.tolist())
        frequencies = (quantise(corpus, scale) if scale else corpus).toarray() > 0
        assert index.document_frequencies().tolist() == frequencies.sum(0).tolist()


def test_descriptions_of_indexes():
    assert (parse_factory("Flat"), parse_factory("Impact"), parse_factory("Impact; scale=50")) == (None, 100, 50)
    assert parse_factory("Pisa;scale=1000") == 1000
    for wrong in ("IVF10,Flat", "Impact;scale=0", "Impact;size=3", "Flat;nprobe=1"):
        with pytest.raises(InputError, match="no index of a lexical model"):
            parse_factory(wrong)
    with pytest.raises(InputError, match="too large for an impact"):
        InvertedIndex.build(csr_matrix(np.array([[700.0]], np.float32)), 100)
    index = InvertedIndex.build(sparse(3, 4, 1.0, 0))
    with pytest.raises(InputError, match="queries over 5 terms for an index over 4"):
        index.search(sparse(1, 5, 1.0, 0), 2)


class StandIn:
    """PISA as far as the adapter sees it: the same calls, by plain products, with ties in any order."""

    def __init__(self, folder, stemmer, stops, threads=1):
        assert stemmer == stops == "none", "terms are not words of English"
        self.path = Path(folder) / "documents.json"

    def toks_indexer(self, scale):
        assert scale == 1
        return self

    def index(self, documents):
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps([[one["docno"], one["toks"]] for one in documents]))

    def quantized(self, num_results, query_algorithm, toks_scale):
        assert toks_scale == 1
        self.number = num_results
        return self

    def transform(self, questions):
        import pandas as pd

        found = []
        for question in questions.itertuples():
            scored = [
                (sum(weight * terms.get(term, 0) for term, weight in question.query_toks.items()), name)
                for name, terms in json.loads(self.path.read_text())
            ]
            best = sorted((one for one in scored if one[0] > 0), reverse=True)[: self.number]
            found += [(question.qid, name, float(score)) for score, name in best]
        return pd.DataFrame(found, columns=["qid", "docno", "score"])


@pytest.fixture(params=["stand-in", "PISA"])
def pisa(request, monkeypatch):
    """The engine, and in its place one that is always there."""
    if request.param == "PISA":
        return pytest.importorskip("pyterrier_pisa")
    engine = SimpleNamespace(PisaIndex=StandIn, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "pyterrier_pisa", engine)
    return engine


def test_pisa_finds_what_the_impact_index_does(pisa, tmp_path):
    """The same scores, exactly; a document and a query without terms; more results asked for than there are."""
    corpus, questions = (rows.tolil() for rows in (sparse(300, 40, 0.1, 1), sparse(20, 40, 0.1, 2)))
    corpus[7], questions[3] = 0, 0
    corpus, questions = csr_matrix(corpus, dtype=np.float32), csr_matrix(questions, dtype=np.float32)
    write_pisa(tmp_path / "index", corpus, 50)
    theirs, ours = PisaIndex(tmp_path / "index", *corpus.shape, 50), InvertedIndex.build(corpus, 50)
    for k in (1, 10, 1000):
        scores, positions = theirs.search(questions, k)
        expected, places = ours.search(questions, k)
        np.testing.assert_allclose(scores, expected, rtol=1e-6)
        # Of equal scores at the end, the engine keeps any.
        certain = expected > expected[:, -1:]
        assert (positions == places)[certain].all() and (positions[3] == -1).all()
        assert ((positions < 0) == (places < 0)).all()


def test_pisa_behind_the_same_functions(pisa, collection, model, tmp_path):
    options = {"k": 15, "dtype": "float32", "cache_dir": tmp_path}
    theirs, ours = (
        search(model, collection, factory=name, **options) for name in ("Pisa;scale=80", "Impact;scale=80")
    )
    np.testing.assert_allclose(theirs.scores, ours.scores, rtol=1e-6)
    assert np.mean([len(set(a) & set(b)) / 15 for a, b in zip(theirs.documents, ours.documents)]) > 0.98


def test_pisa_is_asked_for_before_any_work(model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"PISA is not installed.*hf_distill\[pisa\]"):
        check_factory(model, "Pisa")


def test_a_store_holds_what_the_model_makes(collection, model, cache):
    store = encode_table(model, collection.corpus, "passage", shard_rows=17, dtype="float32", cache_dir=cache)
    texts = collection.corpus.texts(np.arange(len(collection.corpus)), template=model.config.template)
    features = model.processor().passages(texts)
    with torch.no_grad():
        direct = torch.cat([model.encode(model.processor().pad([one]), "passage") for one in features]).numpy()
    np.testing.assert_allclose(store.rows(0, len(store)).toarray(), direct, atol=2e-5)
    assert store.shape == direct.shape and store.nnz == (store.rows(0, len(store)).toarray() > 0).sum()
    assert 0.05 < store.nnz / direct.size < 0.95
    for positions in ([3, 40, 3, 0, 18], []):
        np.testing.assert_allclose(store.take(positions), direct[positions].reshape(-1, direct.shape[1]), atol=2e-5)
    np.testing.assert_allclose(store.rows(10, 25).toarray(), direct[10:25], atol=2e-5)
    np.testing.assert_allclose(encode_texts(model, texts[:9], dtype="float32").toarray(), direct[:9], atol=2e-5)
    with pytest.raises(IndexError):
        store.take([len(store)])
    # A shard that is missing is made again, with the same bytes.
    shard = store.folder / "shard-00001"
    before = {path.name: path.read_bytes() for path in shard.iterdir()}
    shutil.rmtree(shard)
    encode_table(model, collection.corpus, "passage", shard_rows=17, dtype="float32", cache_dir=cache)
    assert {path.name: path.read_bytes() for path in shard.iterdir()} == before


def test_texts_without_terms(model, cache):
    """Only special tokens remain of an empty text: no term, found by nothing, finding nothing."""
    vectors = encode_texts(model, ["", "a cat"], dtype="float32")
    assert vectors[0].nnz == 0 and vectors[1].nnz > 0
    _, positions = InvertedIndex.build(vectors).search(vectors, 2)
    assert positions.tolist() == [[-1, -1], [1, -1]]


def test_search_mine_and_score(collection, model, cache):
    options = {"dtype": "float32", "cache_dir": cache}
    run = search(model, collection, k=20, **options)
    texts = [table.texts(np.arange(len(table))) for table in (collection.corpus, collection.queries)]
    passages, questions = (encode_texts(model, *some, dtype="float32") for some in zip(texts, ("passage", "query")))
    expected = all_scores(questions, passages, None)
    best = -np.sort(-expected, axis=1)[:, :20]
    np.testing.assert_allclose(run.scores, best, rtol=1e-5)
    impacts = search(model, collection, k=20, factory="Impact", **options)
    assert np.mean([len(set(a) & set(b)) / 20 for a, b in zip(run.documents, impacts.documents)]) > 0.9
    np.testing.assert_allclose(impacts.scores, best, rtol=0.1)
    rows = mine(model, collection, "train", depth=20, num_negatives=5, source="lexical", **options)
    assert set(rows.values_at("sources", 0)) == {"positive", "lexical"}
    scored = score_rows(model, rows, column="scores_lexical", **options)
    for row in (0, 3):
        documents = scored.documents_at(row)
        found = scored.values_at("scores_lexical", row)
        np.testing.assert_allclose(found, expected[rows.query[row], documents], rtol=1e-5)
    assert scored.metadata["teachers"]["scores_lexical"]["kind"] == "lexical"
    pairs = np.array([0, 0, 1]), np.array([5, 2, 2])
    found = score_pairs(InferenceModel(model, dtype="float32"), collection.queries, collection.corpus, *pairs)
    np.testing.assert_allclose(found, expected[pairs], rtol=1e-5)
    scores, positions = Searcher(model, collection.corpus, **options)(collection.queries.texts([0])[0], 3)
    assert positions.tolist() == run.documents[0, :3].tolist() and scores[0] == pytest.approx(run.scores[0, 0])


def test_what_is_lost_on_the_way_is_made_again(collection, model, tmp_path, monkeypatch):
    """Shards of vectors, segments of the index, results: a killed search leaves some, and the same bytes come out."""
    monkeypatch.setattr(module, "SEGMENT_ROWS", 30)
    monkeypatch.setattr("hf_distill.retrieval.searching._SHARD_QUERIES", 16)
    monkeypatch.setattr("hf_distill.retrieval.searching.default_shard_rows", lambda rows, largest: largest)

    def once() -> dict[str, str]:
        search(model, collection, k=10, factory="Impact", dtype="float32", cache_dir=tmp_path)
        return digests(tmp_path)

    whole = once()
    shards = sorted(path for path in tmp_path.glob("*/*/shard-*"))
    kinds = {path.parts[-3] for path in shards}
    assert {"inverted", "search"} < kinds and len(shards) > 6, kinds
    for first in range(3):
        for path in shards[first::3]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert once() == whole


def test_evaluation_during_training(collection, model, cache):
    """The same measures as a search of the whole corpus."""
    names = ["nDCG@100", "RR@100", "R@20"]
    measures = RetrievalEvaluation(collection, "dev", measures=names)(model)
    qrels = collection.qrels["dev"]
    run = search(model, collection, qrels.query_positions(), k=100, dtype="float32", cache_dir=cache)
    tables = collection.queries, collection.corpus
    expected = evaluate_run(qrels.as_dict(*tables), run.as_dict(*tables), names).means
    assert 0 < expected["RR@100"] < 1 and 0 < expected["nDCG@100"] < 1
    assert {name: measures[name] for name in names} == pytest.approx({name: expected[name] for name in names})


def test_other_weights_and_lost_parts(collection, model, cache, tiny_bert_source):
    store = encode_table(model, collection.corpus, "passage", dtype="float32", cache_dir=cache)
    index = InvertedIndex.build(store, 100, cache_dir=cache)
    folder = next((cache / "inverted").glob(f"*/{module.MANIFEST}")).parent
    for candidate in (cache / "inverted").iterdir():
        if json.loads((candidate / module.MANIFEST).read_text())["key"]["scale"] == 100:
            folder = candidate
    same = InvertedIndex.open(folder, InferenceModel(model, dtype="float32"))
    query = encode_texts(model, ["a cat"], "query", dtype="float32")
    for a, b in zip(index.search(query, 5), same.search(query, 5)):
        np.testing.assert_array_equal(a, b)
    other = LexicalRetriever.from_pretrained(tiny_bert_source, new_head="random")
    with pytest.raises(InputError, match="built by other weights"):
        InvertedIndex.open(folder, InferenceModel(other, dtype="float32"))
    copy = shutil.copytree(folder, folder.parent / "copy")
    (copy / "shard-00000" / "documents.npy").unlink()
    with pytest.raises(InputError, match="not all of it"):
        InvertedIndex.open(copy)
    shutil.rmtree(copy)


def test_weights_that_are_no_numbers(tiny_bert_source, collection, cache):
    broken = LexicalRetriever.from_pretrained(tiny_bert_source, new_head="identity")
    with torch.no_grad():
        broken.backbone.get_output_embeddings().bias[7] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        encode_table(broken, collection.corpus, "passage", dtype="float32", cache_dir=cache)


def test_files_for_anserini(collection, model, cache, tmp_path):
    store = encode_table(model, collection.corpus, "passage", dtype="float32", cache_dir=cache)
    queries = encode_table(model, collection.queries, "query", dtype="float32", cache_dir=cache)
    export_anserini(tmp_path, store, collection.corpus, queries, collection.queries, model.tokenizer, shards=3)
    impacts = quantise(store.rows(0, len(store))).toarray()
    names = model.tokenizer.convert_ids_to_tokens(range(store.dim))
    seen = {}
    for path in sorted((tmp_path / "corpus").iterdir()):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            seen[entry["id"]] = entry["vector"]
    assert len(list((tmp_path / "corpus").iterdir())) == 3 and len(seen) == len(collection.corpus)
    for position in (0, 5, len(store) - 1):
        expected = {names[term]: int(impacts[position, term]) for term in np.flatnonzero(impacts[position])}
        assert seen[collection.corpus.ids_at([position])[0]] == (expected or {"[UNK]": 1})
    line = (tmp_path / "queries.tsv").read_text().splitlines()[2]
    name, _, text = line.partition("\t")
    weights = quantise(queries.rows(2, 3)).toarray()[0]
    assert name == collection.queries.ids_at([2])[0]
    assert Counter(text.split()) == {names[term]: weights[term] for term in np.flatnonzero(weights)}
    tracemalloc.start()
    export_anserini(
        tmp_path, store, collection.corpus, queries, collection.queries, model.tokenizer, scale=200, shards=1
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (tmp_path / "queries.tsv").stat().st_size / 2  # line by line
    with np.load(GOLDEN / "led_quant.npz") as case:
        from hf_distill.retrieval.sparse_export import query_string

        assert query_string({"t3": 1, "t4": 2, "t5": 3}) == case["query_string"].item()
        assert query_string({}) == " ".join(case["empty_terms"].tolist())


def test_terms_beyond_the_tokenizer_have_names(collection, tiny_bert_source, tmp_path):
    """A vocabulary matrix is often padded, and nothing keeps the weights of these rows at 0."""
    model = LexicalRetriever.from_pretrained(tiny_bert_source, new_head="random")
    words = len(model.tokenizer)
    model.backbone.resize_token_embeddings(words + 3, mean_resizing=False)
    with torch.no_grad():
        model.backbone.get_output_embeddings().bias[words:] = torch.tensor([2.0, 3.0, 4.0])
    named = {f"[{words + number}]" for number in range(3)}
    assert named < set(text_terms(model, "a cat", "a dog").passage)
    store = encode_table(model, collection.corpus, "passage", dtype="float32", cache_dir=tmp_path)
    export_anserini(tmp_path, store, collection.corpus, None, None, model.tokenizer, shards=1)
    for line in (tmp_path / "corpus" / "vectors-00.jsonl").read_text().splitlines():
        assert named < set(json.loads(line)["vector"])
    path = export_ciff(tmp_path / "index.ciff", InvertedIndex.build(store, 100), collection.corpus, model.tokenizer)
    messages = split_messages(path.read_bytes())
    lists = fields(messages[0])[2][0]
    assert named < {fields(message)[1][0].decode() for message in messages[1 : 1 + lists]}


def test_a_ciff_file(collection, model, cache, tmp_path):
    """Read back with a decoder of protocol buffers of its own: postings equal the impacts."""
    store = encode_table(model, collection.corpus, "passage", dtype="float32", cache_dir=cache)
    index = InvertedIndex.build(store, 100, cache_dir=cache)
    path = export_ciff(tmp_path / "index.ciff", index, collection.corpus, model.tokenizer)
    messages = split_messages(path.read_bytes())
    header = fields(messages[0])
    lists, documents = header[2][0], header[3][0]
    assert documents == len(collection.corpus) and len(messages) == 1 + lists + documents
    names = {name: term for term, name in enumerate(model.tokenizer.convert_ids_to_tokens(range(store.dim)))}
    found = np.zeros(store.shape, np.int64)
    for message in messages[1 : 1 + lists]:
        entry = fields(message)
        document, total = 0, 0
        for posting in entry[4]:
            gap = fields(posting)
            document += gap.get(1, [0])[0]
            found[document, names[entry[1][0].decode()]] = gap[2][0]
            total += gap[2][0]
        assert entry[2][0] == len(entry[4]) and entry[3][0] == total
    impacts = quantise(store.rows(0, len(store))).toarray()
    np.testing.assert_array_equal(found, impacts)
    for position, message in enumerate(messages[1 + lists :]):
        entry = fields(message)
        assert entry.get(1, [0])[0] == position and entry.get(3, [0])[0] == impacts[position].sum()
        assert entry[2][0].decode() == collection.corpus.ids_at([position])[0]
    with pytest.raises(InputError, match="whole numbers"):
        export_ciff(tmp_path / "no.ciff", InvertedIndex.build(store), collection.corpus, model.tokenizer)


def varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[place] & 127) << shift
        shift, place = shift + 7, place + 1
        if data[place - 1] < 128:
            return value, place


def split_messages(data: bytes) -> list[bytes]:
    messages, place = [], 0
    while place < len(data):
        length, place = varint(data, place)
        messages.append(data[place : place + length])
        place += length
    return messages


def fields(message: bytes) -> dict[int, list]:
    found: dict[int, list] = {}
    place = 0
    while place < len(message):
        tag, place = varint(message, place)
        if tag & 7 == 0:
            value, place = varint(message, place)
        elif tag & 7 == 1:
            value, place = message[place : place + 8], place + 8
        else:
            length, place = varint(message, place)
            value, place = message[place : place + length], place + length
        found.setdefault(tag >> 3, []).append(value)
    return found
