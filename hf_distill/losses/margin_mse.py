"""Margin-MSE: the student copies the teacher's differences between passages."""

from __future__ import annotations

import torch
from torch import Tensor

from .numerics import at_target, check_shapes, full_precision, masked_mean


@full_precision
def margin_mse_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    target: Tensor | None = None,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Mean squared difference between the margins of student and teacher.

    Hofstätter et al., "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation"
    (2020), equation 2, with any number of negatives per query:

    $$L = \frac{1}{|Q|} \sum_i \frac{1}{|N_i|} \sum_{j \in N_i}
      \big((s_{i0} - s_{ij}) - (t_{i0} - t_{ij})\big)^2$$

    Args:
        student_scores: Float[Q, C], the positive in column 0.
        teacher_scores: Float[Q, C].
        target: Long[Q], the column that the others are compared with, if not column 0. -1 stands for column 0: for a
            query without a known positive every pair with its first candidate teaches as well.
        mask: Bool[Q, C], True keeps a candidate. A row leaves the mean if its compared column, or
            all others, are masked.

    Returns:
        A scalar.
    """
    check_shapes(student_scores, teacher_scores, mask)
    if target is None:
        target = torch.zeros(len(student_scores), dtype=torch.long, device=student_scores.device)
    columns = torch.arange(student_scores.shape[1], device=student_scores.device)
    pairs = columns != target.clamp(min=0)[:, None]
    if mask is not None:
        pairs = pairs & mask & at_target(mask, target)[:, None]
    gaps = student_scores - teacher_scores
    # A masked cell may hold anything, also NaN: it is emptied before the arithmetic so that no NaN meets a zero.
    if mask is not None:
        gaps = gaps.masked_fill(~mask, 0.0)
    squares = (at_target(gaps, target)[:, None] - gaps) ** 2
    return masked_mean(masked_mean(squares, pairs, dim=1), pairs.any(1))
