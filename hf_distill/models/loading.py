"""Opening a folder's transformers model and tokenizer, with everything checked that would go wrong later."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..console import get_logger
from ..errors import InputError
from .processing import prepare_tokenizer


logger = get_logger(__name__)

_CURE = "Give a folder written by save_pretrained, or a model id of the Hub"

# What a backbone may carry on top: nothing, a classifier of one label, or a masked-LM head.
Head = Literal["none", "classifier", "masked_lm"]
# Where GELU is nearly linear: what a new masked-LM head adds to hidden states before it.
_SHIFT = 4.0
# Share of terms that a new lexical head leaves at 0.
_INACTIVE = 0.99
# Encoder-decoder families whose encoder is a model of its own.
_ENCODER_CLASSES = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Opens models without transformers' report on loaded weights, which the callers check themselves, and whole.

    Once ZeRO-3 is configured, transformers opens every model in pieces, teachers too; pieces can neither be cut into a
    student nor encode on their own. The engine divides the student when training begins.
    """
    from transformers.integrations import deepspeed
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if reference is not None and reference() is not None:
            deepspeed.set_hf_deepspeed_config(reference())
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def position_offset(model: PreTrainedModel) -> int | None:
    """The padding index that RoBERTa-like models add to positions; None for all others."""
    base = getattr(model, model.base_model_prefix, model) if model.base_model_prefix else model
    embeddings = getattr(base, "embeddings", None)
    if isinstance(getattr(embeddings, "position_embeddings", None), nn.Embedding):
        return getattr(embeddings, "padding_idx", None)
    return None


def longest_input(model: PreTrainedModel) -> int | None:
    """Most tokens that a backbone has positions for; None where nothing limits them."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    offset = position_offset(model)
    return positions if offset is None else positions - offset - 1


def choose_length(
    wanted: int | None, recorded: int | None, tokenizer: Any, model: PreTrainedModel, where: str, option: str
) -> int:
    """The length limit of one kind of text: as asked, else as the folder says, else what the model can take."""
    limit = longest_input(model)
    if wanted is not None:
        if wanted < 3 or (limit is not None and wanted > limit):
            raise InputError(
                f"{option} is {wanted}, but the model reads 3 to {limit or 'any number of'} tokens",
                where=where,
                cure=f"Choose a smaller {option}" if wanted >= 3 else f"Choose a larger {option}",
            )
        return wanted
    length = recorded or tokenizer.model_max_length
    return min(length, limit) if limit is not None else int(min(length, 1 << 20))


def auto_class(head: Head) -> Any:
    """The class of transformers that opens and makes backbones with such a head."""
    import transformers

    name = {
        "none": "AutoModel",
        "classifier": "AutoModelForSequenceClassification",
        "masked_lm": "AutoModelForMaskedLM",
    }
    return getattr(transformers, name[head])


def read_config(folder: Path, name: str) -> PretrainedConfig:
    """The configuration of a folder's transformers model.

    Raises:
        InputError: If the folder describes no model that transformers itself knows.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        needs_code = "trust_remote_code" in str(error)
        raise InputError(
            "the model needs Python code of its repository, which this library never runs"
            if needs_code
            else f"config.json describes no model that transformers knows ({_first_line(error)})",
            where=name,
            cure="Give a model of an architecture that transformers has" if needs_code else _CURE,
        ) from None


def load_backbone(
    folder: Path,
    name: str,
    dtype: str | torch.dtype,
    *,
    head: Head = "none",
    attention: str | None = None,
    new_head: str | None = None,
) -> PreTrainedModel:
    """Opens a folder's transformers model.

    Args:
        folder: The folder.
        name: What the user called the model, for messages.
        dtype: The weights' precision, whatever the folder's is.
        head: What it carries on top of its blocks.
        attention: The attention implementation; None for transformers' choice.
        new_head: How to start a masked-LM head that the folder lacks, see [`start_masked_lm_head`]; None refuses.

    Raises:
        InputError: If the folder holds no such model, or weights that do not fill it.
    """
    import transformers

    config = read_config(folder, name)
    options: dict[str, Any] = {
        "config": config,
        "dtype": dtype,
        "output_loading_info": True,
        "trust_remote_code": False,
    }
    if attention is not None:
        options["attn_implementation"] = attention
    loader = auto_class(head)
    if head == "masked_lm":
        check_masked_lm(config, name)
    elif head == "classifier":
        _check_labels(config, name)
    elif config.model_type in _ENCODER_CLASSES:
        loader = getattr(transformers, _ENCODER_CLASSES[config.model_type])
        options.pop("trust_remote_code")
    elif getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"the model is an encoder-decoder ({config.model_type})",
            where=name,
            cure=f"Give an encoder or a decoder; of encoder-decoders only {', '.join(_ENCODER_CLASSES)} are read",
        )
    with _weights_that_are_tensors(name, "the model cannot be loaded"), quiet_transformers():
        model, report = loader.from_pretrained(folder, **options)
    if head == "masked_lm":
        _check_masked_lm_head(model, report, name, new_head)
    else:
        _check_report(model, report, name, head)
    return model


