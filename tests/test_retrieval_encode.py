"""Encoding: equal to sentence-transformers, cached by content, bounded batches, untouched models."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.data import Corpus, load_collection
from hf_distill.errors import InputError
from hf_distill.models import CrossEncoderRanker, DenseRetriever, use_attention
from hf_distill.retrieval import EmbeddingStore, InferenceModel, choose_dtype, encode_table, encode_texts
from hf_distill.retrieval.encode import encode_job
from hf_distill.retrieval.inference import pad_batch, plan_batches
from hf_distill.retrieval.packing import PackedLinear, matmul_attention, pack_linears, packing_works
from hf_distill.retrieval.store import VectorStore


@pytest.fixture()
def model(tiny_bert):
    return DenseRetriever.from_pretrained(tiny_bert, normalize=True, query_prompt="query: ", query_length=12)


@pytest.fixture()
def corpus(micro):
    return load_collection(micro).corpus


@pytest.fixture()
def wide_bert(tmp_path, tiny_tokenizer):
    """Wide enough for packed layers, with the activation of `activation`."""
    from transformers import BertConfig, BertModel

    def make(activation="gelu"):
        config = BertConfig(
            vocab_size=len(tiny_tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=256, max_position_embeddings=64, hidden_act=activation,
        )  # fmt: skip
        torch.manual_seed(3)
        folder = tmp_path / f"wide-{activation}"
        BertModel(config).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return DenseRetriever.from_pretrained(folder)

    return make


# ---------------------------------------------------------------------------------------------------------- batches


@given(st.lists(st.integers(1, 300), max_size=80), st.integers(1, 600))
def test_batches_are_bounded_and_hold_every_text_once(lengths, budget):
    lengths = np.array(lengths, dtype=np.int64)
    batches = list(plan_batches(lengths, budget))
    assert sorted(np.concatenate(batches).tolist() if batches else []) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= budget
        assert lengths[batch[0]] == lengths[batch].max()
    longest = [lengths[batch].max() for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_padding_on_either_side():
    assert pad_batch([[1, 2], [3]], 9).tolist() == [[1, 2], [3, 9]]
    assert pad_batch([[1, 2], [3]], 9, left=True).tolist() == [[1, 2], [9, 3]]


@pytest.mark.parametrize("kind", ["query", "passage"])
@pytest.mark.parametrize("budget", [7, 64, 4096])
def test_vectors_equal_those_of_sentence_transformers(model, corpus, tmp_path, kind, budget):
    from sentence_transformers import SentenceTransformer

    texts = corpus.texts()
    vectors = encode_texts(model, texts, kind, dtype="float32", token_budget=budget)
    model.save_pretrained(tmp_path / "saved")
    theirs = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    expected = theirs.encode_query(texts) if kind == "query" else theirs.encode_document(texts)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_a_model_with_padding_on_the_left(tmp_path, tiny_tokenizer):
    from transformers import LlamaConfig, LlamaModel

    from tests.model_zoo import tokenizer_for

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=128, max_position_embeddings=64,
    )  # fmt: skip
    LlamaModel(config).save_pretrained(tmp_path)
    tokenizer_for(tiny_tokenizer, "left", specials=False).save_pretrained(tmp_path)
    model = DenseRetriever.from_pretrained(tmp_path, pooling="last")
    texts = ["a cat", "the heart pumps blood through the body", "dogs", "x " * 30]
    alone = np.concatenate([encode_texts(model, [text], dtype="float32") for text in texts])
    np.testing.assert_allclose(encode_texts(model, texts, dtype="float32"), alone, atol=1e-5)
    half = encode_texts(model, texts, dtype="bfloat16")
    assert np.sum(half * alone, 1) / np.linalg.norm(half, axis=1) / np.linalg.norm(alone, axis=1) == pytest.approx(
        1, abs=1e-3
    )


def test_no_texts_are_no_vectors(model):
    assert encode_texts(model, []).shape == (0, 32)


# ------------------------------------------------------------------------------------------------------------- copy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_training_model_stays_as_it_is(wide_bert, dtype):
    model = wide_bert().train()
    use_attention(model, "eager")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fingerprint, attention = model.weights_fingerprint(), model.backbone.config._attn_implementation
    encode_texts(model, ["one text", "another longer text"], dtype=dtype)
    assert model.training and model.backbone.config._attn_implementation == attention == "eager"
    assert model.weights_fingerprint() == fingerprint
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name])
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "pooler" not in name)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_packed_layers_compute_the_same(wide_bert, corpus, monkeypatch, activation):
    model = wide_bert(activation)
    texts = corpus.texts()[:40]
    fast = InferenceModel(model, dtype="float32")
    vectors = encode_texts(fast, texts)
    if packing_works(torch.float32):
        packed = [module for module in fast.model.modules() if isinstance(module, PackedLinear)]
        assert len(packed) == 13  # two layers of six, and the pooler
        fused = [module for module in packed if module._operation[0] == "gelu"]
        assert len(fused) == (2 if activation == "gelu" else 0)
    monkeypatch.setattr("hf_distill.retrieval.inference.pack_linears", lambda *_: 0)
    np.testing.assert_allclose(vectors, encode_texts(model, texts, dtype="float32"), atol=2e-6)


def test_subclasses_of_linear_layers_are_not_packed():
    class Quantised(torch.nn.Linear):
        pass

    layers = torch.nn.Sequential(Quantised(64, 64), torch.nn.Linear(32, 64), torch.nn.Linear(64, 64))
    assert pack_linears(layers, 16) == (1 if packing_works(torch.float32) else 0)
    assert type(layers[0]) is Quantised and type(layers[1]) is torch.nn.Linear


@pytest.mark.parametrize("mask", [None, "bool", "float", "one for all"])
@pytest.mark.parametrize("texts_at_once", [1, 2, 5])
def test_attention_by_products_equals_torchs(mask, texts_at_once, monkeypatch):
    monkeypatch.setattr("hf_distill.retrieval.packing._SCORES_IN_CACHE", texts_at_once * 3 * 7 * 7 * 4)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(5, 3, 7, 8, generator=generator) for _ in range(3))
    allowed = (torch.rand(5, 1, 7, 7, generator=generator) > 0.4) | torch.eye(7, dtype=torch.bool)
    masks = {"bool": allowed, "float": torch.where(allowed, 0.0, -1e30), "one for all": allowed[:1]}
    given_mask = masks.get(mask)
    module = torch.nn.Module()
    module.is_causal = False
    found, _ = matmul_attention(module, query, key, value, given_mask)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=given_mask)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    module.is_causal = True
    if mask is None:
        found, _ = matmul_attention(module, query, key, value, None)
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.testing.assert_close(found, expected.transpose(1, 2))


@pytest.mark.parametrize("shape", [(1, 1, 7, 7), (5, 3, 7, 7), (5, 1, 1, 7), (7, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_of_every_shape(shape, dtype, monkeypatch):
    """Per head, for all texts, for all places of a query; also where nothing may be attended to."""
    monkeypatch.setattr("hf_distill.retrieval.packing._SCORES_IN_CACHE", 2 * 3 * 7 * 7 * dtype.itemsize)
    generator = torch.Generator().manual_seed(1)
    batch = 7 if len(shape) == 2 else 5
    query, key, value = (torch.randn(batch, 3, 7, 8, generator=generator).to(dtype) for _ in range(3))
    allowed = torch.rand(shape, generator=generator) > 0.3
    allowed[..., 0] = True
    module = torch.nn.Module()
    module.is_causal = False
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed).transpose(1, 2)
    added = torch.zeros(shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for mask in (allowed, added):
        torch.testing.assert_close(matmul_attention(module, query, key, value, mask)[0], expected, **close)
    nothing = torch.full(shape, torch.finfo(torch.float32).min)
    assert matmul_attention(module, query, key, value, nothing)[0].isfinite().all()


def test_bfloat16_is_close(wide_bert, corpus):
    model = wide_bert()
    texts = corpus.texts()
    one, other = (encode_texts(model, texts, dtype=dtype) for dtype in ("float32", "bfloat16"))
    cosine = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    assert 0 < np.abs(one - other).max() and cosine.min() > 0.999


def test_precisions_and_budgets_are_checked(model):
    assert choose_dtype("auto", "cpu") in ("float32", "bfloat16")
    assert choose_dtype(torch.bfloat16, "cpu") == "bfloat16"
    with pytest.raises(InputError, match="float16"):
        choose_dtype("float16", "cpu")
    with pytest.raises(InputError, match="token_budget"):
        InferenceModel(model, token_budget=0)
    with pytest.raises(InputError, match="kind"):
        encode_texts(model, ["a"], "document")


def test_broken_weights_are_noticed(model):
    with torch.no_grad():
        model.backbone.encoder.layer[0].output.dense.bias.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite in float32"):
        encode_texts(model, ["a text"], dtype="float32")


# ------------------------------------------------------------------------------------------------------------ cache


def test_a_table_is_encoded_once(model, corpus, monkeypatch):
    calls = []
    encode = InferenceModel.encode
    monkeypatch.setattr(InferenceModel, "encode", lambda self, *a: (calls.append(1), encode(self, *a))[1])
    first = encode_table(model, corpus, "passage", shard_rows=30)
    assert len(calls) == 3 and first.shape == (len(corpus), 32)
    np.testing.assert_allclose(
        first.rows(0, len(corpus)), encode_texts(model, corpus.texts(), token_budget=4096), atol=2e-2
    )
    calls.clear()
    again = encode_table(model, corpus, "passage", shard_rows=30)
    assert not calls and again.folder == first.folder and again.fingerprint == first.fingerprint
    assert again.key["table"] == corpus.fingerprint


def test_the_cache_knows_weights_not_names(tiny_bert, corpus, tmp_path, monkeypatch):
    model = DenseRetriever.from_pretrained(tiny_bert)
    store = encode_table(model, corpus, "passage")
    moved = DenseRetriever.from_pretrained(shutil.copytree(tiny_bert, tmp_path / "elsewhere"))
    monkeypatch.setattr(InferenceModel, "encode", lambda *_: pytest.fail("encoded again"))
    assert encode_table(moved, corpus, "passage").folder == store.folder
    assert encode_table(model, corpus.select(np.arange(len(corpus))), "passage").folder == store.folder
    monkeypatch.undo()
    with torch.no_grad():
        moved.backbone.encoder.layer[1].output.dense.weight[0, 0] += 0.5
    changed = encode_table(moved, corpus, "passage")
    assert changed.folder != store.folder
    assert not np.array_equal(changed.rows(0, 9), store.rows(0, 9))


def test_every_setting_has_a_key_of_its_own(tiny_bert, corpus):
    def folder(kind="passage", dtype="float32", budget=512, rows=20, storage="float32", table=corpus, **overrides):
        inference = InferenceModel(
            DenseRetriever.from_pretrained(tiny_bert, **overrides), dtype=dtype, token_budget=budget
        )
        return encode_job(inference, table, kind, rows, storage)[0].folder

    folders = [
        folder(), folder(kind="query"), folder(dtype="bfloat16"), folder(budget=513), folder(rows=21),
        folder(storage="float16"), folder(table=corpus.select(np.arange(1, len(corpus)))), folder(pooling="cls"),
        folder(normalize=True), folder(passage_prompt="p: "), folder(passage_length=9), folder(template="{text}"),
    ]  # fmt: skip
    assert len(set(folders)) == len(folders)
    assert folder() == folders[0]


def test_bad_requests(model, corpus, tiny_ranker):
    with pytest.raises(InputError, match="float32 or float16"):
        encode_table(model, corpus, "passage", storage="int8")
    with pytest.raises(InputError, match="score_rows or rerank"):
        encode_table(CrossEncoderRanker.from_pretrained(tiny_ranker), corpus, "passage")


# ------------------------------------------------------------------------------------------------------------ store


@settings(max_examples=25)
@given(st.lists(st.integers(0, 79), max_size=40), st.integers(0, 85), st.integers(0, 85))
def test_stores_give_back_what_was_written(tmp_path_factory, positions, start, length):
    vectors = np.random.default_rng(0).normal(size=(80, 5)).astype(np.float32)
    table = Corpus.from_records([{"document_id": str(n), "text": f"text {n}"} for n in range(80)])
    folder = tmp_path_factory.mktemp("store")
    store = EmbeddingStore.write(folder / "a", vectors, table)
    np.testing.assert_array_equal(store.take(np.array(positions, dtype=np.int64)), vectors[positions])
    np.testing.assert_array_equal(store.rows(start, start + length), vectors[start : start + length])
    np.save(folder / "plain.npy", vectors)
    np.testing.assert_array_equal(EmbeddingStore(folder / "plain.npy", table).take(positions), vectors[positions])


def test_a_store_of_many_shards(model, corpus):
    store = encode_table(model, corpus, "passage", shard_rows=7, storage="float16")
    assert store.dtype == np.float16
    everything = store.rows(0, len(store))
    assert everything.dtype == np.float32 and len(store) == len(corpus)
    order = np.random.default_rng(1).permutation(len(corpus))
    np.testing.assert_array_equal(store.take(order), everything[order])
    np.testing.assert_array_equal(np.concatenate([block for _, block in store.blocks(11)]), everything)
    np.testing.assert_array_equal(store.rows(5, 16), everything[5:16])
    with pytest.raises(IndexError):
        store.take([len(corpus)])
    with pytest.raises(IndexError):
        store.take([-1])


def test_stores_that_do_not_fit_are_refused(model, corpus, tmp_path):
    store = encode_table(model, corpus, "passage", shard_rows=20)
    EmbeddingStore(store.folder, corpus)
    with pytest.raises(InputError, match="vectors for 3 documents"):
        EmbeddingStore(store.folder, corpus.select([0, 1, 2]))
    with pytest.raises(InputError, match="fingerprints differ"):
        EmbeddingStore(store.folder, corpus.select(np.arange(len(corpus))[::-1]))
    (store.folder / "shard-00001.npy").unlink()
    with pytest.raises(InputError, match="1 of 4 shards are missing"):
        EmbeddingStore(store.folder)
    with pytest.raises(InputError, match="no store"):
        EmbeddingStore(tmp_path)
    bad = np.zeros((len(corpus), 3), np.float32)
    bad[4, 1] = np.nan
    with pytest.raises(InputError, match="row 4"):
        EmbeddingStore.write(tmp_path / "bad", bad, corpus)
    with pytest.raises(InputError, match="one vector for each"):
        EmbeddingStore.write(tmp_path / "bad", bad[1:], corpus)
    (tmp_path / "objects.npy").write_bytes(b"\x93NUMPY no array")
    with pytest.raises(InputError, match="cannot be read"):
        EmbeddingStore(tmp_path / "objects.npy")


def test_a_store_without_a_length_cannot_be_made():
    with pytest.raises(TypeError, match="abstract method '?__len__"):
        type("Lacking", (VectorStore,), {})()
