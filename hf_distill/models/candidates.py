"""Which passages a query is compared with: its own, those of its process, or those of all processes.

The layout is fixed: a batch of Q queries with M passages each has its passages row-major, the positive of row i at
column 0 of its own candidates, at column i·M of the process and at column (r·Q + i)·M over all processes, where r is
the rank. Student and teachers use the same functions, so their score matrices agree cell by cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ..distributed import gather_rows
from ..losses.false_negatives import known_negatives_mask


CANDIDATES = ("own", "in_batch", "global")


class Comparison(Protocol):
    """How embeddings are compared, in float32: a [`DenseRetriever`], or a teacher whose embeddings are cached."""

    def similarity_scores(self, query: torch.Tensor, passage: torch.Tensor) -> torch.Tensor:
        """`[Q, D]` and `[C, D]` to scores `[Q, C]`."""

    def own_scores(self, query: torch.Tensor, passage: torch.Tensor) -> torch.Tensor:
        """`[Q, D]` and `[Q, M, D]` to scores `[Q, M]`."""


def arrange(query: torch.Tensor, passage: torch.Tensor, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Puts what is known of the distinct texts of a batch (`[T, ...]` each) into the fixed layout: `[Q, ...]` and
    `[Q, M, ...]`."""
    rows, width = batch["passage_ids"].shape
    passage = take_rows(passage, batch["passage_index"])
    return take_rows(query, batch["query_index"]), passage.unflatten(0, (rows, width))


def take_rows(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`tensor[index]` along the first dimension; where that is another order of all rows, with a cheaper gradient.

    On CPUs the gradient of an index begins with zeros in the shape of `tensor` and adds to them row by row.
    """
    on_cpu = tensor.requires_grad and tensor.device.type == "cpu"
    if on_cpu and len(index) == len(tensor) == len(index.unique()):
        return _Reordered.apply(tensor, index)
    return tensor[index]


class _Reordered(torch.autograd.Function):
    """The rows of a tensor in another order."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        return tensor[index]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad[index.argsort()], None


def candidate_scores(
    comparison: Comparison, query: torch.Tensor, passage: torch.Tensor, candidates: str
) -> torch.Tensor:
    """Scores of every query with its candidates, in float32.

    Args:
        comparison: Compares embeddings.
        query: `[Q, D]`, one row a query.
        passage: `[Q, M, D]`, the row's own candidates, the positive first.
        candidates: `"own"` gives `[Q, M]`, `"in_batch"` `[Q, Q·M]`, `"global"` `[W·Q, W·Q·M]`, W being the number of
            processes.
    """
    if candidates == "own":
        return comparison.own_scores(query, passage)
    flat = passage.flatten(0, 1)
    if candidates == "global":
        query, flat = gather_rows(query), gather_rows(flat)
    return comparison.similarity_scores(query, flat)


def candidate_layout(
    batch: Mapping[str, Any], candidates: str, mask_false_negatives: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The column of each query's positive, and which cells count.

    Returns:
        `target` (`[Q]` or `[W·Q]`, −1 where the row has no known positive) and `keep` (boolean, the shape of the
        scores, or None when every cell counts). A cell does not count when its passage is another known positive of
        the query or a copy of a passage that stands before it.
    """
    target, passage_ids, positive_ids = batch["target"], batch["passage_ids"], batch["positive_ids"]
    if candidates != "own":
        if candidates == "global":
            target, passage_ids, positive_ids = map(gather_rows, (target, passage_ids, positive_ids))
        rows, width = passage_ids.shape
        first_columns = torch.arange(rows, device=target.device) * width
        target = torch.where(target >= 0, first_columns + target, target)
        passage_ids = passage_ids.flatten()
    if not mask_false_negatives:
        return target, None
    return target, known_negatives_mask(passage_ids, positive_ids, target)
