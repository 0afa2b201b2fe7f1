"""FLOPS: the sparsity of lexical representations."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .numerics import full_precision, masked_mean


@full_precision
def flops_loss(
    representations: Tensor,
    *,
    mask: Tensor | None = None,
    counts: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    r"""Sum over the vocabulary of the squared mean activation: the expected cost of an inverted index.

    Paria et al., "Minimizing FLOPs to Learn Efficient Sparse Representations" (2020), equation 3:

    $$L = \sum_v \Big( \frac{1}{R} \sum_i |w_{iv}| \Big)^2$$

    Args:
        representations: Float[R, V], one row of term weights for each text.
        mask: Bool[R], True keeps a row.
        counts: Number[R], how many texts each row stands for, instead of `mask`.
        reduce: Averages the Float[V] column means over processes (with gradients) before they are squared.

    Returns:
        A scalar.
    """
    if counts is not None:
        counts = counts.to(representations.dtype)
        means = counts @ representations.abs() / counts.sum().clamp(min=1)
    else:
        keep = None if mask is None else mask[:, None].expand_as(representations)
        means = masked_mean(representations.abs(), keep, dim=0)
    if reduce is not None:
        means = reduce(means)
    return (means**2).sum()


def sparsity_loss(
    query: Tensor,
    passage: Tensor,
    of: str = "both",
    query_ratio: float = 0.75,
    positives_apart: bool = False,
    *,
    query_counts: Tensor | None = None,
    passage_counts: Tensor | None = None,
    negative_counts: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    r"""The regulariser of a lexical retriever: FLOPS of passages and of queries.

    $$L = F(d) + r F(q)$$

    as LexMAE weighs them (r = 0.75; LED's weights 8e-4 and 6e-4 are in the same ratio).

    Args:
        query: Float[R, V], weights of the terms of the queries.
        passage: Float[R', V], those of the passages.
        of: `"both"`, or `"passage"` or `"query"` for one of the two alone, for weights of their own.
        query_ratio: r.
        positives_apart: F of the positives plus F of each query's first negative, instead of F of all passages
            (LexMAE's `strengthen_lambda`, which its recipe leaves off).
        query_counts: How many texts each row of `query` stands for; 1 by default.
        passage_counts: The same for `passage`; with `positives_apart`, as a positive.
        negative_counts: With `positives_apart`, how often each row of `passage` is a first negative.
        reduce: Averages column means over processes, see [`flops_loss`].

    Returns:
        A scalar.

    Raises:
        ValueError: If `of` is none of these, or `positives_apart` comes without counts.
    """
    if of not in ("both", "passage", "query"):
        raise ValueError(f"of is {of!r}; it can be 'both', 'passage' or 'query'.")
    groups = [passage_counts, negative_counts] if positives_apart else [passage_counts]
    if positives_apart and any(counts is None for counts in groups):
        raise ValueError("positives_apart needs passage_counts and negative_counts.")
    passages = sum(flops_loss(passage, counts=counts, reduce=reduce) for counts in groups if of != "query")
    if of == "passage":
        return passages
    queries = flops_loss(query, counts=query_counts, reduce=reduce)
    return queries if of == "query" else passages + query_ratio * queries
