"""Search, re-ranking, mining and scoring with multi-vector models, against plain MaxSim over everything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_distill.data import RowSet, load_collection
from hf_distill.errors import InputError
from hf_distill.evaluation import RetrievalEvaluation
from hf_distill.losses import maxsim
from hf_distill.models import MultiVectorRetriever
from hf_distill.retrieval import (
    bm25_search,
    encode_table,
    encode_texts,
    mine,
    multi_vector,
    plaid,
    rerank,
    score_rows,
    search,
)
from hf_distill.retrieval.inference import InferenceModel
from hf_distill.retrieval.multi_vector import TokenIndex, Tokens, TokenStore, block_maxsim, pair_scores
from hf_distill.retrieval.searching import Searcher, check_factory

from .model_zoo import save_tiny


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    from tests.conftest import MICRO

    return load_collection(MICRO, cache_dir=tmp_path_factory.mktemp("collection"))


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer):
    torch.manual_seed(2)
    source = save_tiny(tmp_path_factory.mktemp("models") / "bert", "bert", tiny_tokenizer)
    return MultiVectorRetriever.from_pretrained(
        source, projection_dim=16, query_length=12, passage_length=40, skip_punctuation=True
    )


@pytest.fixture(scope="module")
def truth(model, collection):
    """MaxSim of all queries with all passages, by the loss's own function on one padded batch: `[queries, corpus]`."""
    processor = model.processor()
    with torch.no_grad():
        query, _ = model.encode(processor.pad(processor.queries(collection.queries.texts())), "query")
        texts = collection.corpus.texts(np.arange(len(collection.corpus)), processor.template)
        passage, mask = model.encode(processor.pad(processor.passages(texts)), "passage")
        return maxsim(query, passage, mask).numpy()


