"""What there is to know of any transformers model that serves as a backbone."""

from __future__ import annotations

import functools
import inspect

from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError


def block_list(backbone: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of a backbone's blocks: the one module list as long as the configuration says.

    Raises:
        InputError: If there is none, as where a family shares one block.
    """
    total = backbone.config.num_hidden_layers
    found = [
        (name, module)
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    if not found:
        raise InputError(
            f"the backbone {backbone.config.model_type!r} has no list of {total} layers (it may share them)",
            where="layers",
            cure="Name a model whose layers have weights of their own",
        )
    # Lists inside a layer (experts, say) come after the list of layers in this order.
    return found[0]


def is_adapted(tower: nn.Module) -> bool:
    """Whether a tower carries PEFT adapters; decided without importing peft."""
    return hasattr(tower, "merge_and_unload")


def plain_model(tower: nn.Module) -> PreTrainedModel:
    """The transformers model inside a tower that may carry adapters."""
    return tower.get_base_model() if is_adapted(tower) else tower


@functools.cache
def forward_names(model_class: type) -> frozenset[str]:
    """Names of what a model's forward pass takes."""
    return frozenset(inspect.signature(model_class.forward).parameters)


def unused_parts(tower: nn.Module) -> list[str]:
    """Submodules that the forward pass does not use."""
    return getattr(tower, "_hf_distill_unused", [])


def freeze_unused(model: PreTrainedModel) -> None:
    """Freezes what the forward pass does not use, as dense models a pooler: trainable, it would stall DDP."""
    # The pooler of a classifier (DeBERTa's stands beside its encoder) belongs to the head, which is used.
    if model.base_model is model and isinstance(getattr(model, "pooler", None), nn.Module):
        model._hf_distill_unused = ["pooler"]
    for name in unused_parts(model):
        model.get_submodule(name).requires_grad_(False)
