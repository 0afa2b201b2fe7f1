"""The dropout of a model that is built already: its probability, and a faster way to draw it on a CPU."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError


# The integers that hold as many bits as a number of this type.
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def fast_dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """[`torch.nn.functional.dropout`] at a fifth of its cost on a CPU, where torch draws a mask's numbers one by one.

    A mask is made of raw random bits, 16 or 32 for a number, as wide as the numbers themselves: those below a
    threshold are dropped. The probability is thereby rounded to a multiple of 2^-16 (2^-32 in float32) and the scale
    of what stays follows the rounded one. Every mask is drawn with a seed from torch's own generator, so a restored
    random state brings it back, for a resumed run and for recomputed activations alike. Dropout inside fused
    attention and on other devices stays torch's.
    """
    if not training or inplace or not 0 < p < 1 or input.device.type != "cpu" or input.dtype not in _BITS:
        return F.dropout(input, p, training, inplace)
    return input * dropout_mask(input.shape, input.dtype, p)


def dropout_mask(shape: torch.Size, dtype: torch.dtype, p: float) -> torch.Tensor:
    """0 with probability `p`, else 1 / (1 - p), of shape `shape`, on the CPU."""
    kind = _BITS[dtype]
    bits = torch.iinfo(kind).bits
    dropped = round(p * 2**bits)
    scale = torch.tensor(1 / (1 - dropped / 2**bits), dtype=dtype).view(kind).item()
    count = math.prod(shape)
    generator = np.random.SFC64(int(torch.randint(2**62, ())))
    words = generator.random_raw(max(1, -(-count * bits // 64)))
    mask = torch.from_numpy(words).view(kind)[:count].view(shape)
    # 0 or 1, then the bits of zero or of the scale: vector instructions on integers, in place.
    return mask.ge_(torch.iinfo(kind).min + dropped).mul_(scale).view(dtype)


def set_dropout(model: nn.Module, probability: float) -> None:
    """Sets every dropout of a model, in embeddings, attention and feed-forward layers alike.

    Raises:
        InputError: If `probability` is not in [0, 1).
    """
    if not 0 <= probability < 1:
        raise InputError(f"{probability} is not in [0, 1)", where="dropout", cure="Give 0 to switch it off")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = float(probability)
        for name in _numbers(module):
            setattr(module, name, float(probability))


def has_dropout(model: nn.Module) -> bool:
    """Whether a model in training drops anything."""
    return any(
        module.p > 0 if isinstance(module, nn.Dropout) else any(value > 0 for value in _numbers(module).values())
        for module in model.modules()
    )


def _numbers(module: nn.Module) -> dict[str, float]:
    """The probabilities that attention functions take from plain numbers of their layer."""
    return {name: value for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)}
