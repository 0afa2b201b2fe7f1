"""Changing the dropout of a model that is built already."""

from __future__ import annotations

from torch import nn

from ..errors import InputError


# Attention functions read these instead of calling a module.
_ATTRIBUTES = ("attention_dropout", "dropout_prob", "attn_dropout")


def set_dropout(model: nn.Module, probability: float) -> None:
    """Sets every dropout of a model, in embeddings, attention and feed-forward layers alike.

    Raises:
        InputError: If `probability` is not in [0, 1).
    """
    if not 0 <= probability < 1:
        raise InputError(f"{probability} is not in [0, 1)", where="dropout", cure="Give 0 to switch it off")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        for name in _ATTRIBUTES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, probability)
