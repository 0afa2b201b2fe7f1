"""Kullback-Leibler divergence between the rankings of teacher and student."""

from __future__ import annotations

from torch import Tensor

from .numerics import check_shapes, full_precision, kl_rows, masked_mean, rows_kept


@full_precision
def kl_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    temperature: float = 1.0,
    scale_by_temperature: bool = False,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Mean over queries of KL(teacher || student) between softmax distributions over the candidates.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015); over the candidates of a query as
    in PROD (Lin et al., 2023) and LED (Zhang et al., 2023):

    $$L = \frac{1}{|Q|} \sum_i \sum_j p_{ij} \log \frac{p_{ij}}{q_{ij}}, \quad
      p_i = \mathrm{softmax}(t_i / T), \quad q_i = \mathrm{softmax}(s_i / T)$$

    Args:
        student_scores: Float[Q, C].
        teacher_scores: Float[Q, C], the reference distribution. Gradients reach it if it requires them.
        temperature: T; larger values soften both distributions.
        scale_by_temperature: Multiply by T², which keeps the size of the gradients when T changes.
        mask: Bool[Q, C], True keeps a candidate; rows without any leave the mean.

    Returns:
        A scalar.
    """
    check_shapes(student_scores, teacher_scores, mask)
    rows = kl_rows(student_scores / temperature, teacher_scores / temperature, mask)
    loss = masked_mean(rows, rows_kept(mask))
    return loss * temperature**2 if scale_by_temperature else loss