@contextlib.contextmanager
def _weights_that_are_tensors(where: str, problem: str) -> Iterator[None]:
    """Turns whatever reading weights may raise into [`InputError`].

    Safetensors are preferred everywhere. Older checkpoints, and the Dense modules of older sentence-transformers, have
    their weights in `pytorch_model.bin`, which is a pickle; many models of the Hub have nothing else. It is read as
    transformers reads it, by PyTorch's weights-only unpickler (`torch.load(weights_only=True)`, sound since 2.6, which
    this library requires): that builds tensors and plain containers of them, and refuses every other name that the
    file asks for before anything of it runs. So no code of a checkpoint is ever run, whichever file it comes in.
    """
    try:
        yield
    except pickle.UnpicklingError:
        # The unpickler's own text advises to switch its guard off.
        raise InputError(
            "the weights are a pickle that holds more than numbers, which is not read",
            where=where,
            cure="Give weights in safetensors; a pickle can run any program when it is read",
        ) from None
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError) as error:
        raise InputError(f"{problem} ({_first_line(error)})", where=where, cure=_CURE) from None


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors in a module's folder: `model.safetensors`, or the older `pytorch_model.bin` where there is no other.

    Raises:
        InputError: If there is neither, or a file that holds anything but tensors.
    """
    from safetensors.torch import load_file

    path, older = folder / "model.safetensors", folder / "pytorch_model.bin"
    if not path.is_file() and not older.is_file():
        raise InputError("the folder holds no weights", where=str(folder), cure="Download the model again")
    with _weights_that_are_tensors(str(folder), "the weights cannot be read"):
        # The one other place where weights are read is transformers' own `from_pretrained`, by the same rule.
        return load_file(path) if path.is_file() else torch.load(older, map_location="cpu", weights_only=True)


def config_of_layers(config: PretrainedConfig, positions: Sequence[int]) -> PretrainedConfig:
    """A copy of a configuration with these of its layers, counted from 0, which may repeat.

    Settings by layer, such as the kinds of attention of a decoder, are chosen along.
    """
    config, total = copy.deepcopy(config), config.num_hidden_layers
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == total and key != "architectures":
            setattr(config, key, [value[position] for position in positions])
    config.num_hidden_layers = len(positions)
    return config


def check_masked_lm(config: PretrainedConfig, name: str) -> None:
    """Raises [`InputError`] if transformers has no masked-LM model of a configuration's architecture."""
    from transformers import AutoModelForMaskedLM

    if type(config) not in AutoModelForMaskedLM._model_mapping or getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"the architecture {config.model_type!r} has no masked-LM head, so the model says nothing about terms",
            where=name,
            cure="Give an encoder that was trained as a masked language model, such as BERT, DistilBERT or ModernBERT",
        )


def _check_masked_lm_head(model: PreTrainedModel, report: Mapping[str, Any], name: str, new_head: str | None) -> None:
    missing = sorted(report["missing_keys"])
    prefix = f"{model.base_model_prefix}."
    _refuse_incomplete(report, [key for key in missing if key.startswith(prefix)], name)
    lacking = [key for key in missing if not key.startswith(prefix)]
    if not lacking:
        return
    if new_head is None:
        raise InputError(
            f"the checkpoint has no trained masked-LM head (it lacks {lacking[0]!r})",
            where=name,
            cure="Give a masked language model, or start a new head with new_head='identity' and pre-train it "
            "(hf-distill pretrain)",
        )
    start_masked_lm_head(model, new_head)
    logger.info("%s: the masked-LM head is new (%s) and has to be trained.", name, new_head)


