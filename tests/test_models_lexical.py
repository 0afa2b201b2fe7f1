"""Lexical retrievers: their pooling, the memory it takes, and the folders they read and write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_distill.errors import InputError
from hf_distill.hub.cards import on_hub
from hf_distill.models import DenseRetriever, LexicalRetriever, load_model, student_from
from hf_distill.models.lexical import pooled_mask, splade_max
from hf_distill.models.loading import start_masked_lm_head
from hf_distill.models.token_maximum import token_maximum
from tests.model_zoo import TEXTS, batch_of, save_tiny, tokenizer_for, vectors


GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ["bert", "distilbert", "roberta", "modernbert", "albert"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer):
    """A tiny masked language model of every family."""
    root = tmp_path_factory.mktemp("masked-lm")
    made = {}
    for family in FAMILIES:
        tokenizer = tiny_tokenizer if family in ("bert", "distilbert") else tokenizer_for(tiny_tokenizer)
        made[family] = save_tiny(root / family, family, tokenizer, head="MaskedLM", layers=2)
    return made


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files if arrays[key].dtype.kind in "if"}


def direct_weights(model: LexicalRetriever, texts: list[str], kind: str) -> torch.Tensor:
    """The definition, from all logits of one text at a time."""
    processor, rows = model.processor(), []
    for ids in processor.encode(texts, kind):
        keep = [True] * len(ids)
        if model.config.pooled_tokens == "text":
            keep = [one not in (processor.tokenizer.cls_token_id, processor.tokenizer.sep_token_id) for one in ids]
        elif model.config.pooled_tokens == "inner":
            keep = [0 < place < len(ids) - 1 for place in range(len(ids))]
        with torch.no_grad():
            logits = model.backbone(input_ids=torch.tensor([ids])).logits[0]
        kept = torch.log1p(torch.relu(logits[torch.tensor(keep)]))
        rows.append(kept.amax(0) if len(kept) else torch.zeros(logits.shape[1]))
    return torch.stack(rows)


def test_pooling_of_led():
    case = golden("led_splade_pool")
    ids = torch.zeros_like(case["attention_mask"])
    inner = pooled_mask(ids, case["attention_mask"], "inner", ())
    assert torch.equal(inner, case["pool_mask"].bool())
    torch.testing.assert_close(splade_max(case["logits"], inner), case["rep"], atol=1e-6, rtol=0)
    everything = pooled_mask(ids, case["attention_mask"], "all", ())
    torch.testing.assert_close(splade_max(case["logits"], everything), case["rep_keep_special"], atol=1e-6, rtol=0)


def test_pooling_of_lexmae():
    case = golden("lexmae_splade_pool")
    for stored in ("rep", "rep_largemem"):
        found = splade_max(case["logits"], case["pool_mask"].bool())
        torch.testing.assert_close(found, case[stored], atol=1e-6, rtol=0)
    case = golden("lexmae_bottleneck")
    mask = pooled_mask(case["input_ids"], case["attention_mask"], "text", (101, 102))
    assert torch.equal(mask, case["text_mask"].bool())


def test_inner_tokens_of_left_padded_texts():
    attention = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
    inner = pooled_mask(torch.zeros_like(attention), attention, "inner", ())
    assert inner.int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 0], [0] * 6]


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_token_maximum_is_the_maximum_and_so_is_its_gradient(share, monkeypatch):
    from hf_distill.models import token_maximum as module

    torch.manual_seed(3)
    monkeypatch.setattr(module, "_BLOCK_NUMBERS", 2 * 7 * 50)  # several blocks
    head = torch.nn.Linear(8, 50).double()
    hidden = torch.randn(5, 7, 8, dtype=torch.double, requires_grad=True)
    keep = torch.rand(5, 7) > 0.3
    keep[1] = False
    factor = torch.randn(5, 50) * (torch.rand(5, 50) > share)
    ours = token_maximum(head, hidden, keep)
    direct = head(hidden).masked_fill(~keep[..., None], -1e9).amax(1) * keep.any(1)[:, None]
    torch.testing.assert_close(ours, direct)
    assert ours[1].abs().sum() == 0
    inputs = [hidden, head.weight, head.bias]
    found = torch.autograd.grad((ours * factor).sum(), inputs)
    expected = torch.autograd.grad((direct * factor).sum(), inputs)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("pooled_tokens", ["all", "text", "inner"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_follow_the_definition(family, pooled_tokens, folders):
    model = LexicalRetriever.from_pretrained(folders[family], pooled_tokens=pooled_tokens)
    assert model._pools_in_head
    found = vectors(model, TEXTS, "passage", chunk_size=4)
    torch.testing.assert_close(found, direct_weights(model, TEXTS, "passage"), atol=2e-5, rtol=1e-5)
    assert found.shape == (len(TEXTS), model.embedding_size) and (found >= 0).all()
    if pooled_tokens != "all":
        assert found[TEXTS.index("")].abs().sum() == 0  # an empty text has only special tokens


def test_gradients_of_a_training_forward(folders):
    """Through the whole model, the tied matrix included, as if all logits had been kept."""
    model = LexicalRetriever.from_pretrained(folders["bert"], pooled_tokens="text")
    processor = model.processor()
    features = processor.passages(TEXTS)
    factor = torch.rand(len(TEXTS), model.embedding_size, generator=torch.Generator().manual_seed(0))
    gradients = []
    for pooled_in_head in (True, False):
        model._pools_in_head = pooled_in_head
        model.zero_grad()
        model.train()
        from hf_distill.models import set_dropout

        set_dropout(model, 0.0)
        output = model(passage=batch_of(processor, features, 2)).passage
        (output * factor).sum().backward()
        gradients.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, atol=1e-5, rtol=1e-4)


def test_recomputed_chunks_have_the_same_gradient(folders):
    model = LexicalRetriever.from_pretrained(folders["bert"])
    processor = model.processor()
    from hf_distill.models import set_dropout

    set_dropout(model, 0.0)
    model.train()
    found = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        model(query=batch_of(processor, processor.queries(TEXTS), 3)).query.square().sum().backward()
        found.append(model.backbone.get_output_embeddings().weight.grad.clone())
    torch.testing.assert_close(found[0], found[1])


def test_heaviest_terms_only(folders):
    model = LexicalRetriever.from_pretrained(folders["bert"], query_terms=3, passage_terms=7)
    free = LexicalRetriever.from_pretrained(folders["bert"])
    for kind, terms in (("query", 3), ("passage", 7)):
        pruned, whole = vectors(model, TEXTS, kind), vectors(free, TEXTS, kind)
        assert ((pruned > 0).sum(1) == (whole > 0).sum(1).clamp(max=terms)).all()
        torch.testing.assert_close(pruned.sort(1).values[:, -terms:], whole.sort(1).values[:, -terms:])
    assert model.weights_fingerprint() != free.weights_fingerprint()


def open_elsewhere(folder: Path, texts: list[str]) -> dict[str, torch.Tensor]:
    """What sentence-transformers and transformers make of a folder in a process that cannot import this library."""
    script = """
