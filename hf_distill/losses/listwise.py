"""Two more ways in which LED's code compares a student's list of scores with a teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from .numerics import (
    check_shapes,
    column_pairs,
    full_precision,
    masked_log_softmax,
    masked_mean,
    rows_kept,
)


@full_precision
def listnet_loss(
    student_scores: Tensor, teacher_scores: Tensor, temperature: float = 1.0, *, mask: Tensor | None = None
) -> Tensor:
    r"""Mean over queries of the cross-entropy between the teacher's and the student's distributions.

    Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach" (2007). Its gradient in the student is
    that of [`kl_loss`]; its value also holds the teacher's entropy, and the gradient in a trained teacher differs.

    $$L = -\frac{1}{|Q|} \sum_i \sum_j p_{ij} \log q_{ij}$$

    Args:
        student_scores: Float[Q, C].
        teacher_scores: Float[Q, C].
        temperature: Both are divided by it before the softmax.
        mask: Bool[Q, C], True keeps a candidate; rows without any leave the mean.

    Returns:
        A scalar.
    """
    check_shapes(student_scores, teacher_scores, mask)
    shares = masked_log_softmax(teacher_scores / temperature, mask).exp()
    rows = -(shares * masked_log_softmax(student_scores / temperature, mask)).sum(-1)
    return masked_mean(rows, rows_kept(mask))


def candidate_pairs(
    student_scores: Tensor, teacher_scores: Tensor, softmax: bool = True, *, mask: Tensor | None = None
) -> Tensor:
    """The pairs that [`pairwise_margin_mse_loss`] is a mean over, Bool[Q, P], from the same arguments."""
    a, b = column_pairs(student_scores)
    if mask is None:
        mask = torch.ones_like(student_scores, dtype=torch.bool)
    return mask[:, a] & mask[:, b]


@full_precision
def pairwise_margin_mse_loss(
    student_scores: Tensor, teacher_scores: Tensor, softmax: bool = True, *, mask: Tensor | None = None
) -> Tensor:
    r"""Mean squared difference of the margins of all pairs of candidates, the positive's or not.

    $$L = \frac{1}{|P|} \sum_{(i, a, b) \in P} \big((u_{ia} - u_{ib}) - (v_{ia} - v_{ib})\big)^2, \quad a < b$$

    with u and v the softmax of student's and teacher's scores, as in LED's code, or the scores themselves.

    Args:
        student_scores: Float[Q, C].
        teacher_scores: Float[Q, C].
        softmax: Compare shares of the softmax, which are bounded, instead of scores.
        mask: Bool[Q, C], True keeps a candidate; a pair needs both.

    Returns:
        A scalar; 0 if there is no pair.
    """
    check_shapes(student_scores, teacher_scores, mask)
    if softmax:
        gaps = masked_log_softmax(student_scores, mask).exp() - masked_log_softmax(teacher_scores, mask).exp()
    else:
        gaps = student_scores - teacher_scores
    if mask is not None:
        gaps = gaps.masked_fill(~mask, 0.0)
    a, b = column_pairs(gaps)
    return masked_mean((gaps[:, a] - gaps[:, b]) ** 2, candidate_pairs(student_scores, teacher_scores, mask=mask))
