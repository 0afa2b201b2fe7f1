"""Decoupled knowledge distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from .numerics import (
    at_target,
    check_shapes,
    full_precision,
    kl_rows,
    masked_log_softmax,
    masked_logsumexp,
    masked_mean,
    target_rows,
)


@full_precision
def dkd_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    r"""KL distillation split in *how sure of the positive* and *how the negatives are ordered*, each with its weight.

    Zhao et al., "Decoupled Knowledge Distillation" (2022), equation 7, times T² and averaged over queries as in PROD
    (Lin et al., 2023):

    $$L = \frac{T^2}{|Q|} \sum_i \alpha \, \mathrm{KL}(b^t_i \| b^s_i)
      + \beta \, \mathrm{KL}(\hat p^t_i \| \hat p^s_i)$$

    where b is the pair of probabilities {positive, all others} and p̂ the softmax over the others alone, both at
    temperature T.

    Args:
        student_scores: Float[Q, C].
        teacher_scores: Float[Q, C].
        target: Long[Q], the positive's column; rows with -1 leave the mean.
        alpha: Weight of the positive's term.
        beta: Weight of the negatives' term.
        temperature: T.
        mask: Bool[Q, C], True keeps a candidate. A row whose target is masked leaves the mean.

    Returns:
        A scalar.
    """
    check_shapes(student_scores, teacher_scores, mask)
    student, teacher = student_scores / temperature, teacher_scores / temperature
    columns = torch.arange(student.shape[1], device=student.device)
    others = columns != target.clamp(min=0)[:, None]
    if mask is not None:
        others = others & mask

    def pair(scores: Tensor) -> tuple[Tensor, Tensor]:
        """log-probabilities of the positive and of all others together."""
        others_together = masked_logsumexp(scores, others) - masked_logsumexp(scores, mask)
        return at_target(masked_log_softmax(scores, mask), target), others_together

    (student_yes, student_no), (teacher_yes, teacher_no) = pair(student), pair(teacher)
    positive = teacher_yes.exp() * (teacher_yes - student_yes) + teacher_no.exp() * (teacher_no - student_no)
    rows = alpha * positive + beta * kl_rows(student, teacher, others)
    return masked_mean(rows, target_rows(target, mask)) * temperature**2
