"""Changing the dropout of a model that is built already."""

from __future__ import annotations

from torch import nn

from ..errors import InputError


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
        # Attention functions take their probability from a plain number of the layer's.
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, float(probability))
