"""LEAD's alignment of layers through the rankings that each layer makes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .numerics import (
    at_target,
    check_shapes,
    full_precision,
    kl_rows,
    masked_log_softmax,
    masked_mean,
    rows_kept,
    target_rows,
)


@full_precision
def layer_alignment_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    target: Tensor,
    layer_temperature: float = 10.0,
    reweight: bool = True,
    *,
    mask: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    r"""KL(teacher's layer || student's layer) over the candidates, summed over pairs of layers.

    Sun et al., "LEAD: Liberal Feature-based Distillation for Dense Retrieval" (2024). Pair k counts the more, the
    better the teacher's layer ranks the positive:

    $$L = \sum_k w_k \frac{1}{|Q|} \sum_i \mathrm{KL}(\mathrm{softmax}(t^k_i) \| \mathrm{softmax}(s^k_i)), \quad
      w = \mathrm{softmax}_k(-\ell_k / \tau)$$

    with ℓ_k the contrastive loss of the teacher's layer k; w carries no gradient. Gradients reach the teacher's scores
    if they require them, as in joint training.

    Args:
        student_scores: Float[K, Q, C], one matrix for each chosen layer.
        teacher_scores: Float[K, Q, C].
        target: Long[Q], the positive's column; rows with -1 have no say in the weights.
        layer_temperature: τ.
        reweight: False takes the plain sum over layers (all weights 1), as the original does.
        mask: Bool[Q, C], True keeps a candidate, in all layers.
        reduce: Sums a tensor over processes, where each has other rows: the weights are then those of all rows.

    Returns:
        A scalar.
    """
    check_shapes(student_scores, teacher_scores, mask)
    keep = rows_kept(mask)
    divergences = torch.stack(
        [masked_mean(kl_rows(*layers, mask), keep) for layers in zip(student_scores, teacher_scores)]
    )
    if not reweight:
        return divergences.sum()
    with torch.no_grad():
        rows = -at_target(masked_log_softmax(teacher_scores, mask), target)
        labelled = target_rows(target, mask).expand_as(rows)
        totals, counts = rows.masked_fill(~labelled, 0.0).sum(1), labelled.sum(1)
        if reduce is not None:
            totals, counts = reduce(totals), reduce(counts)
        weights = (-totals / counts.clamp(min=1) / layer_temperature).softmax(0)
    return (weights * divergences).sum()
