"""The losses against values and gradients stored from the original code of the papers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hf_distill.losses import (
    contrastive_loss,
    dkd_loss,
    embedding_mse_loss,
    flops_loss,
    kl_loss,
    layer_alignment_loss,
    maxsim,
    rank_consistency_loss,
)


GOLDEN = Path(__file__).parent / "golden"
LOSS = {"atol": 1e-5, "rtol": 1e-5}
GRADIENT = {"atol": 1e-4, "rtol": 1e-4}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


class Case:
    """The arrays of one golden file as tensors; those named in `grad` require gradients."""

    def __init__(self, name: str, *grad: str, dtype: torch.dtype = torch.float32):
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            for key in arrays.files:
                if arrays[key].dtype.kind in "iufb":
                    value = torch.from_numpy(np.array(arrays[key]))
                    setattr(self, key, value.to(dtype) if value.is_floating_point() else value)
        for key in grad:
            getattr(self, key).requires_grad_()

    def check(self, key: str, value: torch.Tensor):
        torch.testing.assert_close(value, getattr(self, key).to(value.dtype), **LOSS)

    def check_gradients(self, loss: torch.Tensor, **pairs: str):
        """Backward through `loss`, then compares the gradient of each tensor with a stored array."""
        loss.backward()
        for tensor, stored in pairs.items():
            torch.testing.assert_close(getattr(self, tensor).grad, getattr(self, stored), **GRADIENT)


def own(q: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Scores [Q, M] of each query with its own passages, d being [Q·M, D] or [Q, M, D]."""
    return torch.einsum("qd,qmd->qm", q, d.reshape(len(q), -1, d.shape[-1]))


@DTYPES
@pytest.mark.parametrize("name", ["lead_inbatch_de", "prod_nll_inbatch"])
def test_contrastive_in_batch(name, dtype):
    case = Case(name, "q", "d", dtype=dtype)
    loss = contrastive_loss(case.q @ case.d.T, torch.arange(4) * 4)
    case.check("loss", loss)
    case.check_gradients(loss, q="grad_q", d="grad_d")


def test_contrastive_own_candidates():
    for name in ("lead_ce_loss", "prod_ce_train"):
        case = Case(name)
        case.check("loss", contrastive_loss(case.logits, torch.zeros(len(case.logits), dtype=torch.long)))


def test_contrastive_tele():
    case = Case("tele_loss", "q", "p")
    scores = case.q @ case.p.T
    torch.testing.assert_close(scores, case.logits, **LOSS)
    loss = contrastive_loss(scores, case.target)
    case.check("loss", loss)
    for row, stored in enumerate(case.loss_per_query):
        one = contrastive_loss(scores[row : row + 1], case.target[row : row + 1])
        torch.testing.assert_close(one, stored, **LOSS)
    case.check_gradients(loss, q="grad_q", p="grad_p")


def test_contrastive_led():
    case = Case("led_contrastive", "doc", "qry")
    loss = contrastive_loss(case.qry @ case.doc.flatten(0, 1).T, case.target)
    case.check("loss", loss)
    case.check_gradients(loss, doc="grad_doc", qry="grad_qry")


@DTYPES
def test_kl_with_in_batch_teacher(dtype):
    case = Case("prod_kd_de", "q", "d", dtype=dtype)
    scores, teacher = case.q @ case.d.T, case.teacher_q @ case.teacher_d.T
    hard = contrastive_loss(scores, case.pos_idx)
    soft = kl_loss(scores, teacher, temperature=4.0, scale_by_temperature=True)
    case.check("hard", hard)
    case.check("soft", soft)
    loss = 0.1 * hard + 0.9 * soft
    case.check("loss", loss)
    case.check_gradients(loss, q="grad_q", d="grad_d")


