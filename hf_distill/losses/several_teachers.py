"""Several teachers as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .numerics import masked_log_softmax, raise_half


def mean_teacher(scores: Sequence[Tensor], temperature: float | None = None, mask: Tensor | None = None) -> Tensor:
    r"""Scores that stand for the mean of several teachers.

    With a temperature the mean is of their distributions, as in PROD's multi-teacher loss (Lin et al., 2023): the
    result t has softmax(t / T) = 1/K Σ softmax(t_k / T), so that every loss with that temperature follows the mean.
    Teachers whose scores have different ranges then count alike. Without one it is the mean of the scores.

    Args:
        scores: Float[Q, C] of each teacher.
        temperature: T of the loss that follows; None for a loss without a softmax.
        mask: Bool[Q, C], True keeps a candidate.

    Returns:
        Float[Q, C].
    """
    stacked = torch.stack([raise_half(one) for one in scores])
    if temperature is None:
        return stacked.mean(0)
    logs = torch.stack([masked_log_softmax(one / temperature, mask) for one in stacked])
    return temperature * (logs.logsumexp(0) - torch.log(torch.tensor(float(len(scores)), device=logs.device)))
