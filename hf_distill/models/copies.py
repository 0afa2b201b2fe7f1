"""Copies of models that only compute, in another precision or elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .base import RetrievalModel, use_attention


def frozen_copy(model: RetrievalModel, dtype: torch.dtype, device: torch.device) -> RetrievalModel:
    """A copy for inference: the modules around the same tensors, or copies of those where something differs.

    Only the towers' parameters are converted: buffers (rotary frequencies, say) keep the precision that they were
    computed in, and projections run in float32 anyway.

    Args:
        model: The model, which stays as it is.
        dtype: Precision of the towers.
        device: Where the copy is to run.
    """
    memo: dict[int, Any] = {}
    in_towers = {id(parameter) for tower in model.towers.values() for parameter in tower.parameters()}
    for parameter in model.parameters():
        convert = id(parameter) in in_towers and parameter.is_floating_point()
        tensor = parameter.detach().to(device=device, dtype=dtype if convert else parameter.dtype)
        memo[id(parameter)] = nn.Parameter(_aligned(tensor), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = _aligned(buffer.detach().to(device))
    for shared in (model.tokenizer, model.source):
        memo[id(shared)] = shared
    duplicate = copy.deepcopy(model, memo).eval()
    use_attention(duplicate, "sdpa")
    return duplicate


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor at an address that is a multiple of 64, where MKL promises equal results from run to run.

    Weights that were read from a safetensors file usually are not, and then differ in the last bit between processes.
    """
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % 64 else tensor
