"""What all losses share: float32 arithmetic, softmax and means over the cells that a mask keeps."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor


F = TypeVar("F", bound=Callable)


def full_precision(function: F) -> F:
    """Runs a function of tensors outside autocast, with half-precision tensors raised to float32.

    float64 stays float64. Scores of a few hundred, as dot products have, are spaced by 1.0 in bfloat16: a softmax over
    them would be noise.
    """

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        device = tensors[0].device.type if tensors else "cpu"
        with torch.autocast(device_type=device, enabled=False):
            return function(*map(raise_half, args), **{name: raise_half(value) for name, value in kwargs.items()})

    return wrapper  # type: ignore[return-value]


def raise_half(value):
    """float16 and bfloat16 tensors as float32, anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4:
        return value.float()
    return value


def check_shapes(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> None:
    """Refuses matrices that broadcasting would silently stretch over each other.

    Raises:
        ValueError: If the shapes of `student` and `teacher` differ, or `mask` does not have their last two dimensions.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student's {tuple(student.shape)} and the teacher's {tuple(teacher.shape)} must have the same shape: "
            "one score of each model for every query and candidate."
        )
    check_mask(student, mask)


def check_mask(scores: Tensor, mask: Tensor | None) -> None:
    """Refuses a mask that is not boolean or not of the shape of `scores` (its last two dimensions).

    Raises:
        ValueError: Naming both shapes.
    """
    if mask is not None and (mask.dtype != torch.bool or mask.shape != scores.shape[-2:]):
        raise ValueError(
            f"The mask must be boolean with shape {tuple(scores.shape[-2:])} (True keeps a candidate), "
            f"not {mask.dtype} with shape {tuple(mask.shape)}."
        )


def _hidden(scores: Tensor) -> float:
    # Large enough that its exponential is 0, yet finite: infinities turn into NaN in gradients. Half of the smallest
    # number leaves room for the subtraction of the row's maximum.
    return torch.finfo(scores.dtype).min / 2


def masked_log_softmax(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """log softmax over the last dimension among the kept cells; 0 (not minus infinity) in the others.

    Args:
        scores: Float[..., C].
        mask: Bool[..., C], broadcastable to `scores`; True keeps.
    """
    if mask is None:
        return scores.log_softmax(-1)
    return scores.masked_fill(~mask, _hidden(scores)).log_softmax(-1).masked_fill(~mask, 0.0)


def masked_logsumexp(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """log of the sum of exponentials of the kept cells; a huge negative finite number where none is kept."""
    if mask is not None:
        scores = scores.masked_fill(~mask, _hidden(scores))
    return scores.logsumexp(-1)


def masked_mean(values: Tensor, keep: Tensor | None = None, dim: int | None = None) -> Tensor:
    """Mean of the kept `values` along `dim` (all of them if None); 0, with zero gradient, where nothing is kept.

    Args:
        values: Float tensor.
        keep: Bool tensor of the same shape.
        dim: Dimension that is averaged.
    """
    if keep is None:
        return values.mean() if dim is None else values.mean(dim)
    values = values.masked_fill(~keep, 0.0)
    if dim is None:
        return values.sum() / keep.sum().clamp(min=1)
    return values.sum(dim) / keep.sum(dim).clamp(min=1)


def kl_rows(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) over the last dimension, one number per row.

    Args:
        student: Float[..., C] scores, already divided by a temperature.
        teacher: Float[..., C].
        mask: Bool[..., C].
    """
    log_teacher = masked_log_softmax(teacher, mask)
    # Hidden cells have log-probability 0 on both sides, so that they leave this sum whatever their weight.
    return (log_teacher.exp() * (log_teacher - masked_log_softmax(student, mask))).sum(-1)


def column_pairs(scores: Tensor) -> Tensor:
    """Long[2, P]: the columns of every unordered pair of a row's cells, for Float[Q, C] scores."""
    columns = scores.shape[1]
    return torch.triu_indices(columns, columns, offset=1, device=scores.device)


def rows_kept(mask: Tensor | None) -> Tensor | None:
    """Bool[Q]: the rows of Bool[Q, C] `mask` with at least one kept cell; None without a mask."""
    return None if mask is None else mask.any(-1)


def at_target(values: Tensor, target: Tensor) -> Tensor:
    """Values at each row's target column; column 0 for rows whose target is -1 (for the caller to leave out).

    Args:
        values: Tensor[..., Q, C].
        target: Long[Q].
    """
    index = target.clamp(min=0).unsqueeze(-1).expand(*values.shape[:-1], 1)
    return values.gather(-1, index).squeeze(-1)


def target_rows(target: Tensor, mask: Tensor | None) -> Tensor:
    """Bool[Q]: rows with a known target (not -1) that the mask keeps."""
    known = target >= 0
    return known if mask is None else known & at_target(mask, target)


def sparse_rows(rows: Tensor, columns: Tensor, values: Tensor, height: int, width: int) -> Tensor:
    """A sparse matrix `[height, width]` from cells sorted by row, for products with dense ones."""
    if rows.device.type == "cpu" and not torch.backends.mkl.is_available():
        # Compressed rows are multiplied by MKL only.
        return torch.sparse_coo_tensor(torch.stack([rows, columns]), values, (height, width), is_coalesced=True)
    ends = torch.bincount(rows, minlength=height).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        starts = torch.cat([ends.new_zeros(1), ends])
        return torch.sparse_csr_tensor(starts, columns, values, (height, width), check_invariants=False)
