"""Embedding-MSE: the student's vectors copy the teacher's."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize as unit_length

from .numerics import full_precision, masked_mean


@full_precision
def embedding_mse_loss(
    student: Tensor, teacher: Tensor, normalize: bool = False, *, mask: Tensor | None = None
) -> Tensor:
    r"""Mean over texts and dimensions of the squared difference of two embeddings.

    Reimers and Gurevych, "Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation" (2020),
    equation 1, with the mean over dimensions that sentence-transformers takes:

    $$L = \frac{1}{|T| D} \sum_i \lVert e_i - \hat e_i \rVert^2$$

    Args:
        student: Float[T, D], projected to the teacher's dimension where the two differ.
        teacher: Float[T, D].
        normalize: Bring both to unit length first, so that only directions count.
        mask: Bool[T], True keeps a text.

    Returns:
        A scalar.

    Raises:
        ValueError: If the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student's embeddings {tuple(student.shape)} and the teacher's {tuple(teacher.shape)} must have the "
            "same shape. Project the student to the teacher's dimension."
        )
    if mask is not None:
        student, teacher = (rows.masked_fill(~mask[:, None], 0.0) for rows in (student, teacher))
    if normalize:
        student, teacher = unit_length(student, dim=-1), unit_length(teacher, dim=-1)
    return masked_mean(((student - teacher) ** 2).mean(-1), mask)
