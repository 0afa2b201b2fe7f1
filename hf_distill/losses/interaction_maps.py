"""Token interaction maps: which tokens of a passage each token of its query looks at, layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .numerics import full_precision


# What hides a cell of a map before its softmax, as in the original.
_HIDDEN = -1e9


@full_precision
def interaction_maps(query: Tensor, passage: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
    """Softmax over a passage's tokens of their inner products with each token of the query.

    Cells outside of the texts are hidden first, so that the row of a padding token is uniform; it is the same in any
    two models' maps of the same texts and adds nothing to their difference.

    Args:
        query: Float[..., Lq, H].
        passage: Float[..., Ld, H], broadcastable to `query` before the last two dimensions.
        query_mask: Bool[..., Lq].
        passage_mask: Bool[..., Ld].

    Returns:
        Float[..., Lq, Ld].
    """
    keep = query_mask.bool()[..., :, None] & passage_mask.bool()[..., None, :]
    return (query @ passage.transpose(-1, -2)).masked_fill(~keep, _HIDDEN).softmax(-1)


@full_precision
def interaction_map_loss(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    r"""Squared differences of interaction maps, summed over the tokens' cells, mean over layers and pairs.

    Li et al., "VIRT: Improving Representation-based Text Matching via Virtual Interaction" (2022,
    https://arxiv.org/abs/2112.04195), between layers of any two models that read the same tokens, as the code of LEAD
    has it for its comparison:

    $$L = \frac{1}{K |Q| |C|} \sum_k \sum_{ij} \lVert A^k_{ij} - B^k_{ij} \rVert^2$$

    Args:
        student_maps: Float[K, Q, C, Lq, Ld].
        teacher_maps: The same shape.

    Returns:
        A scalar.

    Raises:
        ValueError: If the shapes differ.
    """
    if student_maps.shape != teacher_maps.shape:
        raise ValueError(
            f"The student's maps {tuple(student_maps.shape)} and the teacher's {tuple(teacher_maps.shape)} must have "
            "the same shape: the same layers, texts and tokens."
        )
    return torch.sum((student_maps - teacher_maps) ** 2) / student_maps.shape[:3].numel()