def best(truth: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    return -np.sort(-truth[queries], axis=1)[:, :k]


def test_exact_search_is_maxsim_over_everything(model, collection, truth):
    queries = np.array([3, 0, 17])
    run = search(model, collection, queries, 10, dtype="float32")
    np.testing.assert_array_equal(run.query, queries)
    np.testing.assert_allclose(run.scores, best(truth, queries, 10), atol=0.02)
    for row, query in enumerate(queries):
        np.testing.assert_allclose(truth[query, run.documents[row]], run.scores[row], atol=0.02)


def test_tokens_are_kept_in_half_precision_and_found_again(model, collection, tmp_path):
    store = encode_table(model, collection.corpus, "passage", dtype="float32", storage="float16", cache_dir=tmp_path)
    assert isinstance(store, TokenStore) and len(store) == len(collection.corpus)
    assert store.flat.dtype == np.float16 and store.shape == (len(collection.corpus), 16)
    texts = collection.corpus.texts(np.arange(len(collection.corpus)), model.config.template)
    tokens = encode_texts(model, texts, dtype="float32")
    np.testing.assert_array_equal(tokens.lengths, store.lengths)
    np.testing.assert_allclose(store.take([5, 2]).vectors, tokens.take([5, 2]).vectors, atol=1e-3)
    before = {path: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    again = encode_table(model, collection.corpus, "passage", dtype="float32", storage="float16", cache_dir=tmp_path)
    assert again.folder == store.folder and before == {
        path: path.stat().st_mtime_ns for path in again.folder.iterdir()
    }


def test_a_lost_shard_is_made_again_with_the_same_bytes(model, collection, tmp_path):
    options = {"dtype": "float32", "storage": "float16", "shard_rows": 20, "cache_dir": tmp_path}
    store = encode_table(model, collection.corpus, "passage", **options)
    whole = {path.name: path.read_bytes() for path in store.folder.glob("shard-*")}
    assert len(whole) == 2 * 4
    # Killed between the two files of a shard: lengths without vectors.
    (store.folder / "shard-00002.npy").unlink()
    (store.folder / "shard-00001.npy").unlink(), (store.folder / "shard-00001.lengths.npy").unlink()
    again = encode_table(model, collection.corpus, "passage", **options)
    assert {path.name: path.read_bytes() for path in again.folder.glob("shard-*")} == whole


@pytest.mark.parametrize("factory", ["IVF4,Flat;nprobe=4", "HNSW8;efSearch=200"])
def test_candidates_from_an_index_over_tokens(factory, model, collection, truth):
    queries = np.arange(20)
    factory, _, options = factory.partition(";")
    run = search(model, collection, queries, 5, factory=factory, search_options=options or None, dtype="float32")
    exact = best(truth, queries, 5)
    # What is found has its exact score, and nearly everything of the best is found.
    for row, query in enumerate(queries):
        np.testing.assert_allclose(truth[query, run.documents[row]], run.scores[row], atol=0.02)
    assert np.mean(np.abs(run.scores - exact) < 0.02) > 0.95


class StandIn:
    """fast-plaid as far as the adapter sees it: the same calls, by plain MaxSim over vectors in half precision."""

    def __init__(self, index, device):
        self.path = Path(index) / "documents.npz"

    def create(self, vectors, nbits, start_from_scratch):
        assert nbits == 4 and start_from_scratch == 0
        np.save(self.path.with_name("centroids.npy"), np.zeros((16, vectors[0].shape[1]), np.float16))
        self._save([np.zeros((0, vectors[0].shape[1]), np.float16), *(one.numpy() for one in vectors)])

    def update(self, vectors, start_from_scratch):
        assert start_from_scratch == 0
        self._save([*self._load(), *(one.numpy() for one in vectors)])

    def search(self, queries, top_k, show_progress, n_full_scores, n_ivf_probe=8):
        assert not show_progress and n_full_scores >= top_k and n_ivf_probe <= 16
        documents = [torch.from_numpy(one).float() for one in self._load()[1:]]
        results = []
        for query in queries:
            scores = torch.stack([(query @ one.T).amax(1).sum() for one in documents])
            results.append([(int(place), float(scores[place])) for place in scores.argsort(descending=True)[:top_k]])
        return results

    def close(self):
        pass

    def _save(self, documents):
        assert all(len(one) for one in documents[1:]), "a passage without tokens"
        np.savez(self.path, *documents)

    def _load(self):
        with np.load(self.path) as saved:
            return [saved[f"arr_{number}"] for number in range(len(saved.files))]


@pytest.fixture(params=["stand-in", "PLAID"])
def plaid_engine(request, monkeypatch):
    """The engine, and in its place one that is always there."""
    if request.param == "PLAID":
        return pytest.importorskip("fast_plaid.search")
    engine = SimpleNamespace(FastPlaid=StandIn, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "fast_plaid", SimpleNamespace(search=engine, __spec__=SimpleNamespace()))
    monkeypatch.setitem(sys.modules, "fast_plaid.search", engine)
    return engine


def test_candidates_from_plaid(plaid_engine, model, collection, truth, tmp_path, monkeypatch):
    queries = np.arange(20)
    options = {"factory": "Plaid;nbits=4,n_ivf_probe=64", "dtype": "float32", "cache_dir": tmp_path}
    run = search(model, collection, queries, 5, **options)
    for row, query in enumerate(queries):
        np.testing.assert_allclose(truth[query, run.documents[row]], run.scores[row], atol=0.02)
    assert np.mean(np.abs(run.scores - best(truth, queries, 5)) < 0.02) > 0.95
    # The index is kept: other queries build none.
    monkeypatch.setattr(plaid_engine.FastPlaid, "create", lambda *args, **kwargs: pytest.fail("built again"))
    more = search(model, collection, np.arange(20, 24), 5, **options)
    assert np.mean(np.abs(more.scores - best(truth, more.query, 5)) < 0.02) > 0.95


def test_plaid_is_built_in_blocks_and_leaves_out_empty_passages(plaid_engine, tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 9, 300)
    lengths[[0, 17, 299]] = 0
    vectors = generator.standard_normal((lengths.sum(), 32)).astype(np.float32)
    passages = Tokens(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), lengths)
    monkeypatch.setattr(plaid, "_BLOCK_BYTES", 500 * 32 * 12)
    named = np.flatnonzero(lengths)
    plaid.write_plaid(tmp_path / "index", passages, named)
    index = plaid.PlaidIndex(tmp_path / "index", named, torch.device("cpu"), {"n_ivf_probe": 64})
    wanted = [1, 150, 298]
    own = passages.take(wanted)
    found = index.find(Tokens(own.vectors, np.array([*own.lengths[:2], 0, own.lengths[2]])), 10)
    assert [len(one) for one in found] == [10, 10, 0, 10]
    assert all((np.diff(one) > 0).all() and np.isin(one, named).all() for one in found)
    assert [place in one for place, one in zip(wanted, [found[0], found[1], found[3]])] == [True] * 3


def test_plaid_leaves_a_handful_of_tokens_to_plain_maxsim(model, collection, truth, tmp_path):
    few = collection.corpus.select(np.arange(3))
    store = encode_table(model, few, "passage", dtype="float32", storage="float16", cache_dir=tmp_path)
    index = TokenIndex(store, "Plaid")
    scores, positions = index.search(encode_texts(model, collection.queries.texts([0]), "query", dtype="float32"), 2)
    np.testing.assert_allclose(scores[0], -np.sort(-truth[0, :3])[:2], atol=0.02)
    assert set(positions[0]) <= {0, 1, 2}


@pytest.mark.parametrize("wrong", ["nprobe=3", "nbits=0", "n_ivf_probe=many"])
def test_options_that_plaid_does_not_have(wrong, model, plaid_engine):
    with pytest.raises(InputError, match=f"'{wrong}' is no option of PLAID"):
        check_factory(model, f"Plaid;{wrong}")


def test_plaid_is_asked_for_before_any_work(model, plaid_engine, monkeypatch):
    check_factory(model, "Plaid;nbits=2,n_ivf_probe=100000")
    with pytest.raises(InputError, match=r"width 16 to 3 bits.*nbits of 1, 2, 4, 8"):
        check_factory(model, "Plaid;nbits=3")
    monkeypatch.setattr(model.config, "normalize", False)
    with pytest.raises(InputError, match=r"tokens differ in length.*Use Flat"):
        check_factory(model, "Plaid")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "fast_plaid", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"PLAID is not installed.*hf_distill\[plaid\]"):
        check_factory(model, "Plaid")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace())
    with pytest.raises(InputError, match=r"fast-plaid cannot be loaded.*bound to a version of torch"):
        check_factory(model, "Plaid")


