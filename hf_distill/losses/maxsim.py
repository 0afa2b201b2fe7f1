"""MaxSim: the score of multi-vector models."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_distill.losses.numerics import full_precision


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
    empty = ~keep.any(-1)
    hidden = torch.finfo(query_tokens.dtype).min / 2
    flat = passage_tokens.flatten(0, 1)
    block = max(1, _CELLS // max(1, query_tokens.shape[1] * len(flat)))
    best = []
    for queries in query_tokens.split(block):
        similarities = (queries @ flat.T).unflatten(-1, keep.shape)  # [block, Lq, C, Ld]
        best.append(similarities.masked_fill(~keep, hidden).max(-1).values.masked_fill(empty, 0.0))
    scores = torch.cat(best)
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
