"""FLOPS: the sparsity of lexical representations."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hf_distill.losses.numerics import full_precision, masked_mean


@full_precision
def flops_loss(
    representations: Tensor,
    *,
    mask: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    r"""Sum over the vocabulary of the squared mean activation: the expected cost of an inverted index.

    Paria et al., "Minimizing FLOPs to Learn Efficient Sparse Representations" (2020), equation 3:

    $$L = \sum_v \Big( \frac{1}{R} \sum_i |w_{iv}| \Big)^2$$

    Args:
        representations: Float[R, V], one row of term weights for each text.
        mask: Bool[R], True keeps a row.
        reduce: Averages the Float[V] column means over processes (with gradients) before they are squared.

    Returns:
        A scalar.
    """
    keep = None if mask is None else mask[:, None].expand_as(representations)
    means = masked_mean(representations.abs(), keep, dim=0)
    if reduce is not None:
        means = reduce(means)
    return (means**2).sum()
