"""Candidates that are known not to be negatives of a query."""

from __future__ import annotations

import torch
from torch import Tensor


def known_negatives_mask(passage_ids: Tensor, positive_ids: Tensor | None, target: Tensor) -> Tensor:
    """True for the candidates that a query may be contrasted with, and for its target.

    Left out of a row are the known positives of its query other than the target, and all but the first column of a
    repeated passage. The target's column always stays; then the other copies of its passage go.

    Args:
        passage_ids: Long[C], the candidates that all queries share, or Long[Q, M], each query's own; -1 marks a column
            without a passage, which is left out.
        positive_ids: Long[Q, P], every known positive of each query, padded with -1; None masks repetitions only.
        target: Long[Q], the column of the positive, -1 where none is known.

    Returns:
        Bool[Q, C] (or [Q, M]) for the `mask` of any loss.
    """
    queries = len(target)
    keep = first_occurrences(passage_ids) & (passage_ids >= 0)
    ids = passage_ids.expand(queries, passage_ids.shape[-1])
    keep = keep.expand_as(ids)
    if positive_ids is not None and positive_ids.shape[1] > 0:
        # A binary search in each row's sorted positives needs Q·C memory; comparing all with all needs Q·C·P.
        positives = positive_ids.sort(dim=1).values
        place = torch.searchsorted(positives, ids.contiguous()).clamp(max=positives.shape[1] - 1)
        keep = keep & (positives.gather(1, place) != ids)
    column = target.clamp(min=0)[:, None]
    known = (target >= 0)[:, None]
    keep = keep & ~((ids == ids.gather(1, column)) & known)
    columns = torch.arange(ids.shape[1], device=ids.device)
    return keep | ((columns == column) & known)


def first_occurrences(ids: Tensor) -> Tensor:
    """True where an id stands for the first time in its row.

    Args:
        ids: Long[..., C].

    Returns:
        Bool[..., C].
    """
    values, order = ids.sort(dim=-1, stable=True)
    first = torch.ones_like(values, dtype=torch.bool)
    first[..., 1:] = values[..., 1:] != values[..., :-1]
    return torch.zeros_like(first).scatter(-1, order, first)
