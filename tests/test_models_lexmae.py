"""LexMAE: masks, bottleneck, one pre-training step against the original code, and what is saved."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from hf_distill.data.masking import (
    MaskingCollator,
    TextExample,
    check_masking,
    choose_exactly,
    choose_for_decoder,
    corrupt,
)
from hf_distill.errors import InputError
from hf_distill.models import DenseRetriever, LexicalRetriever, LexMAEForPreTraining, load_model, set_dropout
from hf_distill.models.lexical import pooled_mask
from hf_distill.models.lexmae import LexMAEConfig
from hf_distill.models.token_maximum import token_maximum
from tests.model_zoo import TEXTS, save_tiny, tokenizer_for
from tests.test_losses_golden import GOLDEN


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as stored:
        return {key: np.array(stored[key]) for key in stored.files}


def like_tokenizer() -> SimpleNamespace:
    """What the model asks of a tokenizer, with BERT's special ids."""
    ids = {"[CLS]": 101, "[SEP]": 102}
    return SimpleNamespace(
        cls_token="[CLS]",
        sep_token="[SEP]",
        padding_side="right",
        convert_tokens_to_ids=lambda tokens: [ids[token] for token in tokens],
    )


@pytest.fixture(scope="module")
def step():
    """The original's tiny model and its batch."""
    case = arrays("lexmae_pretrain_step")
    weights = {key[3:]: torch.from_numpy(value) for key, value in case.items() if key.startswith("sd/")}
    config = BertConfig(
        vocab_size=120,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=20,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    backbone = BertForMaskedLM(config)
    own = {key: value for key, value in weights.items() if not key.startswith("decoder_")}
    own["cls.predictions.decoder.weight"] = own["bert.embeddings.word_embeddings.weight"]
    own["cls.predictions.decoder.bias"] = own["cls.predictions.bias"]
    backbone.load_state_dict(own)
    model = LexMAEForPreTraining(LexMAEConfig(), backbone, like_tokenizer())
    rest = {}
    for key, value in weights.items():
        if key.startswith("decoder_heads."):
            rest["decoder.encoder.layer." + key.removeprefix("decoder_heads.")] = value
        elif key.startswith("decoder_cls.predictions."):
            name = key.removeprefix("decoder_cls.predictions.").replace("transform.", "").replace("LayerNorm", "norm")
            rest[f"decoder_head.{name}"] = value
    model.training_modules.load_state_dict(rest)
    batch = {
        "input_ids": "enc_ids", "attention_mask": "attention_mask", "labels": "enc_labels", "decoder_ids": "dec_ids",
        "decoder_labels": "dec_labels",
    }  # fmt: skip
    return case, model.eval(), {key: torch.from_numpy(case[value]) for key, value in batch.items()}


def gradients(model: LexMAEForPreTraining) -> dict[str, torch.Tensor]:
    """By the original's names."""
    found = {name.removeprefix("backbone."): one.grad for name, one in model.named_parameters()}
    renamed = {}
    for name, grad in found.items():
        name = name.replace("training_modules.decoder.encoder.layer.", "decoder_heads.")
        if name.startswith("training_modules.decoder_head."):
            part = name.removeprefix("training_modules.decoder_head.").replace("norm", "LayerNorm")
            name = f"decoder_cls.predictions.{part if part == 'bias' else 'transform.' + part}"
        renamed[name] = grad
    return renamed


def test_a_pretraining_step_is_the_original_one(step):
    case, model, batch = step
    output = model(**batch)
    assert output.encoder_loss.item() == pytest.approx(5.157233, abs=1e-5)
    assert output.decoder_loss.item() == pytest.approx(5.086441, abs=1e-5)
    np.testing.assert_allclose(output.bottleneck.detach(), case["bottleneck"], atol=1e-6)
    attended = batch["attention_mask"].bool()
    decoded = model.decode(output.bottleneck, batch["decoder_ids"], batch["attention_mask"])
    matrix = model.backbone.get_input_embeddings().weight
    states = {
        "enc_logits": model.backbone(batch["input_ids"], batch["attention_mask"]).logits,
        "dec_h2": decoded,
        "dec_logits": model.training_modules["decoder_head"](decoded, matrix),
    }
    for name, found in states.items():
        np.testing.assert_allclose(found[attended].detach(), case[name][attended], atol=1e-5, err_msg=name)
    for losses, stored in ((("encoder_loss", "decoder_loss"), "grad_total"), (("decoder_loss",), "grad_dec_only")):
        model.zero_grad()
        output = model(**batch)
        sum(output[name] for name in losses).backward()
        found, checked = gradients(model), 0
        for key, expected in case.items():
            if not key.startswith(f"{stored}/"):
                continue
            name = key.removeprefix(f"{stored}/")
            if name.endswith("predictions.decoder.weight") or name.endswith("predictions.decoder.bias"):
                continue  # tied
            np.testing.assert_allclose(found[name], expected, atol=1e-5, rtol=1e-4, err_msg=name)
            checked += 1
        assert checked >= 7


def test_bottlenecks_of_the_original():
    case = {key: torch.from_numpy(value) for key, value in arrays("lexmae_bottleneck").items()}
    for kind, stored in (("softmax", "b_logits"), ("saturated", "b_logits_sat")):
        matrix = SimpleNamespace(weight=case["word_emb"])
        model = SimpleNamespace(
            config=SimpleNamespace(bottleneck=kind), backbone=SimpleNamespace(get_input_embeddings=lambda m=matrix: m)
        )
        found = LexMAEForPreTraining.bag_of_words(model, case["pooled"])
        torch.testing.assert_close(found, case[stored], atol=1e-6, rtol=1e-5)
    # The maximum over text tokens; the last text has none.
    logits = torch.nn.Linear(120, 120, bias=False)
    logits.weight.data = torch.eye(120)
    text = pooled_mask(case["input_ids"], case["attention_mask"], "text", (101, 102))
    torch.testing.assert_close(token_maximum(logits, case["logits"], text), case["pooled"])


def test_the_first_hidden_state_as_bottleneck(folder):
    model = LexMAEForPreTraining.from_pretrained(folder, bottleneck="cls", passage_length=40)
    batch = collator_for(model)([TextExample(0, 0, TEXTS[0])])["tokens"]["student"]
    with torch.no_grad():
        states = model.backbone.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    output = model(**batch)
    torch.testing.assert_close(output.bottleneck, states.last_hidden_state[:, 0])
    output.decoder_loss.backward()
    assert model.backbone.get_output_embeddings().bias.grad is None, "the head has no part in it"


def test_masks_of_the_original():
    """The same choices and corruptions from the same random numbers."""
    case = arrays("lexmae_masking")
    for row in range(2):
        ids, attended = case["input_ids"][row], case["attention_mask"][row].astype(bool)
        maskable = attended & ~np.isin(ids, case["special_ids"])
        chosen = maskable & (case["enc_uniform"][row] < case["enc_prob"])
        np.testing.assert_array_equal(chosen, case["enc_flags"][row].astype(bool))
        random_ids, split = case["enc_random_ids"][row], case["enc_uniform"][row] / case["enc_prob"]
        read, labels = corrupt(ids, chosen, split, random_ids, int(case["mask_id"]))
        np.testing.assert_array_equal(read, case["enc_ids"][row])
        np.testing.assert_array_equal(labels, case["enc_labels"][row])
        decoder = choose_for_decoder(maskable, chosen, (0.3, 0.5), "inclusive", case["dec_uniform"][row])
        np.testing.assert_array_equal(decoder, case["dec_flags"][row].astype(bool))
        read, labels = corrupt(
            ids, decoder, case["dec_split_uniform"][row], case["dec_random_ids"][row], int(case["mask_id"])
        )
        np.testing.assert_array_equal(read, case["dec_ids"][row])
        np.testing.assert_array_equal(labels, case["dec_labels"][row])
    case = arrays("lexmae_data_masking")
    maskable = ~np.isin(case["input_ids"], [101, 102])
    chosen = choose_exactly(maskable, float(case["prob"]), np.random.default_rng(0).random(12))
    assert chosen.sum() == case["n_targets"] == case["flags"].sum() and not chosen[~maskable].any()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 200), st.floats(0.01, 0.99), st.integers(0, 10**6))