def test_kl_with_cross_encoder_and_anchor():
    case = Case("prod_kd_ce_lwf", "q", "d")
    scores, anchor = own(case.q, case.d), own(case.ori_q, case.ori_d)
    hard = contrastive_loss(scores, torch.zeros(4, dtype=torch.long))
    soft = kl_loss(scores, case.ce_logits, 4.0, True)
    kept = kl_loss(scores, anchor, 4.0, True)
    for key, value in {"hard": hard, "soft": soft, "lwf": kept}.items():
        case.check(key, value)
    loss = 0.1 * hard + 0.9 * soft + kept
    case.check("loss", loss)
    case.check_gradients(loss, q="grad_q", d="grad_d")


@DTYPES
def test_dkd(dtype):
    case = Case("prod_kd_de_dkd", dtype=dtype)
    scores, teacher = case.q @ case.d.T, case.teacher_q @ case.teacher_d.T
    loss = 0.1 * contrastive_loss(scores, case.pos_idx) + 0.9 * dkd_loss(
        scores, teacher, case.pos_idx, alpha=1.0, beta=8.0, temperature=4.0
    )
    case.check("loss", loss)


def test_embedding_mse():
    case = Case("prod_kd_de_bilogit")
    soft = 0.5 * embedding_mse_loss(case.q, case.teacher_q) + 0.5 * embedding_mse_loss(case.d, case.teacher_d)
    case.check("loss", 0.1 * contrastive_loss(case.q @ case.d.T, case.pos_idx) + 0.9 * soft)


@DTYPES
def test_maxsim_in_batch(dtype):
    case = Case("lead_inbatch_colbert", "q", "d", dtype=dtype)
    scores = maxsim(case.q, case.d, case.doc_mask)
    torch.testing.assert_close(scores, case.scores, **LOSS)
    loss = contrastive_loss(scores, torch.arange(3) * 3)
    case.check("loss", loss)
    case.check_gradients(loss, q="grad_q", d="grad_d")


def test_maxsim_teacher():
    case = Case("prod_colbert")
    scores, teacher = case.q @ case.d.T, maxsim(case.teacher_q_tok, case.teacher_d_tok, case.doc_mask)
    case.check("nll", contrastive_loss(teacher, case.pos_idx))
    loss = 0.1 * contrastive_loss(scores, case.pos_idx) + 0.9 * kl_loss(scores, teacher, 4.0, True)
    case.check("kd_loss", loss)


@DTYPES
def test_layer_alignment(dtype):
    case = Case("lead_layer_loss_reweight", "student_scores", "teacher_scores", dtype=dtype)
    loss = layer_alignment_loss(case.student_scores, case.teacher_scores, case.target)
    case.check("loss", loss)
    for layer, stored in enumerate(case.kl_per_layer):
        torch.testing.assert_close(kl_loss(case.student_scores[layer], case.teacher_scores[layer]), stored, **LOSS)
    plain = layer_alignment_loss(case.student_scores, case.teacher_scores, case.target, reweight=False)
    torch.testing.assert_close(plain, case.kl_per_layer.sum(), **LOSS)
    case.check_gradients(loss, student_scores="grad_student", teacher_scores="grad_teacher")


@pytest.mark.parametrize("frozen", [False, True], ids=["joint", "frozen"])
def test_lead_total(frozen):
    stacks = ["student_q", "student_d", "teacher_q", "teacher_d"]
    case = Case("lead_distill_de_frozen_flag" if frozen else "lead_distill_de", *stacks)

    def layers(kind: str, chosen: torch.Tensor) -> torch.Tensor:
        queries, passages = (getattr(case, f"{kind}_{side}")[:, :, 0].transpose(0, 1) for side in "qd")
        return queries[chosen] @ passages[chosen].transpose(1, 2)

    target = torch.arange(3) * 3
    student, teacher = (layers(kind, torch.tensor([-1]))[0] for kind in ("student", "teacher"))
    parts = {
        "loss_student": contrastive_loss(student, target),
        "loss_teacher": contrastive_loss(teacher, target),
        "kl_t_s": kl_loss(student, teacher),
        "kl_s_t": kl_loss(teacher, student),
        "layer": layer_alignment_loss(
            layers("student", case.sel_student), layers("teacher", case.sel_teacher), target
        ),
    }
    if frozen:
        del parts["loss_teacher"]
    for key, value in parts.items():
        case.check(key, value)
    if frozen:
        del parts["kl_s_t"]
    loss = sum(parts.values())
    case.check("loss", loss)
    case.check_gradients(loss, **{name: f"grad_{name}" for name in stacks})


