"""How the layers of a model become scores of queries with candidates, so that any two models can be compared by them.

Sun et al., "LEAD: Liberal Feature-based Distillation for Dense Retrieval" (2024, https://arxiv.org/abs/2212.05225):
every layer of a model ranks the same candidates, whatever its width, tokenizer or architecture. A layer is a
transformer block, numbered from 1; its feature is what the block puts out (without the final normalisation that some
families have after the last one). An archetype reads it as it reads its last one: a bi-encoder compares the layer's
pooled vectors (position 0 with CLS pooling), a multi-vector model its tokens by MaxSim, both raw and without
temperature; a ranker applies its head. Only what is compared is kept: one vector a text, the tokens of the chosen
layers, one number a pair.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..distributed import gather_rows
from ..errors import InputError
from ..losses.interaction_maps import interaction_maps


@contextlib.contextmanager
def block_outputs(blocks: nn.ModuleList, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Collects what chosen blocks put out while a backbone runs; the others' outputs are not held.

    Args:
        blocks: The backbone's list of blocks.
        layers: Their numbers, from 1.

    Yields:
        Hidden states `[t, l, H]` by number, filled in by the forward pass.
    """
    found: dict[int, torch.Tensor] = {}

    def keep(number: int):
        def hook(_module, _inputs, output):
            found[number] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [blocks[number - 1].register_forward_hook(keep(number)) for number in dict.fromkeys(layers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def check_layers(layers: Sequence[int], total: int, who: str) -> None:
    """Raises [`InputError`] for a layer number that a model of `total` layers does not have."""
    wrong = [number for number in layers if not 1 <= number <= total]
    if wrong:
        raise InputError(
            f"{who} has the layers 1 to {total}, not {wrong[0]}",
            where="layers",
            cure="Choose among these; layers are numbered from 1, and embeddings are no layer",
        )


def vector_layer_scores(query: torch.Tensor, passage: torch.Tensor, candidates: str) -> torch.Tensor:
    """Inner products of layers' vectors, float32.

    Args:
        query: `[Q, K, H]`.
        passage: `[Q, M, K, H]`, the row's own candidates.
        candidates: `"own"`, `"in_batch"` or `"global"`.

    Returns:
        `[K, Q, M]`, `[K, Q, Q·M]` or `[K, W·Q, W·Q·M]`.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, passage = query.float(), passage.float()
        if candidates == "own":
            return torch.einsum("qkh,qmkh->kqm", query, passage)
        passage = passage.flatten(0, 1)
        if candidates == "global":
            query, passage = gather_rows(query), gather_rows(passage)
        return query.transpose(0, 1) @ passage.permute(1, 2, 0)


@dataclass
class LayerTokens:
    """Hidden states of the tokens of a batch, in the fixed layout.

    Args:
        query: `[Q, K, Lq, H]`.
        passage: `[Q, M, K, Ld, H]`.
        query_mask: Boolean `[Q, Lq]`.
        passage_mask: Boolean `[Q, M, Ld]`.
    """

    query: torch.Tensor
    passage: torch.Tensor
    query_mask: torch.Tensor
    passage_mask: torch.Tensor

    def maps(self, like: LayerTokens, candidates: str) -> torch.Tensor:
        """The interaction maps `[K, Q, C, Lq, Ld]` of each layer, of the tokens that `like` counts.

        Args:
            like: Whose masks and lengths decide: the student's, for both sides of a comparison.
            candidates: `"own"` or `"in_batch"`.
        """
        query_length, passage_length = like.query_mask.shape[-1], like.passage_mask.shape[-1]
        query = self.query[:, :, :query_length].transpose(0, 1)[:, :, None]  # [K, Q, 1, Lq, H]
        passage, mask = self.passage[:, :, :, :passage_length].float(), like.passage_mask
        if candidates == "own":
            passage = passage.permute(2, 0, 1, 3, 4)  # [K, Q, M, Ld, H]
        else:
            passage = passage.flatten(0, 1).transpose(0, 1)[:, None]  # [K, 1, C, Ld, H]
            mask = mask.flatten(0, 1)[None]
        return interaction_maps(query.float(), passage, like.query_mask[:, None], mask)


def pad_tokens(tensor: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """`tensor` with zeros (False) after it up to `length` along `dim`."""
    missing = length - tensor.shape[dim]
    return F.pad(tensor, (0, 0) * (tensor.dim() - dim - 1) + (0, missing)) if missing else tensor
