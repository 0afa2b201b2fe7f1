"""Matrix products in float32 on x86 CPUs by oneDNN, where torch's own choice is another library.

That library (MKL) reaches half of oneDNN's speed on processors of another maker; on those of its own both are alike.
In bfloat16 torch calls oneDNN by itself.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from .dropout import fast_dropout


# Smaller products are over before the layout is chosen.
_SMALLEST = 64


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left [n, D] @ right.T [D, m]` in float32, without gradients."""
    if left.device.type == "cpu" and onednn_works():
        return _multiply(left, right)
    return left @ right.T


class FastOnCpu(TorchFunctionMode):
    """Within it a training on a CPU draws dropout's masks and multiplies float32 matrices the fast way.

    What comes out is the same up to rounding: see [`fast_dropout`] and [`fast_linear`].
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.dropout:
            func = fast_dropout
        elif func is F.linear:
            func = fast_linear
        return func(*args, **(kwargs or {}))


def fast_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """[`torch.nn.functional.linear`], its three products by oneDNN where that is possible and pays.

    Args:
        input: `[..., in_features]`.
        weight: `[out_features, in_features]`.
        bias: `[out_features]`, or None.
    """
    plain = input.dtype == weight.dtype == torch.float32 and input.device.type == weight.device.type == "cpu"
    if (
        not plain
        # Sharded and quantised weights are tensors of other classes, and multiply in their own way.
        or type(weight) not in (torch.Tensor, nn.Parameter)
        or type(input) not in (torch.Tensor, nn.Parameter)
        or weight.dim() != 2
        or min(weight.shape) < _SMALLEST
        or input.numel() < _SMALLEST * weight.shape[1]
        or torch.is_autocast_enabled("cpu")
        or not onednn_works()
    ):
        return F.linear(input, weight, bias)
    return _Linear.apply(input, weight, bias)


class _Linear(torch.autograd.Function):
    """`y = x Wᵀ + b`; `∂x = ∂y W`, `∂W = ∂yᵀ x`, `∂b = Σ ∂y`."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        return _multiply(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        to_input = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_input = _multiply(gradient, weight.T.contiguous())
        rows = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[1]:
            to_weight = _multiply(rows.T.contiguous(), input.reshape(-1, input.shape[-1]).T.contiguous())
        if ctx.needs_input_grad[2]:
            to_bias = rows.sum(0)
        return to_input, to_weight, to_bias


def _multiply(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(left.contiguous(), right, bias, "none", [], "")


@functools.cache
def onednn_works() -> bool:
    """Whether this build of torch on this processor has the product and it is right."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 3, 70, generator=generator), torch.randn(65, 70, generator=generator)
    bias = torch.randn(65, generator=generator)
    try:
        with torch.no_grad():
            return torch.allclose(_multiply(left, right, bias), F.linear(left, right, bias), rtol=1e-4, atol=1e-4)
    except (AttributeError, RuntimeError, TypeError):
        return False
