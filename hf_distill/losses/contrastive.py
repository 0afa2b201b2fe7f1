"""Contrastive loss: the positive against the other candidates."""

from __future__ import annotations

from torch import Tensor

from .numerics import (
    at_target,
    check_mask,
    full_precision,
    masked_log_softmax,
    masked_mean,
    target_rows,
)


@full_precision
def contrastive_loss(scores: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Mean over queries of the negative log-probability of the positive among its candidates.

    InfoNCE with in-batch negatives, as in Karpukhin et al., "Dense Passage Retrieval for Open-Domain Question
    Answering" (2020), equation 2:

    $$L = -\frac{1}{|Q|} \sum_i \log \frac{e^{s_{i, y_i}}}{\sum_j e^{s_{ij}}}$$

    Args:
        scores: Float[Q, C], the student's scores, already divided by its temperature.
        target: Long[Q], the column of each query's positive; -1 where none is known (the row leaves the mean).
        mask: Bool[Q, C], True keeps a candidate. A row whose target is masked leaves the mean.

    Returns:
        A float32 (float64 for float64 scores) scalar; 0 if no row has a target.
    """
    check_mask(scores, mask)
    losses = -at_target(masked_log_softmax(scores, mask), target)
    return masked_mean(losses, target_rows(target, mask))
