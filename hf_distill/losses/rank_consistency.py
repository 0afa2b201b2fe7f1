"""LED's pairwise loss: do not order two candidates the other way round than the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from .numerics import check_shapes, column_pairs, full_precision, masked_mean


@full_precision
def ordered_pairs(
    student_scores: Tensor,
    teacher_scores: Tensor,
    include_positive: bool = True,
    margin: float = 0.0,
    min_teacher_gap: float = 0.0,
    *,
    target: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The pairs that [`rank_consistency_loss`] is a mean over, Bool[Q, P], from the same arguments."""
    keep = torch.ones_like(teacher_scores, dtype=torch.bool) if mask is None else mask
    # A masked cell may hold NaN.
    teacher_scores = teacher_scores.masked_fill(~keep, 0.0)
    if not include_positive:
        columns = torch.arange(keep.shape[1], device=keep.device)
        keep = keep & (columns != (0 if target is None else target[:, None]))
    a, b = column_pairs(teacher_scores)
    return keep[:, a] & keep[:, b] & ((teacher_scores[:, a] - teacher_scores[:, b]).abs() >= min_teacher_gap)


@full_precision
def rank_consistency_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    include_positive: bool = True,
    margin: float = 0.0,
    min_teacher_gap: float = 0.0,
    *,
    target: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Hinge on the student's difference for every pair of candidates that the teacher puts in an order.

    Zhang et al., "LED: Lexicon-Enlightened Dense Retriever for Large-Scale Retrieval" (2023):

    $$L = \frac{1}{|P|} \sum_{(i, a, b) \in P} \max(0, m - (s_{ia} - s_{ib})), \quad
      P = \{(i, a, b) : t_{ia} - t_{ib} \ge g\}$$

    The mean runs over the pooled pairs of all queries, not first within each query. Each unordered pair counts once;
    where the teacher ties, the candidate in the earlier column counts as the better one.

    Args:
        student_scores: Float[Q, C], each query's own candidates.
        teacher_scores: Float[Q, C].
        include_positive: False leaves the positive out of the pairs.
        margin: m, in units of the student's scores; 0 punishes inversions alone.
        min_teacher_gap: g, in units of the teacher's scores: pairs closer than this do not count.
        target: Long[Q], the positive's column, -1 for a query without a known positive; by default column 0.
        mask: Bool[Q, C], True keeps a candidate; a pair needs both.

    Returns:
        A scalar; 0 if there is no pair.
    """
    check_shapes(student_scores, teacher_scores, mask)
    if mask is not None:
        # Emptied first: a masked cell may hold NaN, which would survive the multiplication with a zero gradient.
        student_scores = student_scores.masked_fill(~mask, 0.0)
        teacher_scores = teacher_scores.masked_fill(~mask, 0.0)
    pairs = ordered_pairs(
        student_scores, teacher_scores, include_positive, margin, min_teacher_gap, target=target, mask=mask
    )
    a, b = column_pairs(student_scores)
    gaps = teacher_scores[:, a] - teacher_scores[:, b]
    differences = torch.where(gaps >= 0, 1.0, -1.0) * (student_scores[:, a] - student_scores[:, b])
    return masked_mean(torch.relu(margin - differences), pairs)
