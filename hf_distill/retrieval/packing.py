"""Faster forms of a transformer's layers on CPUs, for inference only."""

from __future__ import annotations

import functools
import platform

import torch
import torch.nn.functional as F
from torch import nn


# Smaller layers gain nothing.
_SMALLEST = 64
# Bytes of attention scores that are worked on at once.
_SCORES_IN_CACHE = 2 << 20


class PackedLinear(nn.Linear):
    """A linear layer whose weights are also held in the layout that oneDNN multiplies in.

    torch reorders a weight at every call (or, in float32, calls a library that is slow on some processors); here it
    is done once. `weight` and `bias` stay those of the layer that it replaces.

    Args:
        layer: The layer.
        rows: How many rows an input will have, about: the layout depends on it, the result does not.
        gelu: `"none"` or `"tanh"` to apply GELU (exact or its tanh form) in the same pass; None to apply nothing.
    """

    def __init__(self, layer: nn.Linear, rows: int, gelu: str | None = None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
        self._constant = None if layer.bias is None else layer.bias.detach()
        self._operation = ("none", "") if gelu is None else ("gelu", gelu)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        name, algorithm = self._operation
        return torch.ops.mkldnn._linear_pointwise(hidden, self._packed, self._constant, name, [], algorithm)


def pack_linears(model: nn.Module, rows: int) -> int:
    """Replaces the linear layers of an inference copy in place, where that is possible; returns how many.

    Args:
        model: A model on the CPU that will not be trained.
        rows: How many tokens a batch has, about.
    """
    count = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            # Exactly this class: subclasses (quantised or adapted layers, say) compute something else.
            if type(child) is not nn.Linear or min(child.in_features, child.out_features) < _SMALLEST:
                continue
            if child.weight.device.type != "cpu" or not packing_works(child.weight.dtype):
                continue
            gelu = _following_gelu(module) if name == "dense" else None
            setattr(module, name, PackedLinear(child, rows, gelu))
            if gelu is not None:
                module.intermediate_act_fn = nn.Identity()
            count += 1
    return count


def _following_gelu(module: nn.Module) -> str | None:
    """The form of the GELU after `dense` in the intermediate layer of BERT and its family."""
    activation = getattr(module, "intermediate_act_fn", None)
    if type(activation) is nn.GELU:
        return activation.approximate
    # transformers' GELUActivation calls torch's exact GELU unless it was asked for a slow Python one.
    if type(activation).__name__ == "GELUActivation" and getattr(activation, "act", None) is F.gelu:
        return "none"
    return None


@functools.cache
def packing_works(dtype: torch.dtype) -> bool:
    """Whether this build of torch on this processor has the packed kernels and they compute the right thing."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(_SMALLEST, _SMALLEST)
    with torch.inference_mode():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / 8)
        layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator))
        layer = layer.to(dtype)
        hidden = torch.randn(3, 5, _SMALLEST, generator=generator).to(dtype)
        close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
        try:
            for gelu in (None, "none", "tanh"):
                expected = layer(hidden) if gelu is None else F.gelu(layer(hidden).float(), approximate=gelu)
                if not torch.allclose(PackedLinear(layer, 16, gelu)(hidden).float(), expected.float(), **close):
                    return False
        except (AttributeError, RuntimeError, TypeError):
            return False
    return True


@functools.cache
def register_matmul_attention() -> str:
    """Makes `matmul_attention` known to transformers; returns its name there."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    name = "hf_distill_matmul"
    AttentionInterface.register(name, matmul_attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def matmul_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention as two matrix products and a softmax (which sums in float32 whatever the precision).

    Args:
        module: The attention layer.
        query: `[b, heads, l, d]`; `key` and `value` alike.
        key: Keys.
        value: Values.
        attention_mask: Boolean (True = attend) or additive, broadcastable to `[b, heads, l, l]`.
        dropout: 0; this is for inference.
        scaling: What scores are multiplied by; 1/sqrt(d) by default.
        kwargs: What the fused attention of torch understands.

    Returns:
        `[b, l, heads, d]`, and None for the weights.
    """
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", False)
    unusual = key.shape[1] != query.shape[1] or any(
        kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache")
    )
    if unusual or (causal and attention_mask is None):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    batch, heads, length, size = query.shape
    query = query * (size**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        least = torch.finfo(query.dtype).min
        if attention_mask.dtype == torch.bool:
            # Added rather than filled in, which takes three times as long.
            attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill_(~attention_mask, least)
        else:
            attention_mask = attention_mask.clamp(min=least).to(query.dtype)
        if attention_mask.dim() == 4:
            attention_mask = attention_mask.expand(batch, -1, -1, -1)
    output = query.new_empty(batch, length, heads, value.shape[-1])
    # A few texts at a time: their scores stay in the processor's cache.
    step = max(1, _SCORES_IN_CACHE // (heads * length * key.shape[-2] * query.element_size()))
    for begin in range(0, batch, step):
        part = slice(begin, begin + step)
        scores = query[part] @ key[part].transpose(-1, -2)
        if attention_mask is not None:
            scores += attention_mask[part] if attention_mask.dim() == 4 else attention_mask
        output[part] = (scores.softmax(-1) @ value[part]).transpose(1, 2)
    return output, None
