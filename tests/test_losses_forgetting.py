"""Learning without forgetting, and PROD's other kinds of distillation, against values of the original code."""

from __future__ import annotations

import pytest
import torch

from hf_distill.errors import InputError
from hf_distill.losses import (
    LossTerm,
    contrastive_loss,
    dkd_loss,
    kl_loss,
    logit_mse_loss,
    lwf_loss,
    mean_teacher,
    parse_terms,
    probability_loss,
)
from tests.test_losses_golden import LOSS, Case, own


FIRST = torch.zeros(4, dtype=torch.long)


def test_prod_with_anchor():
    case = Case("prod_kd_ce_lwf", "q", "d", "ori_q", "ori_d")
    scores, anchor = own(case.q, case.d), own(case.ori_q, case.ori_d)
    kept = lwf_loss(scores, anchor)
    case.check("lwf", kept)
    loss = 0.1 * contrastive_loss(scores, FIRST) + 0.9 * kl_loss(scores, case.ce_logits, 4.0, True) + kept
    case.check("loss", loss)
    case.check_gradients(loss, q="grad_q", d="grad_d")
    assert case.ori_q.grad is None and case.ori_d.grad is None, "the original spends a backward pass on the anchor"


def test_prod_without_anchor():
    """The case `prod_kd_ce` is this file's data without the anchor's term: 7.554899 in the original."""
    case = Case("prod_kd_ce_lwf")
    scores = own(case.q, case.d)
    loss = 0.1 * contrastive_loss(scores, FIRST) + 0.9 * kl_loss(scores, case.ce_logits, 4.0, True)
    torch.testing.assert_close(loss.item(), 7.554899, **LOSS)
    dkd = 0.1 * contrastive_loss(scores, FIRST) + 0.9 * dkd_loss(scores, case.ce_logits, FIRST)
    torch.testing.assert_close(dkd.item(), 22.761002, **LOSS)


def test_prod_logit_mse():
    case = Case("prod_kd_de_logit")
    scores, teacher = case.q @ case.d.T, case.teacher_q @ case.teacher_d.T
    case.check("loss", 0.1 * contrastive_loss(scores, case.pos_idx) + 0.9 * logit_mse_loss(scores, teacher))
    case = Case("prod_kd_ce_logit")
    scores = own(case.q, case.d)
    case.check("loss", 0.1 * contrastive_loss(scores, FIRST) + 0.9 * logit_mse_loss(scores, case.ce_logits))


def test_prod_probability_loss():
    case = Case("prod_kd_ce_prob")
    scores = own(case.q, case.d)
    case.check("loss", 0.1 * contrastive_loss(scores, FIRST) + 0.9 * probability_loss(scores, case.ce_logits))


def test_prod_mean_of_three_teachers():
    case = Case("prod_multi_teacher_baselines")
    scores, dense = own(case.q, case.d), own(case.de_q, case.de_d)
    term = LossTerm(
        "kl",
        teacher=["dense", "ce12", "ce24"],
        candidates="own",
        options={"temperature": 4.0, "scale_by_temperature": True},
    )
    soft = term(scores, [dense, case.ce12, case.ce24], FIRST)
    case.check("multi", 0.1 * contrastive_loss(scores, FIRST) + 0.9 * soft)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_mean_of_teachers_has_the_mean_distribution(temperature):
    generator = torch.Generator().manual_seed(3)
    scores = list(torch.randn(3, 5, 7, generator=generator, dtype=torch.float64) * 6)
    mask = torch.rand(5, 7, generator=generator) < 0.7
    mask[:, 0] = True
    expected = torch.stack([(one / temperature).masked_fill(~mask, -torch.inf).softmax(-1) for one in scores]).mean(0)
    found = (mean_teacher(scores, temperature, mask) / temperature).masked_fill(~mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(mean_teacher(scores), sum(scores) / 3)


def test_the_anchor_is_the_teacher_of_its_loss():
    term = parse_terms([{"name": "lwf", "weight": 0.5, "temperature": 2}])["lwf"]
    assert term.teachers == ["anchor"]
    with pytest.raises(InputError, match="Name no teacher"):
        LossTerm("lwf", teacher="big")
    with pytest.raises(InputError, match="Choose kl or logit_mse"):
        lwf_loss(torch.zeros(1, 2), torch.zeros(1, 2), distance="l1")
    with pytest.raises(InputError, match="several only for a loss on scores"):
        LossTerm("embedding_mse", teacher=["a", "b"])


def test_a_student_that_has_not_moved_forgets_nothing():
    scores = torch.randn(3, 5, requires_grad=True)
    for distance in ("kl", "logit_mse"):
        loss = lwf_loss(scores, scores.detach(), distance=distance)
        loss.backward()
        assert abs(loss.item()) < 1e-6 and scores.grad.abs().max() < 1e-6