def start_masked_lm_head(model: PreTrainedModel, how: str) -> None:
    """Starts the head of a masked-LM model whose vocabulary matrix is tied to its word embeddings.

    Args:
        model: The model.
        how: `"random"` as transformers does it, or `"identity"`: the linear layer before the vocabulary matrix passes
            hidden states on. A shift (the layer's bias) carries them over the bend of the activation, and the layer
            norm behind it takes the shift away. All terms get one bias, low enough that a text has about a hundredth
            of them above 0: the softmax of masked language modelling does not see it, and a lexical model begins
            sparse.

    Raises:
        InputError: For another start, or where the head cannot pass hidden states on: without one square layer
            (ALBERT), or where this layer has no bias to shift by (ModernBERT).
    """
    if how == "random":
        return
    if how != "identity":
        raise InputError(f"{how!r} is no start of a masked-LM head", where="new_head", cure="Use identity or random")
    output = model.get_output_embeddings()
    inside = {id(module) for module in getattr(model, model.base_model_prefix).modules()}
    square = [
        module
        for module in model.modules()
        if id(module) not in inside and isinstance(module, nn.Linear) and module is not output
    ]
    if len(square) != 1 or square[0].weight.shape[0] != square[0].weight.shape[1]:
        raise InputError(
            "the masked-LM head is not one square layer before the vocabulary matrix",
            where="new_head",
            cure="Use random",
        )
    if square[0].bias is None:
        raise InputError(
            "the masked-LM head has no bias, so it cannot pass hidden states on", where="new_head", cure="Use random"
        )
    with torch.no_grad():
        square[0].weight.copy_(torch.eye(len(square[0].weight)))
        square[0].bias.fill_(_SHIFT)
        if output.bias is not None:
            output.bias.zero_()
            ids = torch.randint(output.out_features, (8, 32), generator=torch.Generator().manual_seed(0))
            largest = model.eval()(input_ids=ids.to(output.weight.device)).logits.float().amax(1)
            output.bias.fill_(-largest.quantile(_INACTIVE))


def _check_labels(config: PretrainedConfig, name: str) -> None:
    has_head = any(part.endswith("ForSequenceClassification") for part in config.architectures or [])
    if not has_head:
        if any(part.endswith("ForCausalLM") for part in config.architectures or []):
            logger.warning("%s: a language model is given a new classification head; it has to be trained.", name)
        config.num_labels = 1
    elif config.num_labels != 1:
        raise InputError(
            f"the classifier has {config.num_labels} labels, but a ranker gives one score",
            where=f"{name}, config.json, field 'num_labels'",
            cure="Give a cross-encoder with one label (relevance), or the encoder under this classifier to train one",
        )


def _check_report(model: PreTrainedModel, report: Mapping[str, Any], name: str, head: Head) -> None:
    """What to do about weights that the folder lacks: a spare pooler is dropped, a new head said, the rest refused."""
    missing = sorted(report["missing_keys"])
    unfilled = [key for key in missing if not key.startswith("pooler.")]
    if head == "classifier":
        prefix = f"{model.base_model_prefix}."
        new_head = [key for key in missing if not key.startswith(prefix) or key.startswith(f"{prefix}pooler.")]
        unfilled = [key for key in missing if key not in new_head]
        if new_head:
            logger.info("%s: the scoring head is new (%s, ...) and has to be trained.", name, new_head[0])
    elif len(missing) > len(unfilled):
        model.pooler = None
    _refuse_incomplete(report, unfilled, name)


def _refuse_incomplete(report: Mapping[str, Any], unfilled: list[str], name: str) -> None:
    mismatched = report.get("mismatched_keys") or []
    if mismatched:
        raise InputError(f"the weight {list(mismatched)[0]!r} has another shape than config.json says", where=name)
    if unfilled:
        raise InputError(
            f"the checkpoint lacks {len(unfilled)} weights of the model, such as {unfilled[0]!r}",
            where=name,
            cure="Give a complete checkpoint; one of another architecture has to be converted first",
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def load_tokenizer(folder: Path, name: str, model: PreTrainedModel, lowercase: bool = False) -> Any:
    """Opens a folder's tokenizer and checks that it fits the model.

    Args:
        folder: The folder.
        name: What the user called the model, for messages.
        model: The backbone.
        lowercase: Lower-case the text first, as sentence-transformers' `do_lower_case` does.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise InputError(
            f"the tokenizer cannot be loaded ({_first_line(error)})",
            where=name,
            cure="Save the model's own tokenizer into the folder (tokenizer.save_pretrained)",
        ) from None
    tokenizer = prepare_tokenizer(tokenizer, model.get_input_embeddings().num_embeddings, name)
    if lowercase:
        _lowercase(tokenizer)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def _lowercase(tokenizer: Any) -> None:
    import json

    from tokenizers import normalizers

    backend = tokenizer.backend_tokenizer
    state = json.dumps(json.loads(backend.to_str()).get("normalizer"))
    if '"Lowercase"' in state or '"lowercase": true' in state:
        return
    steps = [normalizers.Lowercase(), *([backend.normalizer] if backend.normalizer is not None else [])]
    backend.normalizer = normalizers.Sequence(steps)
