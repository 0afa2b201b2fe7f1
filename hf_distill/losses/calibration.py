"""Teachers' scores on a scale that a student can learn from, and a check whether they are worth learning from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InputError
from .numerics import at_target, full_precision, masked_log_softmax, masked_mean, target_rows


CALIBRATIONS = ("none", "z_norm", "min_max", "rank", "temperature")


@full_precision
def calibrate(scores: Tensor, method: str = "none", mask: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
    """Brings each query's scores to a common scale; the order of the candidates stays.

    Args:
        scores: Float[..., Q, C].
        method: `none` leaves the scores alone; `z_norm` gives every row mean 0 and standard deviation 1; `min_max`
            spreads every row over 0..1; `rank` replaces a score by the share of the other candidates that it beats
            (0..1, ties share their places); `temperature` divides by `temperature`.
        mask: Bool[Q, C], True keeps a candidate. Masked cells do not enter the statistics and come out as 0.
        temperature: For the method of that name; [`fit_temperature`] finds one.

    Returns:
        Float[..., Q, C]. Rows whose scores are all equal come out as 0 (`rank`: 0.5).

    Raises:
        InputError: For an unknown method or a temperature that is not positive.
    """
    if method not in CALIBRATIONS:
        raise InputError(f"unknown calibration {method!r}", cure=f"Choose one of {', '.join(CALIBRATIONS)}")
    if method == "none":
        return scores
    if method == "temperature":
        if not temperature > 0 or math.isinf(temperature):
            raise InputError(f"the temperature {temperature} is not a positive number", cure="Fit it on labelled rows")
        return scores / temperature
    keep = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
    filled = scores.masked_fill(~keep, 0.0)
    count = keep.sum(-1, keepdim=True)
    if method == "z_norm":
        centred = filled - masked_mean(filled, keep, dim=-1)[..., None]
        variance = masked_mean(centred**2, keep, dim=-1)[..., None]
        scaled = _divide(centred, variance.clamp(min=torch.finfo(scores.dtype).tiny).sqrt(), variance > 0)
    elif method == "min_max":
        limit = torch.finfo(scores.dtype).max
        low = scores.masked_fill(~keep, limit).amin(-1, keepdim=True)
        spread = scores.masked_fill(~keep, -limit).amax(-1, keepdim=True) - low
        scaled = _divide(filled - low, spread, spread > 0)
    else:
        scaled = _beaten(filled, keep) / (count - 1).clamp(min=1)
    return scaled.masked_fill(~keep, 0.0)


def _divide(numerator: Tensor, denominator: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, numerator / torch.where(valid, denominator, 1.0), 0.0)


def _beaten(scores: Tensor, keep: Tensor) -> Tensor:
    """How many other kept candidates of its row each one beats, a tie counting one half."""
    # Two binary searches in the sorted row count the lower and the equal scores without comparing all pairs.
    hidden = scores.masked_fill(~keep, torch.finfo(scores.dtype).max)
    ordered = hidden.sort(dim=-1).values
    lower = torch.searchsorted(ordered, scores.contiguous(), right=False)
    not_above = torch.searchsorted(ordered, scores.contiguous(), right=True)
    return (lower + not_above - 1).to(scores.dtype) / 2


def fit_temperature(scores: Tensor, target: Tensor, mask: Tensor | None = None) -> float:
    """The temperature at which a teacher's softmax is most likely to have drawn the known positives.

    Guo et al., "On Calibration of Modern Neural Networks" (2017), section 4.2. The negative log-likelihood of
    `softmax(scores / T)` is convex in 1/T, so its only minimum is where the expected score under the softmax equals
    the positives' mean score; 100 halvings of log T, in float64, between one millionth and a million times the
    scores' spread find it.

    Args:
        scores: Float[Q, C].
        target: Long[Q], -1 where no positive is known.
        mask: Bool[Q, C], True keeps a candidate.

    Returns:
        T > 0. At the ends of the interval: a teacher that always puts the positive first (lower end), or one that
        ranks positives no better than chance (upper end).

    Raises:
        InputError: If no row has a known positive.
    """
    scores = scores.detach().double()
    rows = target_rows(target, mask)
    if not bool(rows.any()):
        raise InputError("no row has a known positive to fit a temperature on", cure="Give labelled rows")
    scores, target = scores[rows], target[rows]
    keep = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask[rows]
    # Without a common offset the products below keep all their digits.
    scores = (scores - masked_mean(scores, keep, dim=1)[:, None]).masked_fill(~keep, 0.0)
    spread = max(float(masked_mean(scores**2, keep).sqrt()), 1e-12)
    positive = at_target(scores, target).mean()
    low, high = math.log(spread * 1e-6), math.log(spread * 1e6)
    for _ in range(100):
        middle = (low + high) / 2
        probabilities = masked_log_softmax(scores / math.exp(middle), keep).exp().masked_fill(~keep, 0.0)
        if (probabilities * scores).sum(1).mean() > positive:
            low = middle  # too sharp: the teacher's own favourites score higher than the positives
        else:
            high = middle
    return math.exp((low + high) / 2)


def check_teacher_scores(scores: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0) -> list[str]:
    """What makes a teacher's scores useless for a softmax loss, each sentence with its cure.

    Args:
        scores: Float[Q, C], as the loss will see them (after calibration).
        mask: Bool[Q, C], True keeps a candidate.
        temperature: The temperature of the loss.

    Returns:
        Sentences for a log, none if all is well: scores that are not finite, flat (at least half of the rows are
        nearly uniform, or all equal), or saturated (at least half of the rows are one-hot, or the scores are squeezed
        against 0 and 1 as after a sigmoid).
    """
    scores = scores.detach().float()
    keep = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    finite = scores.isfinite()
    warnings = []
    broken = int((keep & ~finite).sum())
    if broken:
        warnings.append(
            f"{broken} of {int(keep.sum())} teacher scores are not finite. Score these candidates again in float32, "
            "or remove them from the rows."
        )
    keep = keep & finite
    several = keep.sum(1) > 1
    if not bool(several.any()):
        return warnings
    scores, keep = scores[several].masked_fill(~keep[several], 0.0), keep[several]
    limit = torch.finfo(scores.dtype).max
    lowest, highest = scores.masked_fill(~keep, limit).min(1), scores.masked_fill(~keep, -limit).max(1)
    constant = float((lowest.values == highest.values).float().mean())

    inner = keep.clone()
    # Min-max and rank calibration put one candidate of a row at 0 and one at 1; only the others tell of a squeeze.
    inner.scatter_(1, lowest.indices[:, None], False).scatter_(1, highest.indices[:, None], False)
    values = scores[inner if bool(inner.any()) else keep & (scores != 0) & (scores != 1)]
    squeezed = float(((values < 0.01) | (values > 0.99)).float().mean()) if len(values) else 0.0
    if float(lowest.values.min()) >= 0 and float(highest.values.max()) <= 1 and constant < 0.5 <= squeezed:
        warnings.append(
            f"Teacher scores are saturated: {squeezed:.0%} lie within 0.01 of 0 or 1, as after a sigmoid. Store the "
            "raw logits (identity activation), or use the calibration 'z_norm' or 'rank'."
        )

    log_probabilities = masked_log_softmax(scores / temperature, keep)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(1)  # masked cells: 1 · 0
    share = entropy / keep.sum(1).float().log()
    flat, sure = float((share > 0.99).float().mean()), float((share < 0.01).float().mean())
    if constant >= 0.5:
        warnings.append(
            f"Teacher scores are flat: in {constant:.0%} of the rows all candidates have the "
            "same score. Check that the teacher is a trained ranker and reads the texts."
        )
    elif flat >= 0.5:
        warnings.append(
            f"Teacher scores are flat: {flat:.0%} of the rows are nearly uniform after the softmax (median entropy "
            f"{float(share.median()):.1%} of the maximum). Use the calibration 'z_norm', or a temperature below "
            f"{temperature:g} (cosine scores need about 0.05)."
        )
    if sure >= 0.5:
        warnings.append(
            f"Teacher scores are saturated: {sure:.0%} of the rows are one-hot after the softmax, so that nothing is "
            f"said about the other candidates. Use the calibration 'z_norm', or a temperature above {temperature:g}."
        )
    return warnings
