"""Probability loss: cross-entropy with the teacher's softened probabilities."""

from __future__ import annotations

from torch import Tensor

from .numerics import (
    check_shapes,
    full_precision,
    masked_log_softmax,
    masked_mean,
    rows_kept,
)


@full_precision
def probability_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    temperature: float = 4.0,
    epsilon: float = 1e-7,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy of the student, at temperature 1, with the teacher's distribution at temperature T.

    PROD's code (Lin et al., 2023), there for cross-encoder teachers:

    $$L = -\frac{1}{|Q|} \sum_i \sum_j \mathrm{softmax}(t_i / T)_j \, \log(\mathrm{softmax}(s_i)_j + \epsilon)$$

    The student is not softened and nothing is multiplied by T². ε bounds what a candidate that the student excludes
    can cost (16.1 for 1e-7), and its gradient with it.

    Args:
        student_scores: Float[Q, C].
        teacher_scores: Float[Q, C].
        temperature: T, of the teacher only.
        epsilon: ε.
        mask: Bool[Q, C], True keeps a candidate; rows without any leave the mean.

    Returns:
        A scalar.
    """
    check_shapes(student_scores, teacher_scores, mask)
    teacher = masked_log_softmax(teacher_scores / temperature, mask).exp()
    student = (masked_log_softmax(student_scores, mask).exp() + epsilon).log()
    products = teacher * student
    if mask is not None:
        products = products.masked_fill(~mask, 0.0)
    return -masked_mean(products.sum(-1), rows_kept(mask))
