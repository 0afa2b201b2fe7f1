"""The largest masked-LM logit of every vocabulary term over a text's tokens, without holding all logits.

A batch of 264 passages of 128 tokens has a thousand million logits. Of these a lexical representation keeps the
maximum over the tokens, so they are made a few texts at a time and thrown away; what is remembered is which token was
the largest. The gradient of a maximum flows into that token alone: the backward pass is two products with a matrix
that has one cell for each term whose gradient is not zero, and no logit is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..losses.numerics import sparse_rows


# Logits at a time: 32 MB in float32.
_BLOCK_NUMBERS = 2**23


def token_maximum(head: nn.Linear, hidden: Tensor, keep: Tensor) -> Tensor:
    """The maximum over kept tokens of `head(hidden)`.

    Args:
        head: The vocabulary projection of a masked-LM model.
        hidden: Float[T, L, H], what it is applied to.
        keep: Bool[T, L], the tokens that take part.

    Returns:
        Float[T, V] in the precision of the logits; 0 where a text keeps no token.
    """
    counts = keep.sum(1)
    width = max(1, int(counts.max()))
    # The kept tokens of each text first; the rest of a row repeats its first one, which leaves the maximum as it is.
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    order = torch.where(torch.arange(width, device=keep.device) < counts[:, None], order, order[:, :1])
    selected = hidden.gather(1, order.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    # Not `head` itself: its forward may stand for this very function, see `pooling_head`.
    values = _Maximum.apply(selected, head.weight, head.bias, lambda block: type(head).forward(head, block))
    return values * (counts > 0).unsqueeze(1)


class _Maximum(torch.autograd.Function):
    """`project(selected)` `[T, L, V]`, its maximum over L."""

    @staticmethod
    def forward(
        ctx: Any, selected: Tensor, weight: Tensor, bias: Tensor | None, project: Callable[[Tensor], Tensor]
    ) -> Tensor:
        texts, width, _ = selected.shape
        size = max(1, _BLOCK_NUMBERS // (width * weight.shape[0]))
        trained = any(ctx.needs_input_grad)
        values, places = [], []
        for start in range(0, texts, size):
            logits = project(selected[start : start + size])
            if trained:
                largest, place = logits.max(dim=1)
                places.append(place.to(torch.int16 if width < 2**15 else torch.int32))
            else:
                largest = logits.amax(dim=1)
            values.append(largest)
        if trained:
            ctx.save_for_backward(selected, weight, torch.cat(places))
            ctx.has_bias = bias is not None
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        selected, weight, places = ctx.saved_tensors
        texts, width, size = selected.shape
        terms = weight.shape[0]
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        grad_hidden = grad_weight = grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                row, term = grad.nonzero(as_tuple=True)
                token = row * width + places[row, term]
                order = token.argsort(stable=True)
                cells = sparse_rows(token[order], term[order], grad[row, term][order], texts * width, terms)
                grad_hidden = (cells @ weight.to(grad.dtype)).view(texts, width, size).to(selected.dtype)
            if ctx.needs_input_grad[1]:
                term, row = grad.t().nonzero(as_tuple=True)
                cells = sparse_rows(term, row * width + places[row, term], grad[row, term], terms, texts * width)
                grad_weight = (cells @ selected.reshape(-1, size).to(grad.dtype)).to(weight.dtype)
            if ctx.has_bias and ctx.needs_input_grad[2]:
                grad_bias = grad.sum(0).to(weight.dtype)
        return grad_hidden, grad_weight, grad_bias, None


@contextmanager
def replaced_forward(module: nn.Module, function: Callable[[Tensor], Any]) -> Iterator[None]:
    """Inside the block `module(x)` is `function(x)`: hooks of the module still run, as sharding engines need."""
    module.forward = function
    try:
        yield
    finally:
        del module.forward
