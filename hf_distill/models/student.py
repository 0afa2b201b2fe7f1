"""Students cut from a teacher: some of its layers, everything else as it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..console import get_logger
from ..errors import InputError
from .backbones import block_list, freeze_unused, is_adapted
from .base import RetrievalModel
from .cross_encoder import CrossEncoderRanker
from .dense import DenseRetriever
from .lexical import LexicalRetriever
from .loading import config_of_layers, quiet_transformers
from .multi_vector import MultiVectorRetriever


logger = get_logger(__name__)

# Settings that can change on a model that is open already.
_READING = ("query_prompt", "passage_prompt", "template", "temperature")
_CHOICES = ("first", "last", "even")


def student_from(
    spec: str | Path,
    teacher: str | Path | RetrievalModel | None = None,
    *,
    revision: str | None = None,
    **overrides: Any,
) -> RetrievalModel:
    """The model to be trained.

    Args:
        spec: `"layers:N"` for the teacher's first N layers, `"layers:N:last"` or `"layers:N:even"` (evenly spaced, the
            first and the last among them), `"layers:1,5,6"` for these, counted from 1, or any model id or folder,
            which is opened as it is.
        teacher: Whose layers are meant: a model id, folder or model. Its pooling, prompts and lengths are kept.
        revision: Branch, tag or commit of the model on the Hub.
        overrides: Settings that replace the model's own, as in [`DenseRetriever.from_pretrained`].

    Returns:
        The student, with float32 weights of its own.

    Raises:
        InputError: If the specification cannot be met.
    """
    spec = str(spec)
    if not spec.startswith("layers:"):
        return _load(spec, revision, overrides)[0]
    wanted = _parse(spec)
    if teacher is None:
        raise InputError("there is no teacher to take layers from", where=f"student {spec!r}", cure="Name a teacher")
    if isinstance(teacher, RetrievalModel):
        model = copy.deepcopy(teacher).float().requires_grad_(True)
        for tower in model.towers.values():
            freeze_unused(tower)
        for key, value in overrides.items():
            if key not in _READING or not hasattr(model.config, key):
                raise InputError(
                    f"{key} cannot be set on layers of an opened model",
                    where=f"student {spec!r}",
                    cure=f"Give the teacher's id or folder, or set only: {', '.join(_READING)}",
                )
            if value is not None:
                setattr(model.config, key, value)
    else:
        model = load_model(teacher, revision=revision, **overrides)
    total = len(block_list(model.backbone)[1])
    if (wanted[-1] + 1 if isinstance(wanted, list) else wanted[0]) > total:
        raise InputError(
            f"the teacher has {total} layers", where=f"student {spec!r}", cure=f"Ask for at most {total} layers"
        )
    positions = wanted if isinstance(wanted, list) else layer_positions(wanted[0], total, wanted[1])
    return reduce_layers(model, positions)


# Archetypes by the kind of a layout.
_ARCHETYPES: dict[str, type[RetrievalModel]] = {
    model.archetype: model for model in (DenseRetriever, CrossEncoderRanker, LexicalRetriever, MultiVectorRetriever)
}


def load_model(name: str | Path, *, revision: str | None = None, **overrides: Any) -> RetrievalModel:
    """Opens a retriever or a cross-encoder, whichever the files describe.

    Args:
        name: Model id or folder. A masked language model without further files is read as a dense model, with a
            warning; `"lexical:ID"` reads it as a lexical one (the first SPLADE models are published so), and
            `"dense:ID"` says that a dense one is meant.
        revision: Branch, tag or commit on the Hub.
        overrides: `dtype`, `attn_implementation` and settings, as the archetype's `from_pretrained` takes them.
    """
    model, is_guess = _load(name, revision, overrides)
    if is_guess:
        logger.warning(
            "%s is a masked language model that does not say what vectors it makes. It is read as a dense model, the "
            "mean of its tokens. If its terms are meant (SPLADE), write lexical:%s, else dense:%s.",
            *[name] * 3,
        )
    return model


def _load(name: str | Path, revision: str | None, overrides: dict[str, Any]) -> tuple[RetrievalModel, bool]:
    """The model, and whether nothing says that it is of this kind."""
    from . import layouts
    from .source import find_model

    source = find_model(name, revision)
    layout = layouts.read_layout(source.folder, source.name)
    model = _ARCHETYPES[source.kind or layout.kind].from_pretrained(source, **overrides)
    return model, layout.is_guess and source.kind is None


def layer_positions(count: int, total: int, choice: str = "first") -> list[int]:
    """Which `count` of `total` layers are kept: the first, the last, or evenly spaced ones."""
    if choice == "first":
        return list(range(count))
    if choice == "last":
        return list(range(total - count, total))
    if count == 1:
        return [0]
    # Halves are rounded up, in whole numbers: the same on every machine.
    return [(2 * number * (total - 1) + count - 1) // (2 * (count - 1)) for number in range(count)]


def reduce_layers(model: RetrievalModel, positions: Sequence[int]) -> RetrievalModel:
    """Keeps only some layers of every tower, in place.

    Args:
        model: Any model of this library whose backbone keeps its layers in one list.
        positions: The layers to keep, counted from 0, in ascending order.

    Returns:
        The model.

    Raises:
        InputError: If a position does not exist, or the backbone shares its layers or keeps them elsewhere.
    """
    positions = list(positions)
    for name, tower in model.towers.items():
        if is_adapted(tower):
            raise InputError("the model carries adapters", where="reduce_layers", cure="Merge them first")
        setattr(model, name, _reduced(tower, positions))
    for tower in model.towers.values():
        freeze_unused(tower)
    model.config.backbone = model.backbone.config.to_dict()
    return model.train(model.training)


def _reduced(backbone: PreTrainedModel, positions: list[int]) -> PreTrainedModel:
    prefix, layers = block_list(backbone)
    total = len(layers)
    if not positions or positions != sorted(set(positions)) or positions[0] < 0 or positions[-1] >= total:
        raise InputError(f"the backbone has the layers 0 to {total - 1}, not {positions}", where="layers")
    config = config_of_layers(backbone.config, positions)
    kept: dict[str, Any] = {}
    for key, tensor in backbone.state_dict().items():
        if not key.startswith(f"{prefix}."):
            kept[key] = tensor
            continue
        number, _, rest = key[len(prefix) + 1 :].partition(".")
        if int(number) in positions:
            kept[f"{prefix}.{positions.index(int(number))}.{rest}"] = tensor
    # Rebuilt rather than cut: a layer may know its own number or kind.
    with quiet_transformers():
        reduced, report = type(backbone).from_pretrained(
            None, config=config, state_dict=kept, dtype=backbone.dtype, output_loading_info=True
        )
    lacking = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
    if lacking or report["unexpected_keys"]:
        raise InputError(
            f"the layers {positions} make no complete backbone (weights such as {lacking[:1] or 'unexpected ones'})",
            where="layers",
            cure="Choose layers of one kind; the first layer of some families cannot be left out",
        )
    if hasattr(backbone, "_hf_distill_unused"):
        reduced._hf_distill_unused = backbone._hf_distill_unused
    if getattr(backbone, "pooler", None) is None and getattr(reduced, "pooler", None) is not None:
        reduced.pooler = None
    return reduced.to(backbone.device)


def _parse(spec: str) -> tuple[int, str] | list[int]:
    """`"layers:3:even"` as (3, "even"), `"layers:1,5,6"` as [0, 4, 5]."""
    parts = spec.split(":")
    choice = parts[2] if len(parts) > 2 else "first"
    named = parts[1].split(",")
    if len(parts) <= 3 and all(number.isdigit() and int(number) >= 1 for number in named):
        numbers = [int(number) for number in named]
        if len(numbers) == 1 and choice in _CHOICES:
            return numbers[0], choice
        if len(parts) == 2 and len(numbers) > 1 and numbers == sorted(set(numbers)):
            return [number - 1 for number in numbers]
    raise InputError(
        f"{spec!r} is no choice of layers",
        where="student",
        cure="Write layers:3, layers:3:last, layers:3:even, the layers' numbers as in layers:1,5,6, or a model id",
    )