@pytest.mark.parametrize("factory", ["Flat", "IVF1,Flat"])
def test_copies_of_a_passage_stand_in_their_order(factory):
    one = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    index = TokenIndex(Tokens(np.tile(one, (200, 1)), np.full(200, 4)), factory)
    scores, positions = index.search(Tokens(one, np.array([4])), 5)
    assert positions.tolist() == [[0, 1, 2, 3, 4]] and len(set(scores[0])) == 1
    scores, positions = index.search(Tokens(np.empty((0, 8), np.float32), np.empty(0, np.int64)), 5)
    assert scores.shape == positions.shape == (0, 5)


def test_reranking_the_candidates_of_another_retriever(model, collection, truth):
    queries = np.arange(10)
    candidates = bm25_search(collection, queries, 12)
    run = rerank(model, candidates, collection, dtype="float32")
    for row, query in enumerate(run.query):
        found = run.documents[row][run.documents[row] >= 0]
        assert set(found) == set(candidates.documents[row][candidates.documents[row] >= 0])
        np.testing.assert_allclose(run.scores[row][: len(found)], truth[query, found], atol=1e-4)
        assert (np.diff(run.scores[row][: len(found)]) <= 0).all()


def test_mining_scoring_and_measuring(model, collection, truth):
    rows = mine(model, collection, "train", depth=10, num_negatives=4, dtype="float32")
    assert (rows.lengths - rows.num_positives == 4).all() and rows.metadata["mining"]["retriever"]["weights"]
    scored = score_rows(model, rows, dtype="float32")
    assert scored.metadata["teachers"]["scores"]["kind"] == "multi-vector"
    for row in range(len(rows)):
        np.testing.assert_allclose(
            scored.values_at("scores", row), truth[rows.query[row], rows.documents_at(row)], atol=1e-4
        )
    measures = RetrievalEvaluation(collection, "test", measures=["nDCG@10"], depth=20)(model)
    run = search(model, collection, collection.qrels["test"].query_positions(), 20, dtype="float32")
    from hf_distill.evaluation import evaluate_run

    found = evaluate_run(
        collection.qrels["test"].as_dict(collection.queries, collection.corpus),
        run.as_dict(collection.queries, collection.corpus),
        ["nDCG@10"],
    )
    assert measures["nDCG@10"] == pytest.approx(found.means["nDCG@10"], abs=0.02)


