"""Laws that every loss obeys: masks, permutations, precision, gradients, and agreement with sentence-transformers."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.losses import (
    LossTerm,
    contrastive_loss,
    dkd_loss,
    embedding_mse_loss,
    flops_loss,
    kl_loss,
    layer_alignment_loss,
    listnet_loss,
    logit_mse_loss,
    lwf_loss,
    margin_mse_loss,
    maxsim,
    pairwise_margin_mse_loss,
    probability_loss,
    rank_consistency_loss,
)


def layer_alignment(student, teacher, target, mask=None):
    """Three layers made from one matrix, so that the loss fits the table below."""
    factors = torch.tensor([1.0, 0.5, -0.7], dtype=student.dtype)[:, None, None]
    return layer_alignment_loss(student * factors, teacher * factors.flip(0), target, mask=mask)


# Every loss on scores as f(student, teacher, target, mask=None).
SCORE_LOSSES = {
    "contrastive": lambda s, t, y, mask=None: contrastive_loss(s, y, mask=mask),
    "kl": lambda s, t, y, mask=None: kl_loss(s, t, 2.0, True, mask=mask),
    "lwf": lambda s, t, y, mask=None: lwf_loss(s, t, 2.0, mask=mask),
    "logit_mse": lambda s, t, y, mask=None: logit_mse_loss(s, t, mask=mask),
    "probability": lambda s, t, y, mask=None: probability_loss(s, t, 2.0, mask=mask),
    "margin_mse": lambda s, t, y, mask=None: margin_mse_loss(s, t, y, mask=mask),
    "margin_mse_first": lambda s, t, y, mask=None: margin_mse_loss(s, t, mask=mask),
    "dkd": lambda s, t, y, mask=None: dkd_loss(s, t, y, mask=mask),
    "listnet": lambda s, t, y, mask=None: listnet_loss(s, t, 2.0, mask=mask),
    "pairwise_margin_mse": lambda s, t, y, mask=None: pairwise_margin_mse_loss(s, t, mask=mask),
    "layer_alignment": layer_alignment,
    "rank_consistency": lambda s, t, y, mask=None: rank_consistency_loss(s, t, margin=0.3, mask=mask),
    "rank_negatives": lambda s, t, y, mask=None: rank_consistency_loss(s, t, False, 0.1, 0.2, mask=mask),
}
POSITIONAL = {"margin_mse_first", "rank_consistency", "rank_negatives"}  # the positive is column 0 by definition
EVERY = pytest.mark.parametrize("name", SCORE_LOSSES)


def batch(seed: int, queries: int = 4, candidates: int = 6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(2, queries, candidates, generator=generator, dtype=dtype) * 2).unbind()
    target = torch.randint(candidates, (queries,), generator=generator)
    mask = torch.rand(queries, candidates, generator=generator) < 0.6
    mask[torch.arange(queries), target] = True
    mask[:, 0] = True
    return student.requires_grad_(), teacher, target, mask


def gradient(loss, scores):
    return torch.autograd.grad(loss, scores)[0]


@EVERY
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_mask_drops_the_columns(name, seed):
    loss = SCORE_LOSSES[name]
    student, teacher, target, mask = batch(seed, queries=1)
    kept = mask[0].nonzero()[:, 0]
    moved = (kept == target[0]).nonzero()[:, 0]
    expected = loss(student[:, kept], teacher[:, kept], moved)
    actual = loss(student, teacher, target, mask=mask)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient(actual, student), gradient(expected, student))


@EVERY
def test_what_a_mask_hides_is_never_read(name):
    loss = SCORE_LOSSES[name]
    student, teacher, target, mask = batch(1)
    expected = loss(student, teacher, target, mask=mask)
    expected_gradient = gradient(expected, student)
    for rubbish in (float("nan"), float("inf"), float("-inf"), 1e30):
        dirty = student.detach().masked_fill(~mask, rubbish).requires_grad_()
        actual = loss(dirty, teacher.masked_fill(~mask, rubbish), target, mask=mask)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(gradient(actual, dirty), expected_gradient)


@EVERY
def test_hidden_rows_leave_the_mean(name):
    loss = SCORE_LOSSES[name]
    student, teacher, target, mask = batch(2)
    expected = loss(student[1:], teacher[1:], target[1:], mask=mask[1:])
    mask[0] = False
    actual = loss(student, teacher, target, mask=mask)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient(actual, student), gradient(expected, student))


@EVERY
def test_nothing_left_is_zero_with_a_gradient_of_zero(name):
    student, teacher, target, mask = batch(3)
    loss = SCORE_LOSSES[name](student, teacher, target, mask=torch.zeros_like(mask))
    assert loss.item() == 0
    assert torch.equal(gradient(loss, student), torch.zeros_like(student))


@EVERY
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_order_of_queries_and_candidates_does_not_count(name, seed):
    loss = SCORE_LOSSES[name]
    student, teacher, target, mask = batch(seed)
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randperm(6, generator=generator)
    if name in POSITIONAL:
        columns = torch.cat([torch.tensor([0]), 1 + torch.randperm(5, generator=generator)])
    rows = torch.randperm(4, generator=generator)
    expected = loss(student, teacher, target, mask=mask)
    moved = columns.argsort()[target][rows]
    actual = loss(student[rows][:, columns], teacher[rows][:, columns], moved, mask=mask[rows][:, columns])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", [name for name in SCORE_LOSSES if name != "logit_mse"])
def test_adding_a_constant_to_a_row_changes_nothing(name):
    loss = SCORE_LOSSES[name]
    student, teacher, target, mask = batch(4)
    shift = torch.tensor([[300.0], [-200.0], [0.0], [7.0]], dtype=torch.float64)
    if name == "layer_alignment":
        shift = shift.abs() / 100  # the helper scales the layers, also their shifts
    torch.testing.assert_close(
        loss(student + shift, teacher - shift, target, mask=mask), loss(student, teacher, target, mask=mask)
    )


@EVERY
def test_half_precision_and_autocast_compute_in_float32(name):
    loss = SCORE_LOSSES[name]
    student, teacher, target, mask = batch(5, dtype=torch.float32)
    # Values that bfloat16 holds exactly: whatever differs then comes from the arithmetic.
    student = (student.detach() * 50).bfloat16().float().requires_grad_()
    teacher = (teacher * 50).bfloat16().float()
    expected = loss(student, teacher, target, mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = loss(student, teacher, target, mask=mask)
    from_half = loss(student.bfloat16(), teacher.bfloat16(), target, mask=mask)
    assert under_autocast.dtype == from_half.dtype == torch.float32
    assert torch.equal(under_autocast, expected)
    if name != "layer_alignment":  # its helper multiplies in bfloat16 before the loss
        assert torch.equal(from_half, expected)


@EVERY
def test_gradients_in_float64(name):
    student, teacher, target, mask = batch(6)
    target[2] = -1
    loss = SCORE_LOSSES[name]
    # The re-weighting of layers is a constant by definition, so the teacher is a constant here.
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, target, mask=mask), student)
    assert loss(student, teacher, target, mask=mask).dtype == torch.float64


@pytest.mark.parametrize("name", ["contrastive", "dkd"])
def test_rows_without_a_positive_leave_the_mean(name):
    loss = SCORE_LOSSES[name]
    student, teacher, target, mask = batch(7)
    expected = loss(student[[0, 2]], teacher[[0, 2]], target[[0, 2]], mask=mask[[0, 2]])
    target[[1, 3]] = -1
    torch.testing.assert_close(loss(student, teacher, target, mask=mask), expected)
    target[:] = -1
    nothing = loss(student, teacher, target, mask=mask)
    assert nothing.item() == 0 and not gradient(nothing, student).any()


@pytest.mark.parametrize("name", ["contrastive", "dkd", "margin_mse"])
def test_rows_whose_target_is_masked_leave_the_mean(name):
    loss = SCORE_LOSSES[name]
    student, teacher, target, mask = batch(14)
    expected = loss(student[1:], teacher[1:], target[1:], mask=mask[1:])
    mask[0] = True
    mask[0, target[0]] = False
    actual = loss(student, teacher, target, mask=mask)
    torch.testing.assert_close(actual, expected)
    assert not gradient(actual, student)[0].any()


@pytest.mark.parametrize("name", ["kl", "margin_mse", "margin_mse_first", "rank_consistency", "layer_alignment"])
def test_rows_without_a_positive_still_learn_from_the_teacher(name):
    student, teacher, target, _ = batch(8)
    loss = SCORE_LOSSES[name](student, teacher, torch.full_like(target, -1))
    assert loss.item() > 0
    assert gradient(loss, student).abs().sum(1).gt(0).all()


@pytest.mark.parametrize("name", ["kl", "margin_mse", "dkd", "layer_alignment", "rank_consistency"])
def test_a_perfect_student_has_no_loss(name):
    _, teacher, target, mask = batch(9)
    loss = SCORE_LOSSES[name]
    if name == "rank_consistency":
        loss = lambda s, t, y, mask: rank_consistency_loss(s, t, mask=mask)  # noqa: E731 (without the margin)
    if name == "layer_alignment":
        loss = lambda s, t, y, mask: layer_alignment_loss(s[None], t[None], y, mask=mask)  # noqa: E731
    assert loss(teacher, teacher, target, mask=mask).item() == pytest.approx(0, abs=1e-12)
    assert loss(-teacher, teacher, target, mask=mask).item() > 0.1


@EVERY
def test_enormous_scores_stay_finite(name):
    student, teacher, target, mask = batch(10, dtype=torch.float32)
    student = (student.detach() * 1e4).requires_grad_()
    for keep in (None, mask):
        loss = SCORE_LOSSES[name](student, teacher * 1e4, target, mask=keep)
        assert loss.isfinite() and gradient(loss, student).isfinite().all()


def test_dkd_with_a_single_candidate_is_zero():
    scores = torch.randn(2, 1, requires_grad=True)
    loss = dkd_loss(scores, torch.randn(2, 1), torch.zeros(2, dtype=torch.long))
    assert loss.item() == 0 and not gradient(loss, scores).any()


@pytest.mark.parametrize("loss", [kl_loss, margin_mse_loss, rank_consistency_loss, embedding_mse_loss])
def test_shapes_that_would_broadcast_are_refused(loss):
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 1\)"):
        loss(torch.randn(3, 4), torch.randn(3, 1))


def test_masks_of_another_kind_are_refused():
    scores, target = torch.randn(3, 4), torch.zeros(3, dtype=torch.long)
    for mask in (torch.ones(3, 4), torch.ones(4, dtype=torch.bool), torch.ones(3, 1, dtype=torch.bool)):
        with pytest.raises(ValueError, match="mask must be boolean"):
            contrastive_loss(scores, target, mask=mask)


def test_rank_consistency_against_a_loop_over_pairs():
    student, teacher, _, mask = batch(11)
    margin, gap = 0.4, 0.9
    total, pairs = 0.0, 0
    for i in range(4):
        for a in range(6):
            for b in range(6):
                if (
                    mask[i, a]
                    and mask[i, b]
                    and teacher[i, a] > teacher[i, b]
                    and teacher[i, a] - teacher[i, b] >= gap
                ):
                    total += max(0.0, margin - (student[i, a] - student[i, b]).item())
                    pairs += 1
    actual = rank_consistency_loss(student, teacher, margin=margin, min_teacher_gap=gap, mask=mask)
    assert pairs > 5 and actual.item() == pytest.approx(total / pairs)


def test_rank_consistency_leaves_out_positives_only():
    """The first candidate of a query without a positive is like any other."""
    student, teacher, _, mask = batch(15)
    target = torch.tensor([0, -1, 0, -1])
    others = torch.arange(6) != target[:, None]
    options = {"include_positive": False, "margin": 0.1, "min_teacher_gap": 0.2}
    expected = rank_consistency_loss(student, teacher, margin=0.1, min_teacher_gap=0.2, mask=mask & others)
    term = LossTerm("rank_consistency", options=options)
    torch.testing.assert_close(term(student, teacher, target, mask), expected)
    positives = torch.zeros_like(target)
    assert rank_consistency_loss(student, teacher, **options, mask=mask) == term(student, teacher, positives, mask)
    a, b = torch.triu_indices(6, 6, offset=1)
    pairs = (mask & others)[:, a] & (mask & others)[:, b] & ((teacher[:, a] - teacher[:, b]).abs() >= 0.2)
    assert torch.equal(term.counted(student, teacher, target, mask), pairs)


def test_margin_mse_takes_the_mean_over_negatives_then_queries():
    student, teacher, target, mask = batch(12)
    rows = []
    for i in range(4):
        y = target[i]
        others = [j for j in range(6) if mask[i, j] and j != y]
        if others:
            rows.append(
                sum(((student[i, y] - student[i, j]) - (teacher[i, y] - teacher[i, j])).item() ** 2 for j in others)
                / len(others)
            )
    assert margin_mse_loss(student, teacher, target, mask=mask).item() == pytest.approx(sum(rows) / len(rows))


def test_embedding_mse_normalised_and_masked():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 8, generator=generator)
    assert embedding_mse_loss(3 * teacher, teacher, normalize=True).item() == pytest.approx(0, abs=1e-12)
    assert embedding_mse_loss(student, teacher).item() == pytest.approx(((student - teacher) ** 2).mean().item())
    keep = torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(
        embedding_mse_loss(student, teacher, mask=keep), embedding_mse_loss(student[keep], teacher[keep])
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert embedding_mse_loss(student.bfloat16(), teacher).dtype == torch.float32


def test_flops_masked_and_averaged_over_processes():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, 11, generator=generator)
    keep = torch.arange(8) < 5
    torch.testing.assert_close(flops_loss(rows, mask=keep), flops_loss(rows[:5]))
    assert flops_loss(rows, mask=torch.zeros(8, dtype=torch.bool)).item() == 0
    other = rows[4:].abs().mean(0)
    torch.testing.assert_close(flops_loss(rows[:4], reduce=lambda means: (means + other) / 2), flops_loss(rows))


def test_maxsim_against_a_loop(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    queries, passages = torch.randn(5, 3, 7, generator=generator), torch.randn(4, 6, 7, generator=generator)
    keep = torch.rand(4, 6, generator=generator) < 0.5
    keep[:, 0], keep[3] = True, False
    query_keep = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 1], [0, 0, 0]])
    expected = torch.zeros(5, 4)
    for i in range(5):
        for j in range(3):  # passage 3 has no token: 0
            best = [max((q @ d).item() for d in passages[j][keep[j]]) for q in queries[i][query_keep[i].bool()]]
            expected[i, j] = sum(best)
    torch.testing.assert_close(maxsim(queries, passages, keep, query_keep), expected)
    monkeypatch.setattr(sys.modules["hf_distill.losses.maxsim"], "_CELLS", 1)  # one query at a time
    torch.testing.assert_close(maxsim(queries, passages, keep.long(), query_keep), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(maxsim(queries, passages, keep, query_keep), expected)


def test_gradients_of_maxsim_against_autograd(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    queries, passages = (torch.randn(*shape, 7, generator=generator) for shape in ((5, 3), (4, 6)))
    keep = torch.rand(4, 6, generator=generator) < 0.5
    keep[:, 0], keep[3] = True, False
    query_keep = torch.rand(5, 3, generator=generator) < 0.7
    weights = torch.randn(5, 4, generator=generator)
    found = []
    for dense in (True, False):
        query, passage = queries.clone().requires_grad_(), passages.clone().requires_grad_()
        if dense:
            best = torch.einsum("qld,cmd->qlcm", query, passage).masked_fill(~keep, -1e9).amax(-1)
            scores = best.masked_fill(~keep.any(-1), 0.0).masked_fill(~query_keep[..., None], 0.0).sum(1)
        else:
            monkeypatch.setattr(sys.modules["hf_distill.losses.maxsim"], "_CELLS", 1)
            scores = maxsim(query, passage, keep, query_keep)
        (scores * weights).sum().backward()
        found.append((scores.detach(), query.grad, passage.grad))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs)
    # Where one side is frozen, the other still learns.
    query = queries.clone().requires_grad_()
    (maxsim(query, passages, keep, query_keep) * weights).sum().backward()
    torch.testing.assert_close(query.grad, found[0][1])


def sentence_transformers_losses():
    """name -> (their loss on [query, candidate 0, candidate 1, ...] embeddings and labels, ours)."""
    from sentence_transformers.sentence_transformer import losses

    def own(q, candidates):
        return torch.stack([(q * candidate).sum(1) for candidate in candidates], dim=1)

    dot = partial(torch.einsum, "qd,cd->qc")
    first = torch.arange(4)
    ranking = losses.MultipleNegativesRankingLoss(torch.nn.Identity(), scale=3.0, similarity_fct=dot)
    margin = losses.MarginMSELoss(torch.nn.Identity())
    divergence = losses.DistillKLDivLoss(torch.nn.Identity(), temperature=2.0)
    return {
        "contrastive": (
            lambda q, candidates, labels: ranking.compute_loss_from_embeddings([q, *candidates], None),
            lambda q, candidates, labels: contrastive_loss(3.0 * q @ torch.cat(candidates).T, first),
        ),
        "margin_mse": (
            lambda q, candidates, labels: margin.compute_loss_from_embeddings(
                [q, *candidates], labels[:, :1] - labels[:, 1:]
            ),
            lambda q, candidates, labels: margin_mse_loss(own(q, candidates), labels),
        ),
        "kl": (
            lambda q, candidates, labels: divergence.compute_loss_from_embeddings([q, *candidates], labels),
            lambda q, candidates, labels: kl_loss(own(q, candidates), labels, 2.0, scale_by_temperature=True),
        ),
    }


@pytest.mark.parametrize("name", ["contrastive", "margin_mse", "kl"])
def test_equal_to_sentence_transformers(name):
    theirs, ours = sentence_transformers_losses()[name]
    generator = torch.Generator().manual_seed(13)
    tensors = [torch.randn(4, 8, generator=generator, requires_grad=True) for _ in range(4)]
    labels = torch.randn(4, 3, generator=generator) * 3
    expected, actual = theirs(tensors[0], tensors[1:], labels), ours(tensors[0], tensors[1:], labels)
    torch.testing.assert_close(actual, expected)
    for left, right in zip(torch.autograd.grad(actual, tensors), torch.autograd.grad(expected, tensors)):
        torch.testing.assert_close(left, right)
