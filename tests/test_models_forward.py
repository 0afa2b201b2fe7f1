"""What models compute: chunks, padding, recomputation, precision, scores, fingerprints, and resuming."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

from hf_distill.errors import InputError
from hf_distill.models import CrossEncoderRanker, DenseRetriever, RetrievalModel, set_dropout, use_attention
from hf_distill.models.bi_encoder import BiEncoder
from hf_distill.models.dense import pool
from hf_distill.models.loading import load_backbone

from .model_zoo import PAIRS, TEXTS, batch_of, pair_scores, save_tiny, tokenizer_for, vectors


WORDS = ["cat", "dog", "the heart pumps blood", "a river", "seven seas and a long way home", "b", "x y z", "night"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory, tiny_tokenizer):
    return save_tiny(tmp_path_factory.mktemp("zoo") / "bert", "bert", tiny_tokenizer)


def contrastive(model, chunks: int) -> torch.Tensor:
    """The loss of a batch of 8 queries and 8 passages, in `chunks` chunks each."""
    processor = model.processor()
    output = model(
        query=batch_of(processor, processor.queries(WORDS), chunks),
        passage=batch_of(processor, processor.passages(WORDS[::-1]), chunks),
    )
    scores = model.similarity_scores(output.query, output.passage)
    return torch.nn.functional.cross_entropy(scores, torch.arange(8))


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


# --------------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("chunks", [1, 2, 8])
def test_chunks_change_nothing(bert, chunks):
    model = DenseRetriever.from_pretrained(bert, query_prompt="query: ").eval()
    processor = model.processor()
    batch = batch_of(processor, processor.queries(TEXTS), min(chunks, len(TEXTS)))
    with torch.no_grad():
        found = model(query=batch).query
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, vectors(model, TEXTS, "query", 1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "albert", "llama", "qwen2"])
def test_the_joint_lookup_gives_the_gradients_of_separate_ones(tmp_path, tiny_tokenizer, family, tied, monkeypatch):
    source = save_tiny(tmp_path / family, family, tokenizer_for(tiny_tokenizer))
    model = DenseRetriever.from_pretrained(source, tied=tied).train()
    set_dropout(model, 0.0)
    calls = []
    for tower in model.towers.values():
        tower.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    contrastive(model, 4).backward()
    assert len(calls) == (1 if tied else 2)
    joint = gradients(model)
    model.zero_grad()
    monkeypatch.setattr(DenseRetriever, "_embedded", lambda self, tower, chunks: [None] * len(chunks))
    contrastive(model, 4).backward()
    separate = gradients(model)
    assert set(joint) == set(separate)
    for name, one in separate.items():
        torch.testing.assert_close(joint[name], one, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", ["bert", "roberta", "qwen2"])
def test_recomputation_keeps_loss_and_gradients_with_dropout_on(tmp_path, tiny_tokenizer, family):
    tokenizer = tiny_tokenizer if family == "bert" else tokenizer_for(tiny_tokenizer)
    model = DenseRetriever.from_pretrained(save_tiny(tmp_path / family, family, tokenizer), normalize=True)
    set_dropout(model, 0.2)
    model.train()
    found = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        torch.manual_seed(3)
        loss = contrastive(model, 4)
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, one in found[0][1].items():
        torch.testing.assert_close(one, found[1][1][name], atol=1e-7, rtol=1e-5, msg=name)
    torch.manual_seed(4)
    assert contrastive(model, 4) != found[0][0]  # dropout was on


def test_recomputation_frees_the_activations(bert):
    model = DenseRetriever.from_pretrained(bert).train()
    kept = []
    for recompute in (False, True):
        model.recompute = recompute
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            contrastive(model, 4)
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 4


def test_recomputation_holds_embeddings_of_a_bounded_number_of_tokens(bert):
    model = DenseRetriever.from_pretrained(bert).train()
    vocabulary = model.get_input_embeddings().weight.shape[0]

    def held(tokens):
        ids = torch.full((tokens, 1), 5)
        chunks = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(tokens // 2 + 1)]
        return [one is not None for one in model._embedded(model.backbone, chunks)]

    model.recompute = True
    assert held(vocabulary) == [True, True]
    assert held(vocabulary + 1) == [False, False]
    model.recompute = False
    assert held(vocabulary + 1) == [True, True]


def test_every_trainable_parameter_gets_a_gradient(bert):
    model = DenseRetriever.from_pretrained(bert, projection_dim=8, tied=False).train()
    model.add_projection("teacher-v1.5", 12)
    processor = model.processor()
    output = model(
        query=batch_of(processor, processor.queries(WORDS), 2),
        passage=batch_of(processor, processor.passages(WORDS), 2),
    )
    query, passage = output.projected["teacher-v1.5"]
    assert query.shape == passage.shape == (8, 12)
    torch.testing.assert_close(query, model.training_modules["teacher-v1_5"](output.query))
    (query.sum() + passage.square().sum()).backward()
    lacking = [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None]
    assert not lacking
    frozen = {name.split(".")[1] for name, one in model.named_parameters() if not one.requires_grad}
    assert frozen == {"pooler"}


# -------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert", "llama", "qwen2", "gpt2", "t5"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_padding_changes_nothing(tmp_path, tiny_tokenizer, family, side, pooling):
    tokenizer = tokenizer_for(tiny_tokenizer, side)
    model = DenseRetriever.from_pretrained(save_tiny(tmp_path / family, family, tokenizer), pooling=pooling)
    together, alone = vectors(model, TEXTS, "passage"), vectors(model, TEXTS, "passage", 1)
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)


def test_left_and_right_padding_agree(tmp_path, tiny_tokenizer):
    found = []
    for side in ("left", "right"):
        source = save_tiny(tmp_path / side, "gpt2", tokenizer_for(tiny_tokenizer, side))
        found.append(vectors(DenseRetriever.from_pretrained(source), TEXTS, "query"))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_pooling_against_a_loop():
    torch.manual_seed(0)
    hidden = torch.randn(4, 6, 3)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
    for row in range(4):
        real = hidden[row][mask[row].bool()]
        for pooling, expected in (("cls", real[0]), ("last", real[-1]), ("mean", real.mean(0))):
            torch.testing.assert_close(pool(hidden, mask, pooling)[row], expected)


def test_pooling_is_done_in_float32():
    hidden = torch.full((1, 4096, 1), 1.0).bfloat16()
    hidden[0, :, 0] += torch.tensor([0.0, 0.0078125] * 2048)
    pooled = pool(hidden, torch.ones(1, 4096, dtype=torch.long), "mean")
    assert pooled.dtype == torch.float32
    assert pooled.item() == pytest.approx(hidden.double().mean().item(), abs=1e-6)


# -------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_scores(bert, similarity):
    model = DenseRetriever.from_pretrained(bert, similarity=similarity)
    torch.manual_seed(0)
    query, passage = torch.randn(3, 32), torch.randn(3, 5, 32)
    scores = model.similarity_scores(query, passage.flatten(0, 1))
    for row in range(3):
        for column in range(15):
            one, other = query[row].double(), passage.flatten(0, 1)[column].double()
            expected = one @ other
            if similarity == "cosine":
                expected = expected / (one.norm() * other.norm()) / 0.05
            assert scores[row, column].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    own = model.own_scores(query, passage)
    torch.testing.assert_close(own, torch.stack([scores[row, 5 * row : 5 * row + 5] for row in range(3)]))


def test_scores_are_float32_under_autocast(bert):
    model = DenseRetriever.from_pretrained(bert, normalize=True, projection_dim=8).train()
    processor = model.processor()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(query=batch_of(processor, processor.queries(WORDS), 2))
        scores = model.similarity_scores(output.query, output.query)
    assert output.query.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(output.query.norm(dim=-1), torch.ones(8), atol=1e-6, rtol=0)
    assert scores.diagonal().sub(20).abs().max() < 1e-4


def test_temperature_defaults(bert):
    assert DenseRetriever.from_pretrained(bert).config.temperature == 0.05
    assert DenseRetriever.from_pretrained(bert, similarity="dot").config.temperature == 1.0
    assert DenseRetriever.from_pretrained(bert, similarity="dot", normalize=True).config.temperature == 0.05
    assert DenseRetriever.from_pretrained(bert, similarity="dot", temperature=0.5).config.temperature == 0.5


# --------------------------------------------------------------------------------------------- cross-encoders


def test_ranker_chunks_and_token_types(tmp_path, tiny_tokenizer):
    source = save_tiny(tmp_path / "ranker", "bert", tiny_tokenizer, head="SequenceClassification", num_labels=1)
    model = CrossEncoderRanker.from_pretrained(source)
    plain = [(query, passage) for query, passage in PAIRS if "[SEP]" not in query]
    with_types, without = pair_scores(model, plain), pair_scores(model, plain, with_types=False)
    torch.testing.assert_close(with_types, without)
    processor = model.processor()
    ids, types = processor.pairs([one for one, _ in PAIRS], [other for _, other in PAIRS])
    with torch.no_grad():
        chunked = model(pair=batch_of(processor, ids, 3, types))
    torch.testing.assert_close(chunked, pair_scores(model, PAIRS), atol=1e-6, rtol=1e-5)
    # Token types count: the model would give something else without them.
    zeros = [[0] * len(row) for row in types]
    with torch.no_grad():
        assert (model.score_chunk(processor.pad(ids, zeros)) - pair_scores(model, PAIRS)).abs().max() > 1e-3


def test_ranker_recomputation(tmp_path, tiny_tokenizer):
    source = save_tiny(tmp_path / "ranker", "bert", tiny_tokenizer, head="SequenceClassification", num_labels=1)
    model = CrossEncoderRanker.from_pretrained(source).train()
    processor = model.processor()
    ids, types = processor.pairs([one for one, _ in PAIRS], [other for _, other in PAIRS])
    found = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        torch.manual_seed(1)
        model(pair=batch_of(processor, ids, 3, types)).square().sum().backward()
        found.append(gradients(model))
    assert set(found[0]) == set(found[1]) == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, one in found[0].items():
        torch.testing.assert_close(one, found[1][name], atol=1e-6, rtol=1e-4, msg=name)


# ------------------------------------------------------------------------------------- precision and switches


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_weights_are_float32_whatever_the_checkpoint_has(tmp_path, bert, stored):
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(bert, dtype=stored).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "half")
    model = DenseRetriever.from_pretrained(tmp_path / "half", projection_dim=8)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert DenseRetriever.from_pretrained(tmp_path / "half", dtype="auto").dtype == getattr(torch, stored)


def test_attention_follows_the_mode_on_a_cpu(bert):
    model = DenseRetriever.from_pretrained(bert, tied=False)
    attention = [tower.config for tower in model.towers.values()]
    assert len(attention) == 2
    assert {one._attn_implementation for one in attention} == {"sdpa"}
    eager = vectors(model, WORDS, "query")
    for dropout, bfloat16, expected in ((0.1, False, "eager"), (0.0, True, "eager"), (0.0, False, "sdpa")):
        set_dropout(model, dropout)
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            contrastive(model, 2)
        assert {one._attn_implementation for one in attention} == {expected}
    torch.testing.assert_close(vectors(model, WORDS, "query"), eager, atol=1e-5, rtol=1e-4)
    assert {one._attn_implementation for one in attention} == {"sdpa"}
    fixed = DenseRetriever.from_pretrained(bert, attn_implementation="eager").eval()
    use_attention(fixed, "sdpa")
    assert fixed.backbone.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["bert", "distilbert", "qwen2", "modernbert"])
def test_dropout_can_be_set(tmp_path, tiny_tokenizer, family):
    model = DenseRetriever.from_pretrained(save_tiny(tmp_path / family, family, tokenizer_for(tiny_tokenizer)))
    set_dropout(model, 0.0)
    model.train()
    torch.testing.assert_close(contrastive(model, 2), contrastive(model, 2), atol=0, rtol=0)
    set_dropout(model, 0.3)
    assert contrastive(model, 2) != contrastive(model, 2)
    with pytest.raises(InputError, match="dropout"):
        set_dropout(model, 1.0)


# ----------------------------------------------------------------------------------------------- fingerprints


def test_fingerprints_are_of_weights_and_settings(tmp_path, bert):
    import shutil

    model = DenseRetriever.from_pretrained(bert)
    first = model.weights_fingerprint()
    moved = shutil.copytree(bert, tmp_path / "elsewhere")
    assert DenseRetriever.from_pretrained(moved).weights_fingerprint() == first
    assert DenseRetriever.from_pretrained(bert, pooling="cls").weights_fingerprint() != first
    assert DenseRetriever.from_pretrained(bert, dtype="bfloat16").weights_fingerprint() != first
    # Reading is not part of it: that is the processor's.
    prompted = DenseRetriever.from_pretrained(bert, query_prompt="query: ")
    assert prompted.weights_fingerprint() == first
    assert prompted.processor().settings() != model.processor().settings()
    with torch.no_grad():
        model.backbone.pooler.dense.weight.zero_()
    model.add_projection("teacher", 4)
    assert model.weights_fingerprint() == first
    with torch.no_grad():
        model.backbone.encoder.layer[3].output.dense.bias[7] += 1e-6
    assert model.weights_fingerprint() != first


def test_processors_can_be_sent_to_workers(bert):
    processor = DenseRetriever.from_pretrained(bert, query_prompt="query: ", query_length=9).processor()
    again = pickle.loads(pickle.dumps(processor))
    assert again.queries(TEXTS) == processor.queries(TEXTS)
    assert again.settings() == processor.settings()


def test_a_processor_is_what_the_tokenizer_gives(bert, tiny_tokenizer):
    processor = DenseRetriever.from_pretrained(bert, passage_prompt="p: ", passage_length=12).processor()
    expected = tiny_tokenizer(["p: " + text for text in TEXTS], truncation=True, max_length=12)["input_ids"]
    assert processor.passages(TEXTS) == expected
    assert processor.queries([]) == [] and processor.pairs([], []) == ([], None)
    with pytest.raises(InputError, match="2 queries for 1 passages"):
        processor.pairs(["a", "b"], ["c"])


# --------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
def test_a_checkpoint_restores_every_weight(tmp_path, bert, tied, adapted):
    def build():
        torch.manual_seed(9)
        model = DenseRetriever.from_pretrained(bert, projection_dim=8, tied=tied)
        model.add_projection("teacher", 12)
        if adapted:
            from peft import LoraConfig

            model.add_adapter(LoraConfig(r=2, target_modules=["query"]))
        return model.train()

    trained, fresh = build(), build()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    before = copy.deepcopy(trained.state_dict())
    trained.save_pretrained(tmp_path / "checkpoint")
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, before[name]), f"saving changed {name}"
    differs = [name for name, tensor in fresh.state_dict().items() if not torch.equal(tensor, before[name])]
    assert differs
    fresh.load_checkpoint(tmp_path / "checkpoint")
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_foreign_checkpoint_is_refused(tmp_path, bert):
    from hf_distill.models import student_from

    model = DenseRetriever.from_pretrained(bert)
    student_from("layers:2", bert).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="do not fit"):
        model.load_checkpoint(tmp_path / "other")
    model.save_pretrained(tmp_path / "plain")
    model.add_projection("teacher", 4)
    with pytest.raises(InputError, match="training_modules.safetensors"):
        model.load_checkpoint(tmp_path / "plain")


def test_gathered_weights_are_saved_in_place_of_the_live_ones(tmp_path, bert):
    model = DenseRetriever.from_pretrained(bert, projection_dim=8)
    gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "out", state_dict=gathered)
    again = DenseRetriever.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in gathered.items():
        torch.testing.assert_close(again[name], tensor, msg=name)
    sharded = {name: tensor.new_empty(0) for name, tensor in gathered.items()}
    with pytest.raises(InputError, match="sharded"):
        model.save_pretrained(tmp_path / "out", state_dict=sharded)
    model.save_pretrained(tmp_path / "nobody", is_main_process=False)
    assert not (tmp_path / "nobody").exists()


@pytest.mark.parametrize(
    ("base", "part"),
    [(RetrievalModel, name) for name in ("_open", "_export", "settings", "processor", "forward")]
    + [(BiEncoder, name) for name in ("encode", "_output")],
)
def test_an_archetype_that_lacks_a_part_cannot_be_made(bert, base, part):
    lacking = type("Lacking", (DenseRetriever,), {part: inspect.getattr_static(base, part)})
    with pytest.raises(TypeError, match=f"abstract method '?{part}"):
        lacking(DenseRetriever.config_class(), load_backbone(bert, "bert", "float32"))
