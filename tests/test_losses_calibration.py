"""Calibration of teachers' scores, the fitted temperature, and the check for useless scores."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import rankdata

from hf_distill.errors import InputError
from hf_distill.losses import CALIBRATIONS, calibrate, check_teacher_scores, contrastive_loss, fit_temperature


def batch(seed: int = 0, rows: int = 40, columns: int = 8):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 3 + 1
    mask = torch.rand(rows, columns, generator=generator) < 0.7
    mask[:, :2] = True
    return scores, mask


@pytest.mark.parametrize("method", CALIBRATIONS)
def test_a_mask_is_the_same_as_fewer_columns(method):
    scores, mask = batch()
    scores[3, ~mask[3]] = float("nan")
    actual = calibrate(scores, method, mask, temperature=0.5)
    for row in range(len(scores)):
        expected = calibrate(scores[row : row + 1, mask[row]], method, temperature=0.5)
        torch.testing.assert_close(actual[row, mask[row]], expected[0])
    if method in ("z_norm", "min_max", "rank"):
        assert not actual[~mask].any()


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=8))
def test_each_method_by_hand(values):
    row = torch.tensor([values], dtype=torch.float64)
    mean, deviation = row.mean(), row.std(correction=0)
    z_norm = (row - mean) / deviation if deviation > 0 else row * 0
    torch.testing.assert_close(calibrate(row, "z_norm"), z_norm)
    spread = row.max() - row.min()
    torch.testing.assert_close(calibrate(row, "min_max"), (row - row.min()) / spread if spread > 0 else row * 0)
    ranks = torch.from_numpy(rankdata(values))[None] - 1
    torch.testing.assert_close(calibrate(row, "rank"), ranks / max(1, len(values) - 1))
    assert torch.equal(calibrate(row, "none"), row)
    assert torch.equal(calibrate(row, "temperature", temperature=4.0), row / 4)


@pytest.mark.parametrize("method", CALIBRATIONS)
def test_order_stays_and_layers_are_calibrated_alike(method):
    scores, mask = batch(1)
    calibrated = calibrate(scores, method)
    assert torch.equal(calibrated.argsort(1), scores.argsort(1))
    layers = torch.stack([scores, scores * 100 - 7])
    stacked = calibrate(layers, method, mask)
    torch.testing.assert_close(stacked[1], calibrate(layers[1], method, mask))


def test_calibration_is_differentiable_and_in_float32():
    scores, mask = batch(2, rows=3)
    scores[1] = 2.0  # a constant row has no spread to divide by
    scores.requires_grad_()
    for method in ("z_norm", "min_max"):
        calibrate(scores, method, mask).pow(2).sum().backward()
        assert scores.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert calibrate(scores.detach().bfloat16(), "z_norm").dtype == torch.float32


def test_refusals():
    with pytest.raises(InputError, match="unknown calibration 'zscore'.*z_norm"):
        calibrate(torch.zeros(1, 2), "zscore")
    with pytest.raises(InputError, match="not a positive number"):
        calibrate(torch.zeros(1, 2), "temperature", temperature=0)
    with pytest.raises(InputError, match="no row has a known positive"):
        fit_temperature(torch.zeros(2, 2), torch.tensor([-1, -1]))


@pytest.mark.parametrize("true_temperature", [0.05, 1.0, 20.0])
def test_the_fitted_temperature_is_the_minimum(true_temperature):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4000, 10, generator=generator, dtype=torch.float64) * 2
    target = logits.softmax(1).multinomial(1, generator=generator)[:, 0]
    scores = logits * true_temperature + 500  # an offset does not count
    fitted = fit_temperature(scores, target)
    assert fitted == pytest.approx(true_temperature, rel=0.1)

    def loss(log_temperature):
        return contrastive_loss((scores - 500) / math.exp(log_temperature), target).item()

    best = minimize_scalar(loss, bounds=(-6, 6), method="bounded", options={"xatol": 1e-8})
    assert fitted == pytest.approx(math.exp(best.x), rel=1e-4)


def test_the_fitted_temperature_obeys_mask_and_unknown_rows():
    scores, mask = batch(4, rows=200)
    target = torch.zeros(200, dtype=torch.long)
    target[::3] = -1
    fitted = fit_temperature(scores, target, mask)
    dirty = scores.masked_fill(~mask, 1e6)
    dirty[::3] = float("nan")
    assert fit_temperature(dirty, target, mask) == pytest.approx(fitted)


def test_temperatures_of_a_perfect_and_of_a_useless_teacher_are_the_ends():
    scores = torch.arange(5.0).repeat(10, 1)
    spread = scores.double().std(correction=0).item()
    assert fit_temperature(scores, torch.full((10,), 4)) == pytest.approx(spread * 1e-6, rel=0.01)
    assert fit_temperature(scores, torch.full((10,), 0)) == pytest.approx(spread * 1e6, rel=0.01)


def test_healthy_scores_raise_no_warning():
    scores, mask = batch(5)
    assert check_teacher_scores(scores) == check_teacher_scores(scores, mask) == []
    for method in ("z_norm", "min_max", "rank"):
        assert check_teacher_scores(calibrate(scores, method)) == []
        assert check_teacher_scores(calibrate(scores[:, :3], method)) == []
    assert check_teacher_scores(scores / 20, temperature=0.05) == []


@pytest.mark.parametrize(
    "spoil, sentence, cure",
    [
        (lambda scores: scores * 0 + 4, "flat: in 100% .* same score", "trained ranker"),
        (lambda scores: scores * 0.02, "flat: .* nearly uniform", "z_norm.*temperature below 1"),
        (lambda scores: scores * 100, "saturated: .* one-hot", "z_norm.*temperature above 1"),
        (lambda scores: (scores * 10).sigmoid(), "saturated: .* sigmoid", "raw logits"),
        (lambda scores: (scores[:, :2] * 10).sigmoid(), "saturated: .* sigmoid", "raw logits"),
        (lambda scores: scores.masked_fill(scores > 5, float("nan")), "not finite", "Score these candidates again"),
    ],
)
def test_useless_scores_are_said_with_their_cure(spoil, sentence, cure):
    scores, _ = batch(6)
    assert any(_matches(text, sentence, cure) for text in check_teacher_scores(spoil(scores)))


def _matches(text: str, *patterns: str) -> bool:
    import re

    return all(re.search(pattern, text) for pattern in patterns)


def test_the_check_looks_only_at_kept_candidates():
    scores, mask = batch(7)
    assert check_teacher_scores(scores.masked_fill(~mask, float("-inf")), mask) == []
    flat = torch.where(mask, 1.0, scores)
    assert any("same score" in text for text in check_teacher_scores(flat, mask))
    assert check_teacher_scores(scores, torch.zeros_like(mask)) == []
