"""MaxSim: the score of multi-vector models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .numerics import full_precision, sparse_rows


# Similarities that are held at once; queries are taken in blocks below it (256 MiB in float32).
_CELLS = 2**26


@full_precision
def maxsim(
    query_tokens: Tensor, passage_tokens: Tensor, passage_mask: Tensor, query_mask: Tensor | None = None
) -> Tensor:
    r"""Sum over query tokens of the best similarity with a token of the passage.

    Khattab and Zaharia, "ColBERT: Efficient and Effective Passage Search via Contextualized Late Interaction over
    BERT" (2020), equation 3:

    $$s_{ij} = \sum_{l} \max_{m \in d_j} \langle q_{il}, d_{jm} \rangle$$

    Args:
        query_tokens: Float[Q, Lq, D].
        passage_tokens: Float[C, Ld, D].
        passage_mask: Bool or integer [C, Ld], true for tokens that count. A passage without any scores 0.
        query_mask: Bool or integer [Q, Lq]; without it every position counts, as in ColBERT's query augmentation.

    Returns:
        Float[Q, C].
    """
    keep = passage_mask.bool()
    scores = _Best.apply(query_tokens, passage_tokens, keep).masked_fill(~keep.any(-1), 0.0)
    if query_mask is not None:
        scores = scores.masked_fill(~query_mask.bool()[..., None], 0.0)
    return scores.sum(1)


@full_precision
def own_maxsim(
    query_tokens: Tensor, passage_tokens: Tensor, passage_mask: Tensor, query_mask: Tensor | None = None
) -> Tensor:
    """[`maxsim`] of each query with its own passages only.

    Args:
        query_tokens: Float[Q, Lq, D].
        passage_tokens: Float[Q, M, Ld, D].
        passage_mask: Bool or integer [Q, M, Ld].
        query_mask: Bool or integer [Q, Lq].

    Returns:
        Float[Q, M].
    """
    keep = passage_mask.bool()
    similarities = passage_tokens.flatten(1, 2) @ query_tokens.transpose(1, 2)  # [Q, M*Ld, Lq]
    hidden = torch.finfo(query_tokens.dtype).min / 2
    best = similarities.unflatten(1, keep.shape[1:]).masked_fill(~keep[..., None], hidden).amax(2)  # [Q, M, Lq]
    best = best.masked_fill(~keep.any(-1)[..., None], 0.0)
    if query_mask is not None:
        best = best.masked_fill(~query_mask.bool()[:, None], 0.0)
    return best.sum(-1)


class _Best(torch.autograd.Function):
    """The best similarity `[Q, Lq, C]` of each query token with a token of each passage.

    Of the similarities only the best one's place is remembered. Its gradient flows into that one pair of tokens, so
    the backward pass is two products with a matrix that has one cell for each query token and passage.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, passage: Tensor, keep: Tensor) -> Tensor:
        flat = passage.flatten(0, 1)
        hidden = torch.finfo(query.dtype).min / 2
        block = max(1, _CELLS // max(1, query.shape[1] * len(flat)))
        values, places = [], []
        for queries in query.split(block):
            similarities = (queries @ flat.T).unflatten(-1, keep.shape)  # [block, Lq, C, Ld]
            best = similarities.masked_fill_(~keep, hidden).max(-1)
            values.append(best.values)
            places.append(best.indices.to(torch.int32))
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query, passage, torch.cat(places))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, passage, places = ctx.saved_tensors
        passages, length, _ = passage.shape
        tokens = query.shape[0] * query.shape[1]
        of_query = torch.arange(tokens, device=grad.device).repeat_interleave(passages)
        of_passage = (places.long() + torch.arange(passages, device=grad.device) * length).flatten()
        values = grad.flatten()
        grad_query = grad_passage = None
        if ctx.needs_input_grad[0]:
            cells = sparse_rows(of_query, of_passage, values, tokens, passages * length)
            grad_query = (cells @ passage.flatten(0, 1)).view_as(query)
        if ctx.needs_input_grad[1]:
            order = of_passage.argsort(stable=True)
            cells = sparse_rows(of_passage[order], of_query[order], values[order], passages * length, tokens)
            grad_passage = (cells @ query.flatten(0, 1)).view_as(passage)
        return grad_query, grad_passage, None