def test_exactly_as_many_tokens_as_asked_for(tokens, rate, seed):
    chosen = choose_exactly(np.ones(tokens, bool), rate, np.random.default_rng(seed).random(tokens))
    assert chosen.sum() == math.ceil(round(rate * tokens, 9))


def test_shares_of_the_decoder():
    generator = np.random.default_rng(0)
    maskable = np.arange(200_000) % 10 > 0
    encoder = choose_exactly(maskable, 0.3, generator.random(len(maskable)))
    for how, share in (("inclusive", 0.5), ("random", 0.5), ("exclusive", 0.5)):
        chosen = choose_for_decoder(maskable, encoder, (0.3, 0.5), how, generator.random(len(maskable)))
        assert chosen.sum() / maskable.sum() == pytest.approx(share, abs=0.01), how
        assert not chosen[~maskable].any()
        overlap = (chosen & encoder).sum() / encoder.sum()
        assert overlap == pytest.approx({"inclusive": 1, "random": 0.5, "exclusive": 0}[how], abs=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    return save_tiny(tmp_path_factory.mktemp("mlm") / "bert", "bert", tiny_tokenizer, head="MaskedLM", layers=2)


def collator_for(model: LexMAEForPreTraining, **more) -> MaskingCollator:
    return MaskingCollator("student", model.processor(), seed=3, **more)


def test_batches_depend_on_seed_epoch_and_text_alone(folder):
    model = LexMAEForPreTraining.from_pretrained(folder, passage_length=40)
    examples = [TextExample(number, 1, text) for number, text in enumerate(TEXTS)]
    whole = collator_for(model)(examples)["tokens"]["student"]
    alone = collator_for(model)(examples[2:3])["tokens"]["student"]
    width = alone["input_ids"].shape[1]
    for name, one in alone.items():
        assert torch.equal(whole[name][2, :width], one[0]), name
    other = collator_for(model)([example._replace(epoch=2) for example in examples])["tokens"]["student"]
    assert not torch.equal(other["labels"], whole["labels"])
    ids = model.processor().passages(TEXTS)
    special = {model.tokenizer.cls_token_id, model.tokenizer.sep_token_id}
    for row, tokens in enumerate(ids):
        maskable = [one not in special for one in tokens]
        assert (whole["labels"][row] >= 0).sum() == math.ceil(0.3 * sum(maskable) - 1e-9)
        for labels, read in (("labels", "input_ids"), ("decoder_labels", "decoder_ids")):
            places = whole[labels][row] >= 0
            assert whole[labels][row][places].tolist() == [t for t, p in zip(tokens, places.tolist()) if p]
            kept = [t for t, p in zip(tokens, places.tolist()) if not p]
            assert whole[read][row][: len(tokens)][~places[: len(tokens)]].tolist() == kept
        assert (whole["decoder_labels"][row][whole["labels"][row] >= 0] >= 0).all()


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "modernbert"])
def test_families_train_and_give_plain_checkpoints(family, tiny_tokenizer, tmp_path):
    tokenizer = tiny_tokenizer if family in ("bert", "distilbert") else tokenizer_for(tiny_tokenizer)
    start = save_tiny(tmp_path / "start", family, tokenizer, head="MaskedLM", layers=2)
    model = LexMAEForPreTraining.from_pretrained(start, passage_length=40)
    set_dropout(model, 0.0)
    model.train()
    batch = collator_for(model)([TextExample(number, 0, text) for number, text in enumerate(TEXTS)])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        output = model(**batch["tokens"]["student"])
        losses.append((output.encoder_loss.item(), output.decoder_loss.item()))
        (output.encoder_loss + output.decoder_loss).backward()
        assert all(one.grad is not None for one in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1][0] < losses[0][0] - 0.3 and losses[-1][1] < losses[0][1] - 0.3
    assert len(model.training_modules["decoder"].state_dict()) < len(model.backbone.state_dict())
    model.save_pretrained(tmp_path / "saved")
    plain = AutoModelForMaskedLM.from_pretrained(tmp_path / "saved").eval()
    ids = torch.tensor([model.processor().passages(TEXTS[:1])[0]])
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, model.eval().backbone(input_ids=ids).logits)
    lexical = load_model(tmp_path / "saved")
    assert isinstance(lexical, LexicalRetriever) and lexical.config.pooled_tokens == "text"
    assert lexical.embedding_size == plain.config.vocab_size
    assert isinstance(DenseRetriever.from_pretrained(tmp_path / "saved"), DenseRetriever)
    again = LexMAEForPreTraining.from_pretrained(start, passage_length=40)
    again.load_checkpoint(tmp_path / "saved")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_plain_masked_language_modelling(folder):
    model = LexMAEForPreTraining.from_pretrained(folder, decoder_layers=0, passage_length=40)
    batch = collator_for(model, decoder_rate=None)([TextExample(0, 0, TEXTS[0])])["tokens"]["student"]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    output = model(**batch)
    with torch.no_grad():
        logits = model.backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(output.encoder_loss, expected)
    assert output.decoder_loss is None


