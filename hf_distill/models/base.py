"""What the archetypes share: a transformers backbone inside, native folders outside."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from ..console import get_logger
from ..errors import InputError
from . import layouts
from .processing import DEFAULT_TEMPLATE, TextProcessor
from .source import ModelSource


logger = get_logger(__name__)

# Encoder-decoder families whose encoder is a model of its own.
_ENCODER_CLASSES = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
# Backbones that do nothing with token ids but look up embeddings, so that a lookup for several chunks is the same.
_PLAIN_LOOKUP = {"bert", "distilbert", "electra", "roberta", "xlm-roberta", "camembert", "albert", "llama", "qwen2",
                 "qwen3", "mistral"}  # fmt: skip


class RetrievalConfig(PretrainedConfig):
    """Settings shared by all archetypes.

    Args:
        backbone: The backbone's own configuration as a dictionary.
        query_prompt: Text put before every query.
        template: How a document's title and text become one passage.
    """

    model_type = "hf_distill"

    backbone: dict | None = None
    hidden_size: int | None = None
    query_prompt: str = ""
    template: str = DEFAULT_TEMPLATE


class RetrievalModel(PreTrainedModel):
    """Base of the models that are trained and served.

    `backbone` is a native model of transformers. `training_modules` holds what is trained along but not exported,
    such as a projection to a teacher's width; it is saved in `training_modules.safetensors`. With `recompute` set,
    every chunk of a training batch is encoded under activation checkpointing, so that a batch of any size needs the
    memory of one chunk while loss and gradients stay the same ("gradient caching",
    https://arxiv.org/abs/2101.06983, here without its second loss evaluation).
    """

    config_class = RetrievalConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: RetrievalConfig, tokenizer: Any = None):
        super().__init__(config)
        self.tokenizer = tokenizer
        self.source: ModelSource | None = None
        self.recompute = False
        self.training_modules = nn.ModuleDict()
        # Read by transformers where a model's tied weights are asked for; the backbones answer for themselves.
        self.all_tied_weights_keys: dict[str, str] = {}

    # ---------------------------------------------------------------------------------------------- to override

    @property
    def towers(self) -> dict[str, nn.Module]:
        """The backbones by attribute name."""
        return {"backbone": self.backbone}

    def processor(self) -> TextProcessor:
        """How this model reads text."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What changes the model's outputs apart from its weights and its reading of text, as JSON."""
        raise NotImplementedError

    def _export(self, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        raise NotImplementedError

    def _restore(self, folder: Path) -> None:
        raise NotImplementedError

    # -------------------------------------------------------------------------------------------------- running

    def train(self, mode: bool = True) -> RetrievalModel:
        """Sets training or inference mode; on a CPU this also chooses the attention that is fastest there."""
        super().train(mode)
        if self.device.type == "cpu" and getattr(self, "_attention_is_free", False):
            # The backward pass of PyTorch's fused attention runs at a tenth of the eager one's speed on CPUs.
            use_attention(self, "eager" if mode else "sdpa")
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def enable_input_require_grads(self) -> None:
        for tower in self.towers.values():
            tower.enable_input_require_grads()

    def floating_point_ops(self, input_dict: dict, exclude_embeddings: bool = True) -> int:
        """0: batches of several token batches are not counted."""
        return 0

    def add_adapter(self, config: Any, adapter_name: str = "default") -> None:
        """Puts a PEFT adapter (LoRA, say) on every tower; only it is trained, and export merges it.

        Args:
            config: A configuration of `peft`, for example `peft.LoraConfig(r=8, target_modules=["query", "value"])`.
            adapter_name: Its name.
        """
        from peft import get_peft_model

        for name, tower in self.towers.items():
            setattr(self, name, get_peft_model(tower, config, adapter_name=adapter_name))

    def _maybe_recompute(self, function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=True)
        return function(*arguments)

    def _inputs(self, tower: nn.Module, chunk: Mapping[str, torch.Tensor], embeddings=None) -> dict[str, Any]:
        """The keyword arguments of a backbone for one padded chunk."""
        plain = plain_model(tower)
        names = _forward_names(type(plain))
        mask = chunk["attention_mask"]
        inputs: dict[str, Any] = {"attention_mask": mask}
        if embeddings is None:
            inputs["input_ids"] = chunk["input_ids"]
        else:
            inputs["inputs_embeds"] = embeddings
        if "use_cache" in names:
            inputs["use_cache"] = False
        padded_left = self.tokenizer is not None and self.tokenizer.padding_side == "left"
        if padded_left and "position_ids" in names and _position_offset(plain) is None:
            # Backbones count positions from the left edge; the first token has to be at 0 however much padding there
            # is. (Those of the RoBERTa family count from the token ids and need no help.)
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        return inputs

    def _embedded(self, tower: nn.Module, chunks: list[Mapping[str, torch.Tensor]]) -> list[torch.Tensor | None]:
        """Word embeddings of several chunks from one lookup, or Nones where chunks are better looked up one by one.

        The gradient of a lookup is a dense matrix as large as the vocabulary, zero-filled at every lookup; one lookup
        for a batch pays for it once.
        """
        plain = plain_model(tower)
        wanted = (
            len(chunks) > 1
            and torch.is_grad_enabled()
            and self.training
            and plain.config.model_type in _PLAIN_LOOKUP
            and (self.tokenizer is None or self.tokenizer.padding_side == "right")
            and plain.get_input_embeddings().weight.requires_grad
        )
        if not wanted:
            return [None] * len(chunks)
        ids = [chunk["input_ids"] for chunk in chunks]
        flat = plain.get_input_embeddings()(torch.cat([one.flatten() for one in ids]))
        return [part.view(*one.shape, -1) for part, one in zip(flat.split([one.numel() for one in ids]), ids)]

    # -------------------------------------------------------------------------------------------------- weights

    def weights_fingerprint(self) -> str:
        """16 hexadecimal digits that identify the weights and settings that make this model's outputs.

        It does not depend on folders or names, nor on weights that the forward pass does not use; it does on the
        weights' precision. The reading of text is not part of it: see [`TextProcessor.settings`].
        """
        unused = tuple(f"{name}.{part}" for name, tower in self.towers.items() for part in _unused(tower))
        digest = hashlib.sha256(repr(sorted(self.settings().items())).encode())
        for name, tensor in sorted(self.state_dict().items()):
            if name.startswith("training_modules.") or (unused and name.startswith(unused)):
                continue
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(data.numpy().data)
        return digest.hexdigest()[:16]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Writes the native folder: it opens in transformers and sentence-transformers without this library.

        Args:
            save_directory: The folder; files of other kinds in it stay.
            is_main_process: Only the main process writes.
            state_dict: This model's state dictionary, where the parameters themselves are sharded (ZeRO-3, FSDP).
            push_to_hub: Not supported here; call `push_to_hub(repo_id)`.
            kwargs: Accepted for the sake of transformers' signature.
        """
        if push_to_hub:
            raise InputError(
                "save_pretrained(push_to_hub=True) is not supported", cure="Call model.push_to_hub('you/name')"
            )
        if not is_main_process:
            return
        folder = Path(save_directory)
        if folder.is_file():
            raise InputError("this is a file", where=str(folder), cure="Give a folder to save the model in")
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state_dict is None else state_dict
        empty = [name for name, tensor in state.items() if tensor.numel() == 0]
        if empty:
            raise InputError(
                f"the parameter {empty[0]!r} is empty in this process, so it is sharded over processes",
                where="save_pretrained",
                cure="Pass the consolidated weights as state_dict; under ZeRO-3 set "
                "stage3_gather_16bit_weights_on_model_save in the DeepSpeed configuration",
            )
        self._export(folder, state)
        private = {name: tensor for name, tensor in state.items() if self._is_private(name)}
        if private:
            from safetensors.torch import save_file

            save_file({name: tensor.contiguous() for name, tensor in private.items()}, folder / layouts.TRAINING_FILE)
        else:
            (folder / layouts.TRAINING_FILE).unlink(missing_ok=True)

    def load_weights(self, folder: str | os.PathLike) -> None:
        """Takes over the weights that `save_pretrained` wrote for this very model, in place (to resume training).

        Adapters are restored as adapters: the exported folder holds them merged, `training_modules.safetensors` apart.

        Raises:
            InputError: If the folder's weights do not fit this model.
        """
        folder = Path(folder)
        try:
            self._restore(folder)
            expected = {name for name in self.state_dict() if self._is_private(name)}
            found: dict[str, torch.Tensor] = {}
            if (folder / layouts.TRAINING_FILE).is_file():
                from safetensors.torch import load_file

                found = load_file(folder / layouts.TRAINING_FILE)
            if expected != set(found):
                raise RuntimeError(f"{layouts.TRAINING_FILE} differs in {sorted(expected ^ set(found))[:3]}")
            self.load_state_dict(found, strict=False)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"the weights do not fit this model: {str(error).strip()}",
                where=str(folder),
                cure="Resume with the model and the settings that the checkpoint was written with",
            ) from None

    def _is_private(self, name: str) -> bool:
        """Whether a tensor goes to `training_modules.safetensors`: what is trained along, and adapters."""
        if name.startswith("training_modules."):
            return True
        tower_name, _, rest = name.partition(".")
        tower = self.towers.get(tower_name)
        if tower is None or not is_adapted(tower):
            return False
        return any(part in rest for part in ("lora_", "modules_to_save", "adapter", "ia3_", "oft_", "hada_", "vera_"))

    def _save_tower(self, name: str, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        """Saves one backbone natively, adapters merged, and its tokenizer beside it."""
        tower = self.towers[name]
        own = {key[len(name) + 1 :]: tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
        if is_adapted(tower):
            # A copy is merged: merging and un-merging the live weights would change them by rounding.
            duplicate = copy.deepcopy(tower)
            duplicate.load_state_dict(own)
            merged = duplicate.merge_and_unload()
            merged.save_pretrained(folder)
        else:
            tower.save_pretrained(folder, state_dict=own)
        if self.tokenizer is not None:
            backend = getattr(self.tokenizer, "backend_tokenizer", None)
            if backend is not None:
                # What the last call set would otherwise be saved as the tokenizer's own.
                backend.no_truncation()
                backend.no_padding()
            self.tokenizer.save_pretrained(folder)

    def _restore_tower(self, name: str, folder: Path) -> None:
        tower = self.towers[name]
        if is_adapted(tower):
            return
        with quiet_transformers():
            loaded = type(tower).from_pretrained(folder, config=copy.deepcopy(tower.config), dtype=tower.dtype)
        state = loaded.state_dict()
        unused = set(_unused(tower))
        own = set(tower.state_dict())
        state = {key: value for key, value in state.items() if key in own or key.split(".")[0] not in ("pooler",)}
        missing = [key for key in own - set(state) if key.split(".")[0] not in unused]
        if missing or set(state) - own:
            raise RuntimeError(f"weights differ in {sorted(missing or set(state) - own)[:3]}")
        tower.load_state_dict(state, strict=False)


# ------------------------------------------------------------------------------------------------------- helpers


def use_attention(model: RetrievalModel, implementation: str) -> None:
    """Switches the attention of every tower, for example to `"eager"` for training on a CPU and `"sdpa"` else.

    Does nothing (and costs microseconds) where it is in use already; a backbone that lacks it keeps its own.
    """
    for tower in model.towers.values():
        plain = plain_model(tower)
        if plain.config._attn_implementation == implementation:
            continue
        if implementation == "sdpa" and not getattr(plain, "_supports_sdpa", False):
            continue
        plain.set_attn_implementation(implementation)


def is_adapted(tower: nn.Module) -> bool:
    """Whether a tower carries PEFT adapters; decided without importing peft."""
    return hasattr(tower, "merge_and_unload")


def plain_model(tower: nn.Module) -> PreTrainedModel:
    """The transformers model inside a tower that may carry adapters."""
    return tower.get_base_model() if is_adapted(tower) else tower


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' report on loaded weights, which the callers check themselves."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


_NAMES: dict[type, frozenset[str]] = {}


def _forward_names(model_class: type) -> frozenset[str]:
    if model_class not in _NAMES:
        _NAMES[model_class] = frozenset(inspect.signature(model_class.forward).parameters)
    return _NAMES[model_class]


def _position_offset(model: PreTrainedModel) -> int | None:
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
    offset = _position_offset(model)
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


def _unused(tower: nn.Module) -> list[str]:
    """Submodules that the forward pass of a dense model does not use."""
    return getattr(tower, "_hf_distill_unused", [])


def load_backbone(
    folder: Path, name: str, dtype: str | torch.dtype, *, head: bool = False, attention: str | None = None
) -> PreTrainedModel:
    """Opens a folder's transformers model.

    Args:
        folder: The folder.
        name: What the user called the model, for messages.
        dtype: The weights' precision, whatever the folder's is.
        head: With a classification head of one label, or without any head.
        attention: The attention implementation; None for transformers' choice.

    Raises:
        InputError: If the folder holds no such model, or weights that do not fill it.
    """
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    cure = "Give a folder written by save_pretrained, or a model id of the Hub"
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        needs_code = "trust_remote_code" in str(error)
        raise InputError(
            "the model needs Python code of its repository, which this library never runs"
            if needs_code
            else f"config.json describes no model that transformers knows ({_first_line(error)})",
            where=name,
            cure="Give a model of an architecture that transformers has" if needs_code else cure,
        ) from None
    options: dict[str, Any] = {
        "config": config,
        "dtype": dtype,
        "output_loading_info": True,
        "trust_remote_code": False,
    }
    if attention is not None:
        options["attn_implementation"] = attention
    loader: Any = AutoModelForSequenceClassification if head else AutoModel
    if head:
        _check_labels(config, name)
    elif getattr(config, "is_encoder_decoder", False):
        if config.model_type not in _ENCODER_CLASSES:
            raise InputError(
                f"the model is an encoder-decoder ({config.model_type})",
                where=name,
                cure=f"Give an encoder or a decoder; of encoder-decoders only {', '.join(_ENCODER_CLASSES)} are read",
            )
        loader = getattr(transformers, _ENCODER_CLASSES[config.model_type])
        options.pop("trust_remote_code")
    try:
        with quiet_transformers():
            model, report = loader.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"the model cannot be loaded ({_first_line(error)})", where=name, cure=cure) from None
    _check_report(model, report, name, head)
    return model


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


def _check_report(model: PreTrainedModel, report: Mapping[str, Any], name: str, head: bool) -> None:
    """Deals with weights that the folder does not have: a spare pooler is dropped, a new head is said, the rest refused."""
    missing = sorted(report["missing_keys"])
    mismatched = report.get("mismatched_keys") or []
    if mismatched:
        raise InputError(f"the weight {list(mismatched)[0]!r} has another shape than config.json says", where=name)
    unfilled = [key for key in missing if not key.startswith("pooler.")]
    if head:
        prefix = f"{model.base_model_prefix}."
        new_head = [key for key in missing if not key.startswith(prefix) or key.startswith(f"{prefix}pooler.")]
        unfilled = [key for key in missing if key not in new_head]
        if new_head:
            logger.info("%s: the scoring head is new (%s, ...) and has to be trained.", name, new_head[0])
    elif len(missing) > len(unfilled):
        model.pooler = None
    if unfilled:
        raise InputError(
            f"the checkpoint lacks {len(unfilled)} weights of the model, such as {unfilled[0]!r}",
            where=name,
            cure="Give a complete checkpoint; one of another architecture has to be converted first",
        )


def freeze_unused(model: PreTrainedModel) -> None:
    """Freezes the pooler, which dense models do not use: an unused trainable parameter would stall DDP."""
    if isinstance(getattr(model, "pooler", None), nn.Module):
        model.pooler.requires_grad_(False)
        model._hf_distill_unused = ["pooler"]


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

    from .processing import prepare_tokenizer

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