def test_one_question_at_a_time(model, collection, truth):
    searcher = Searcher(model, collection.corpus, dtype="float32")
    scores, documents = searcher(collection.queries.texts([4])[0], 3)
    np.testing.assert_allclose(scores, best(truth, np.array([4]), 3)[0], atol=0.02)
    assert len(documents) == 3


def test_blocks_of_any_size_give_the_same(monkeypatch):
    generator = np.random.default_rng(0)
    lengths = np.array([3, 0, 7, 1, 5, 2, 4])
    passages = Tokens(generator.normal(size=(lengths.sum(), 8)).astype(np.float32), lengths)
    queries = Tokens(generator.normal(size=(9, 8)).astype(np.float32), np.array([4, 5]))
    device = torch.device("cpu")
    whole = block_maxsim(queries, passages, device).numpy()
    by_hand = [
        [
            (q.vectors @ p.vectors.T).max(1).sum() if len(p.vectors) else 0.0
            for p in (passages.rows(number, number + 1) for number in range(len(passages)))
        ]
        for q in (queries.rows(0, 1), queries.rows(1, 2))
    ]
    np.testing.assert_allclose(whole, by_hand, atol=1e-5)
    for tokens in (1, 6, 1000):
        monkeypatch.setattr(multi_vector, "_BLOCK_TOKENS", tokens)
        scores, places = TokenIndex(passages).search(queries, 7)
        np.testing.assert_allclose(scores, -np.sort(-whole, axis=1), atol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(whole, places, 1), scores, atol=1e-5)
        one = pair_scores(queries.rows(1, 2), passages, np.array([6, 1, 2]), device)
        np.testing.assert_allclose(one, whole[1, [6, 1, 2]], atol=1e-5)


def test_rows_in_order_and_nothing_for_nothing(model):
    tokens = encode_texts(model, ["a cat", "the heart pumps blood through the body", "dogs"], dtype="float32")
    assert tokens.lengths[1] > tokens.lengths[0] == tokens.lengths[2] + 1
    assert len(encode_texts(model, [], dtype="float32")) == 0
    swapped = tokens[np.array([2, 0])]
    np.testing.assert_array_equal(
        swapped.vectors, np.concatenate([tokens.rows(2, 3).vectors, tokens.rows(0, 1).vectors])
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_leave_the_same_bytes(model, tmp_path, micro):
    script = tmp_path / "encode.py"
    script.write_text(
        "import sys\n"
        "from hf_distill.data import load_collection\n"
        "from hf_distill.distributed import join, leave, world_size\n"
        "from hf_distill.models import load_model\n"
        "from hf_distill.retrieval import search\n"
        "join()\n"
        "assert world_size() == int(sys.argv[4])\n"
        "data = load_collection(sys.argv[1])\n"
        "run = search(load_model(sys.argv[2]), data, None, 5, dtype='float32', cache_dir=sys.argv[3], device='cpu')\n"
        "leave()\n"
    )
    model.save_pretrained(tmp_path / "model")
    for processes in (1, 2):
        command = [sys.executable, str(script)]
        if processes > 1:
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                "2",
                str(script),
            ]
        words = [str(micro), str(tmp_path / "model"), str(tmp_path / f"cache-{processes}"), str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    files = [
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("shard-*")}
        for root in (tmp_path / "cache-1", tmp_path / "cache-2")
    ]
    assert files[0] == files[1] and len(files[0]) >= 3


def test_inference_copy_computes_the_same(model):
    """Packed layers and another batching change nothing."""
    texts = ["the heart pumps blood", "a volcano", "cats and dogs, and cats."]
    tokens = encode_texts(InferenceModel(model, dtype="float32", token_budget=16), texts)
    processor = model.processor()
    with torch.no_grad():
        vectors, mask = model.encode(processor.pad(processor.passages(texts)), "passage")
    np.testing.assert_allclose(tokens.vectors, vectors[mask].numpy(), atol=1e-5)


def test_unlabelled_rows_are_scored_too(model, collection, truth):
    rows = RowSet.from_arrays(collection.queries, collection.corpus, [1, 2], [[3, 4], [5]], [0, 0])
    scored = score_rows(model, rows, column="scores_tokens", dtype="float32")
    np.testing.assert_allclose(scored.values_at("scores_tokens", 0), truth[1, [3, 4]], atol=1e-4)