def test_a_batch_without_a_word(folder):
    """Texts of special tokens only have no label; the losses are 0 and nothing breaks."""
    model = LexMAEForPreTraining.from_pretrained(folder, passage_length=40)
    output = model(**collator_for(model)([TextExample(0, 0, ""), TextExample(1, 0, "")])["tokens"]["student"])
    assert output.encoder_loss.item() == output.decoder_loss.item() == 0
    (output.encoder_loss + output.decoder_loss).backward()
    assert all(torch.isfinite(one.grad).all() for one in model.parameters() if one.grad is not None)


def test_fresh_weights_and_bad_settings(folder, tiny_bert):
    torch.manual_seed(0)
    fresh = LexMAEForPreTraining.from_pretrained(folder, fresh=True)
    assert fresh.weights_fingerprint() != LexMAEForPreTraining.from_pretrained(folder).weights_fingerprint()
    assert LexMAEForPreTraining.from_pretrained(tiny_bert, fresh=True).config.decoder_layers == 2
    with pytest.raises(InputError, match="no trained masked-LM head"):
        LexMAEForPreTraining.from_pretrained(tiny_bert)
    assert LexMAEForPreTraining.from_pretrained(tiny_bert, new_head="identity", bottleneck="cls")
    with pytest.raises(InputError, match="bottleneck is 'none'"):
        LexMAEForPreTraining.from_pretrained(folder, bottleneck="none")
    for wrong in ((0.0, 0.5, "random"), (0.3, 0.2, "inclusive"), (0.3, 0.8, "exclusive"), (0.3, 0.5, "other")):
        with pytest.raises(InputError, match="masking"):
            check_masking(*wrong)