def test_rank_consistency_with_positive():
    case = Case("led_rank_with_pos", "doc", "qry")
    scores = own(case.qry, case.doc)
    teacher = own(case.tch_qry, case.tch_doc)
    torch.testing.assert_close(teacher, case.tch_scores, **LOSS)
    contrastive = contrastive_loss(case.qry @ case.doc.flatten(0, 1).T, torch.arange(2) * 5)
    rank = rank_consistency_loss(scores, teacher)
    case.check("dense_xentropy_loss", contrastive)
    case.check("dst_rank_loss", rank)
    case.check_gradients(contrastive + rank, doc="grad_doc", qry="grad_qry")


def test_rank_consistency_with_ties():
    case = Case("led_rank_duplicate", "doc", "qry")
    contrastive = contrastive_loss(case.qry @ case.doc.flatten(0, 1).T, torch.arange(2) * 4)
    rank = rank_consistency_loss(own(case.qry, case.doc), case.tch_scores)
    case.check("dst_rank_loss", rank)
    case.check("total", contrastive + rank)
    case.check_gradients(contrastive + rank, qry="grad_qry")
    # Which of two equal passages is pushed is a convention; what they receive together is not.
    for columns in (slice(0, 1), slice(1, 3), slice(3, 4)):
        stored, ours = case.grad_doc[:, columns].sum(1), case.doc.grad[:, columns].sum(1)
        torch.testing.assert_close(ours, stored, **GRADIENT)


def test_led_with_ranker_teacher():
    case = Case("led_rt", "doc", "qry")
    scores = own(case.qry, case.doc)
    contrastive = contrastive_loss(case.qry @ case.doc.flatten(0, 1).T, torch.arange(2) * 5)
    kl = kl_loss(scores, case.xenc_scores, temperature=3.0, scale_by_temperature=True)
    rank = rank_consistency_loss(scores, own(case.tch_qry, case.tch_doc), include_positive=False)
    for key, value in {"ce": contrastive, "kl": kl, "rank": rank}.items():
        case.check(key, value)
    total = contrastive + 1.5 * kl + 1.2 * rank
    case.check("total", total)
    case.check_gradients(total, doc="grad_doc", qry="grad_qry")


def test_kl_without_positive_through_the_mask():
    case = Case("led_dst_variants")
    scores, teacher = own(case.qry, case.doc), own(case.tch_qry, case.tch_doc)
    case.check("kl_pos", kl_loss(scores, teacher))
    negatives = torch.ones_like(scores, dtype=torch.bool)
    negatives[:, 0] = False
    case.check("kl_nopos", kl_loss(scores, teacher, mask=negatives))
    everyone, everyone_teacher = case.qry @ case.doc.flatten(0, 1).T, case.tch_qry @ case.tch_doc.flatten(0, 1).T
    case.check("kl_inbatch_pos", kl_loss(everyone, everyone_teacher))
    mask = torch.ones_like(everyone, dtype=torch.bool)
    mask[torch.arange(2), torch.arange(2) * 4] = False
    case.check("kl_inbatch_nopos", kl_loss(everyone, everyone_teacher, mask=mask))


def test_flops():
    case = Case("lexmae_ft_stage1", "doc", "qry")
    passages, queries = flops_loss(case.doc.flatten(0, 1)), flops_loss(case.qry)
    case.check("flops_doc_loss", passages)
    case.check("flops_query_loss", queries)
    contrastive = contrastive_loss(case.qry @ case.doc.flatten(0, 1).T, torch.arange(3) * 4)
    loss = contrastive + 0.002 * passages + 0.0015 * queries
    case.check("loss", loss)
    case.check_gradients(loss, doc="grad_doc", qry="grad_qry")
