"""Loss terms: reading a configuration, refusing what makes no sense, computing and adding."""

from __future__ import annotations

import inspect

import pytest
import torch

from hf_distill.errors import InputError
from hf_distill.losses import (
    LOSSES,
    LossTerm,
    calibrate,
    combine,
    contrastive_loss,
    kl_loss,
    margin_mse_loss,
    parse_terms,
)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 6, generator=generator)
    mask = torch.rand(4, 6, generator=generator) < 0.7
    mask[:, 0] = True
    return student.requires_grad_(), teacher, torch.tensor([0, 0, -1, 0]), mask


def test_every_form_of_a_term():
    terms = parse_terms(
        [
            "contrastive:0.1",
            {"name": "kl", "weight": 0.9, "temperature": 4, "options": {"scale_by_temperature": True}},
            '{"name": "margin_mse", "teacher": "big", "calibration": "z_norm"}',
            LossTerm("embedding_mse", options={"normalize": True}),
        ]
    )
    assert list(terms) == ["contrastive", "kl", "margin_mse", "embedding_mse"]
    assert [term.weight for term in terms.values()] == [0.1, 0.9, 1.0, 1.0]
    assert [term.candidates for term in terms.values()] == ["global", "own", "own", "own"]
    assert terms["kl"].options == {"temperature": 4, "scale_by_temperature": True}
    assert (terms["margin_mse"].teacher, terms["margin_mse"].calibration) == ("big", "z_norm")
    assert list(parse_terms("kl")) == ["kl"]


def test_labels_tell_terms_of_one_name_apart():
    terms = parse_terms([{"name": "kl", "teacher": "a"}, {"name": "kl", "teacher": "b"}, "kl", "kl", "contrastive"])
    assert list(terms) == ["kl_a", "kl_b", "kl", "kl#2", "contrastive"]


@pytest.mark.parametrize(
    "term, message",
    [
        ("kll", "unknown loss 'kll'.*contrastive, kl,"),
        ("kl:much", "'much' in 'kl:much' is not a weight"),
        ("{kl}", "is not JSON"),
        ({"weight": 1}, "names no loss"),
        (7, "names no loss"),
        ({"name": "kl", "weight": -1}, "'kl'.*weight -1"),
        ({"name": "kl", "weight": float("nan")}, "weight nan"),
        ({"name": "kl", "weight": "1"}, "weight '1'"),
        ({"name": "kl", "temprature": 3}, "unknown option temprature.*temperature, scale_by_temperature"),
        ({"name": "contrastive", "temperature": 3}, "unknown option|not"),
        ({"name": "kl", "temperature": 0}, "temperature is 0.*positive"),
        ({"name": "kl", "candidates": "all"}, "candidates 'all'.*own, in_batch, global"),
        ({"name": "rank_consistency", "candidates": "global"}, "Choose one of own"),
        ({"name": "kl", "calibration": "softmax"}, "unknown calibration 'softmax'.*min_max"),
        ({"name": "contrastive", "teacher": "big"}, "no teacher"),
        ({"name": "embedding_mse", "calibration": "rank"}, "embeddings, which are not calibrated"),
        ({"name": "kl", "calibration": "temperature", "calibration_temperature": -2}, "calibration_temperature is -2"),
    ],
)
def test_refusals_name_the_cure(term, message):
    with pytest.raises(InputError, match=message):
        parse_terms([term])


def test_no_loss_at_all():
    with pytest.raises(InputError, match="no loss is given"):
        parse_terms([])


def test_registry_knows_every_option():
    for name, loss in LOSSES.items():
        parameters = inspect.signature(loss.function).parameters
        assert "mask" in parameters or "scores" not in loss.inputs, name
        assert loss.target <= ("target" in parameters), name
        assert set(loss.options) <= set(parameters) and not {"mask", "target", "scores"} & set(loss.options), name


def test_a_term_computes_its_loss(batch):
    student, teacher, target, mask = batch
    terms = parse_terms(
        [
            "contrastive",
            {"name": "kl", "temperature": 3, "calibration": "z_norm"},
            {"name": "margin_mse", "calibration": "min_max", "calibrate_student": True},
        ]
    )
    expected = {
        "contrastive": contrastive_loss(student, target, mask=mask),
        "kl": kl_loss(student, calibrate(teacher, "z_norm", mask), 3, mask=mask),
        "margin_mse": margin_mse_loss(
            calibrate(student, "min_max", mask), calibrate(teacher, "min_max", mask), target, mask=mask
        ),
    }
    for label, term in terms.items():
        torch.testing.assert_close(term(student, teacher, target, mask), expected[label])
    assert terms["contrastive"](student, None, target) == contrastive_loss(student, target)
    with pytest.raises(InputError, match="needs a teacher's scores"):
        terms["kl"](student, None, target)
    with pytest.raises(InputError, match="compares embeddings, not scores"):
        LossTerm("embedding_mse")(student, teacher, target)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.inputs == "scores"])
def test_every_score_loss_runs_as_a_term(name, batch):
    student, teacher, target, mask = batch
    loss = LossTerm(name)(student, teacher, target, mask)
    assert loss.ndim == 0 and torch.autograd.grad(loss, student)[0].isfinite().all()


def test_combine():
    parts = {"a": torch.tensor(2.0, requires_grad=True), "b": torch.tensor(3.0), "c": torch.tensor(float("nan"))}
    total = combine(parts, {"a": 0.5, "b": 2.0, "c": 0.0})
    assert total.item() == 7.0
    total.backward()
    assert parts["a"].grad.item() == 0.5
    assert combine({"a": parts["a"], "b": parts["b"]}).item() == 5.0
    assert combine({"a": parts["a"], "b": parts["b"]}, [1, 10]).item() == 32.0
    with pytest.raises(InputError, match="do not fit"):
        combine(parts, {"a": 1.0})
    with pytest.raises(InputError, match="weight 0"):
        combine({"a": parts["a"]}, {"a": 0.0})
