"""One linear layer on the first token as the head of a ranker, in a form that plain transformers runs too.

LEAD's cross-encoders score a pair by `Linear(H, 1)` on position 0. The classifiers of transformers have a square layer
and a hyperbolic tangent before it. They are stored so that both do nothing: the square layer multiplies by 2⁻¹⁴, where
tanh(x) is x to float32 precision, and the last layer's weights are multiplied by 2¹⁴. Powers of two change no digits,
so the stored classifier gives the same scores (to about 1e-6), and its form tells that its head is linear. In memory
the last layer has its own scale, at which it can be trained, and reads the first token directly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError


LINEAR, FULL = "linear", "full"
HEADS = (FULL, LINEAR)
_SCALE = 2.0**14
# Families whose head is dense, tanh, linear on position 0, by where these layers are: in the pooler, or all in a head.
_WITH_POOLER = ("bert", "ernie")
_WITH_HEAD = ("roberta", "xlm-roberta", "camembert", "mpnet")


def _layers(classifier: PreTrainedModel) -> tuple[str, str, str] | None:
    """Names of what a linear head leaves out, of the square layer and of the last one; None for other families."""
    family = classifier.config.model_type
    if family in _WITH_POOLER:
        pooler = f"{classifier.base_model_prefix}.pooler"
        return pooler, f"{pooler}.dense", "classifier"
    return ("classifier.dense", "classifier.dense", "classifier.out_proj") if family in _WITH_HEAD else None


def has_linear_head(classifier: PreTrainedModel) -> bool:
    """Whether a classifier has the stored form of a linear head."""
    names = _layers(classifier)
    if names is None:
        return False
    square = classifier.get_submodule(names[1])
    same = torch.equal(square.weight, torch.eye(len(square.weight), dtype=square.weight.dtype) / _SCALE)
    return same and not square.bias.any()


def make_linear(classifier: PreTrainedModel, where: str, *, new: bool) -> None:
    """Gives a classifier a linear head for use in memory; what the head leaves out is frozen.

    Args:
        classifier: The classifier, with a stored linear head or any other.
        where: For messages.
        new: Whether to start the last layer anew as LEAD does: weights N(0, 0.02), bias 0. Otherwise its weights are
            taken over as they are.

    Raises:
        InputError: For a family whose head cannot be made linear.
    """
    names = _layers(classifier)
    if names is None:
        raise InputError(
            f"the head of a {classifier.config.model_type!r} classifier cannot be made linear",
            where=where,
            cure="Leave head out (decoders have a linear one anyway), or start from one of "
            f"{', '.join((*_WITH_POOLER, *_WITH_HEAD))}",
        )
    unused, square, last = (classifier.get_submodule(name) for name in names)
    with torch.no_grad():
        nn.init.eye_(square.weight)
        square.weight.div_(_SCALE)
        square.bias.zero_()
        if new:
            last.weight.normal_(0.0, 0.02)
            last.bias.zero_()
    unused.requires_grad_(False)
    classifier._hf_distill_unused = [names[0]]


def to_stored(classifier: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A classifier's weights in memory as they are stored."""
    return _scaled(classifier, state, _SCALE)


def from_stored(classifier: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A classifier's stored weights as they are in memory."""
    return _scaled(classifier, state, 1 / _SCALE)


def _scaled(classifier: PreTrainedModel, state: Mapping[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    key = f"{_layers(classifier)[2]}.weight"
    return {**state, key: state[key] * factor}


def linear_score(classifier: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """The scores `[t]` of hidden states `[t, l, H]`, float32."""
    head = classifier.classifier
    last = getattr(head, "out_proj", head)
    dropout = getattr(head, "dropout", None) or classifier.dropout
    return last(dropout(hidden[:, 0])).squeeze(-1).float()