import sys, json
sys.modules["hf_distill"] = None
from sentence_transformers import SparseEncoder
from transformers import AutoModelForMaskedLM
folder, texts = json.loads(sys.stdin.read())
model = SparseEncoder(folder, device="cpu")
kind = type(AutoModelForMaskedLM.from_pretrained(folder)).__name__
encode = {"query": model.encode_query, "passage": model.encode_document}
out = {k: f(texts, convert_to_sparse_tensor=False).tolist() for k, f in encode.items()}
print("RESULT" + json.dumps({"kind": kind, **out}))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], input=json.dumps([str(folder), texts]), text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert "RESULT" in done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout.partition("RESULT")[2])


@pytest.mark.slow
def test_saved_models_open_in_sentence_transformers(folders, tmp_path):
    """Both masks, prompts and two lengths; in a process without this library."""
    texts = TEXTS[:4] + TEXTS[5:]
    for pooled_tokens in ("all", "text"):
        model = LexicalRetriever.from_pretrained(
            folders["bert"], pooled_tokens=pooled_tokens, query_length=8, passage_length=30, query_prompt="cat: "
        )
        model.save_pretrained(tmp_path / pooled_tokens)
        again = load_model(tmp_path / pooled_tokens)
        assert isinstance(again, LexicalRetriever) and again.config.pooled_tokens == pooled_tokens
        assert again.weights_fingerprint() == model.weights_fingerprint()
    found = open_elsewhere(tmp_path / "text", texts)
    assert found["kind"] == "BertForMaskedLM"
    for kind in ("query", "passage"):
        torch.testing.assert_close(torch.tensor(found[kind]), vectors(model, texts, kind), atol=1e-5, rtol=0)


