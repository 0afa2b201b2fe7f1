"""Logit-MSE: the student copies the teacher's scores themselves."""

from __future__ import annotations

from torch import Tensor

from .numerics import check_shapes, full_precision, masked_mean, rows_kept


@full_precision
def logit_mse_loss(student_scores: Tensor, teacher_scores: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Half the mean square of the difference of two score matrices.

    Ba and Caruana, "Do Deep Nets Really Need to be Deep?" (2014), equation 2, with the mean and the factor of PROD's
    code (Lin et al., 2023):

    $$L = \frac{1}{2 |Q|} \sum_i \frac{1}{|C_i|} \sum_j (s_{ij} - t_{ij})^2$$

    Unlike a softmax it does not forgive another zero or scale: a teacher whose scores have another range needs a
    calibration.

    Args:
        student_scores: Float[Q, C].
        teacher_scores: Float[Q, C].
        mask: Bool[Q, C], True keeps a candidate; rows without any leave the mean.

    Returns:
        A scalar.
    """
    check_shapes(student_scores, teacher_scores, mask)
    gaps = student_scores - teacher_scores
    if mask is not None:
        gaps = gaps.masked_fill(~mask, 0.0)
    return 0.5 * masked_mean(masked_mean(gaps**2, mask, dim=1), rows_kept(mask))
