"""Rankers with one linear layer on the first token: the original's numbers, training, saving, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hf_distill.errors import InputError
from hf_distill.models import CrossEncoderRanker, load_model, student_from

from .model_zoo import PAIRS, save_tiny, tokenizer_for
from .test_models_forward import pair_scores


GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def linear(tiny_bert) -> CrossEncoderRanker:
    torch.manual_seed(3)
    return CrossEncoderRanker.from_pretrained(tiny_bert, head="linear")


def test_head_of_the_original_on_every_layer():
    from transformers import BertConfig, BertForSequenceClassification

    from hf_distill.models.cross_encoder import CrossEncoderConfig

    with np.load(GOLDEN / "lead_ce_head.npz") as arrays:
        case = {key: torch.from_numpy(np.array(arrays[key])).float() for key in arrays.files}
    pairs, depth, length, width = case["hidden"].shape
    sizes = {"num_hidden_layers": depth, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}
    backbone = BertForSequenceClassification(BertConfig(hidden_size=width, num_labels=1, **sizes))
    model = CrossEncoderRanker(CrossEncoderConfig(head="linear"), backbone).eval()
    with torch.no_grad():
        backbone.classifier.weight.copy_(case["w"])
        backbone.classifier.bias.copy_(case["b"])
    hidden = case["hidden"].requires_grad_()
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: hidden[:, number])
    chunk = {name: torch.ones(pairs, length, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    final, layers = model.score_chunk(chunk, None, range(1, depth + 1))
    torch.testing.assert_close(final.view(2, 3), case["logits"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layers.T.reshape(depth, 2, 3), case["layer_logits"], atol=1e-5, rtol=1e-5)
    # Gradients against those of the formula w·h + b, written out.
    to_final, to_layers = torch.randn(final.shape), torch.randn(layers.shape)
    ((final * to_final).sum() + (layers * to_layers).sum()).backward()
    share = to_layers.clone()
    share[:, -1] += to_final
    expected = torch.zeros_like(hidden)
    expected[:, :, 0] = share[:, :, None] * case["w"]
    torch.testing.assert_close(hidden.grad, expected, atol=1e-4, rtol=1e-4)
    of_weight = (share[:, :, None] * hidden.detach()[:, :, 0]).sum((0, 1))
    torch.testing.assert_close(backbone.classifier.weight.grad[0], of_weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(backbone.classifier.bias.grad[0], share.sum(), atol=1e-4, rtol=1e-4)


def test_a_new_head_is_trained_saved_and_resumed(linear, tmp_path):
    head = linear.backbone.classifier
    assert 0.01 < head.weight.std() < 0.03 and not head.bias.any()
    trained = {name for name, one in linear.named_parameters() if one.requires_grad}
    assert not any("pooler" in name for name in trained) and "backbone.classifier.weight" in trained
    linear.train()
    optimiser = torch.optim.AdamW([one for one in linear.parameters() if one.requires_grad], lr=1e-2)
    before = pair_scores(linear.eval(), PAIRS)
    processor = linear.train().processor()
    ids, types = processor.pairs([one for one, _ in PAIRS], [other for _, other in PAIRS])
    linear.score_chunk(processor.pad(ids, types)).square().sum().backward()
    assert all(one.grad is not None for one in linear.parameters() if one.requires_grad)
    optimiser.step()
    after = pair_scores(linear.eval(), PAIRS)
    assert (after - before).abs().max() > 1e-3
    linear.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert again.config.head == "linear" and again.weights_fingerprint() == linear.weights_fingerprint()
    assert torch.equal(again.backbone.classifier.weight, head.weight)
    other = student_from(tmp_path / "saved")
    with torch.no_grad():
        other.backbone.classifier.weight.zero_()
    other.load_checkpoint(tmp_path / "saved")
    assert torch.equal(pair_scores(other, PAIRS), pair_scores(again, PAIRS))


def test_students_keep_a_linear_head(linear, tmp_path):
    linear.save_pretrained(tmp_path / "saved")
    for teacher in (linear, tmp_path / "saved"):
        student = student_from("layers:2", teacher)
        assert student.config.head == "linear"
        assert torch.equal(student.backbone.classifier.weight, linear.backbone.classifier.weight)
        assert not any(one.requires_grad for name, one in student.named_parameters() if "pooler" in name)
        student.save_pretrained(tmp_path / "student")
        again = load_model(tmp_path / "student")
        torch.testing.assert_close(pair_scores(again, PAIRS), pair_scores(student.eval(), PAIRS))


def test_refusals(linear, tiny_tokenizer, tiny_bert, tmp_path):
    make = CrossEncoderRanker.from_pretrained
    with pytest.raises(InputError, match="'square' is no head.*full or linear"):
        make(tiny_bert, head="square")
    ranker = save_tiny(tmp_path / "ranker", "bert", tiny_tokenizer, head="SequenceClassification", num_labels=1)
    with pytest.raises(InputError, match="should be linear, but the model was trained with a full one.*Leave"):
        make(ranker, head="linear")
    linear.save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match="should be full, but the model was trained with a linear one"):
        make(tmp_path / "saved", head="full")
    distilbert = save_tiny(tmp_path / "distilbert", "distilbert", tokenizer_for(tiny_tokenizer))
    with pytest.raises(InputError, match="'distilbert' classifier cannot be made linear.*bert"):
        make(distilbert, head="linear")