def test_masks_in_sentence_transformers_here(folders, tmp_path):
    """All other combinations, in this process: inner tokens without a separator inside, other families."""
    from sentence_transformers import SparseEncoder

    texts = [TEXTS[0], TEXTS[2], TEXTS[3], TEXTS[5]]
    for family, pooled_tokens in (("bert", "inner"), ("bert", "all"), ("roberta", "text"), ("modernbert", "all")):
        model = LexicalRetriever.from_pretrained(folders[family], pooled_tokens=pooled_tokens)
        folder = tmp_path / f"{family}-{pooled_tokens}"
        model.save_pretrained(folder)
        theirs = SparseEncoder(str(folder), device="cpu").encode_document(texts, convert_to_sparse_tensor=False)
        torch.testing.assert_close(theirs, vectors(model, texts, "passage"), atol=1e-5, rtol=0)


def test_a_public_splade_checkpoint_is_read(folders, tmp_path):
    """Written by sentence-transformers, and bare as the first SPLADE models are."""
    from sentence_transformers import SparseEncoder

    theirs = SparseEncoder(str(folders["distilbert"]), device="cpu")
    theirs.save(str(tmp_path / "public"))
    texts = TEXTS[:4]
    expected = theirs.encode_document(texts, convert_to_sparse_tensor=False)
    saved = load_model(tmp_path / "public")
    assert isinstance(saved, LexicalRetriever) and saved.config.pooled_tokens == "all"
    bare = LexicalRetriever.from_pretrained(folders["distilbert"])
    for model in (saved, bare):
        torch.testing.assert_close(vectors(model, texts, "passage"), expected, atol=1e-5, rtol=0)


def test_a_bare_checkpoint_is_read_as_asked(folders, caplog):
    bare = folders["bert"]
    assert isinstance(load_model(bare), DenseRetriever)
    assert f"write lexical:{bare}, else dense:{bare}." in caplog.text
    caplog.clear()
    model, direct = load_model(f"lexical:{bare}"), LexicalRetriever.from_pretrained(bare)
    assert isinstance(model, LexicalRetriever) and model.name_or_path == str(bare)
    assert model.weights_fingerprint() == direct.weights_fingerprint()
    for name in (bare, f"dense:{bare}"):  # what is to be trained is no retriever yet
        assert isinstance(student_from(name), DenseRetriever)
    assert not caplog.text
    with pytest.raises(InputError, match="asked for as a lexical model and opened as a dense one"):
        DenseRetriever.from_pretrained(f"lexical:{bare}")
    assert on_hub(["lexical:user/name@main", "dense:user/other", str(bare)]) == ["user/name", "user/other"]


def test_a_separator_inside_passages_and_inner_tokens_cannot_be_saved(folders, tmp_path):
    model = LexicalRetriever.from_pretrained(folders["bert"], pooled_tokens="inner", template="{title}[SEP]{text}")
    with pytest.raises(InputError, match="inner.*pooled_tokens='text'"):
        model.save_pretrained(tmp_path / "never")


def test_a_backbone_without_masked_lm_head(tiny_bert, tiny_tokenizer, tmp_path):
    with pytest.raises(InputError, match="no trained masked-LM head.*identity"):
        LexicalRetriever.from_pretrained(tiny_bert)
    decoder = save_tiny(tmp_path / "llama", "llama", tokenizer_for(tiny_tokenizer, "left", specials=False))
    with pytest.raises(InputError, match="'llama' has no masked-LM head"):
        LexicalRetriever.from_pretrained(decoder)


def test_a_new_head_passes_hidden_states_on(tiny_bert):
    """Its logits are those of the normalised hidden states with the word embeddings."""
    model = LexicalRetriever.from_pretrained(tiny_bert, new_head="identity")
    ids = torch.tensor([model.processor().passages(["a cat sat on the mat"])[0]])
    with torch.no_grad():
        output = model.backbone(input_ids=ids, output_hidden_states=True)
    hidden = torch.nn.functional.layer_norm(output.hidden_states[-1], (32,))
    expected = hidden @ model.backbone.get_input_embeddings().weight.T
    difference = output.logits - expected
    torch.testing.assert_close(difference, difference[0, 0, :1].expand_as(difference), atol=2e-2, rtol=2e-2)
    active = (vectors(model, [text for text in TEXTS if text], "passage") > 0).float().mean(1)
    assert (active > 0).all() and active.mean() < 0.1  # sparse from the start, and not dead
    embeddings, matrix = model.backbone.get_input_embeddings(), model.backbone.get_output_embeddings()
    assert matrix.weight is embeddings.weight
    other = LexicalRetriever.from_pretrained(tiny_bert, new_head="random")
    assert other.weights_fingerprint() != model.weights_fingerprint()
    with pytest.raises(InputError, match="no start"):
        LexicalRetriever.from_pretrained(tiny_bert, new_head="magic")


@pytest.mark.parametrize("family", ["modernbert", "albert"])
def test_heads_that_cannot_pass_hidden_states_on(folders, family):
    model = LexicalRetriever.from_pretrained(folders[family])
    before = model.weights_fingerprint()
    with pytest.raises(InputError, match="the masked-LM head .*Use random"):
        start_masked_lm_head(model.backbone, "identity")
    assert model.weights_fingerprint() == before


def test_a_saved_model_is_no_dense_one(folders, tmp_path):
    LexicalRetriever.from_pretrained(folders["bert"]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="this is a lexical model. Open it with LexicalRetriever"):
        DenseRetriever.from_pretrained(tmp_path)


def test_settings_are_checked(folders):
    for wrong in ({"pooled_tokens": "some"}, {"query_terms": 0}, {"temperature": 0.0}, {"passage_length": 65}):
        with pytest.raises(InputError):
            LexicalRetriever.from_pretrained(folders["bert"], **wrong)
    with pytest.raises(InputError, match="unknown settings"):
        LexicalRetriever.from_pretrained(folders["bert"], pooling="cls")


def test_memory_of_a_training_forward_is_far_below_all_logits(folders):
    """What stays for the backward pass: hidden states and one place a term, not [texts, tokens, terms] floats."""
    model = LexicalRetriever.from_pretrained(folders["bert"])
    head = model.backbone.get_output_embeddings()
    hidden = torch.randn(64, 60, 32, requires_grad=True)
    keep = torch.ones(64, 60, dtype=torch.bool)
    held = []

    def measure(tensor):
        held.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(measure, lambda tensor: tensor):
        token_maximum(head, hidden, keep)
    all_logits = 64 * 60 * head.out_features * 4
    assert sum(held) - head.weight.numel() * 4 < 0.2 * all_logits + hidden.numel() * 4 * 4
