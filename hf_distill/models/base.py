"""What the archetypes share: a transformers backbone inside, native folders outside."""

from __future__ import annotations

import copy
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from ..console import get_logger
from ..errors import InputError
from ..files import staged_files
from . import layouts
from .backbones import block_list, forward_names, is_adapted, plain_model, unused_parts
from .candidates import CANDIDATES, arrange, candidate_scores
from .dropout import has_dropout
from .layer_scores import LayerTokens, check_layers, vector_layer_scores
from .loading import position_offset, quiet_transformers
from .memory import return_freed_memory
from .processing import DEFAULT_TEMPLATE, TextProcessor
from .products import FastOnCpu
from .source import ModelSource


logger = get_logger(__name__)

# The attentions that are switched with the mode; any other was somebody's choice.
_USUAL = ("eager", "sdpa")
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


class RetrievalModel(PreTrainedModel, ABC):
    """Base of the models that are trained and served.

    `backbone` is a native model of transformers. `training_modules` holds what is trained along but not exported,
    such as a projection to a teacher's width; it is saved in `training_modules.safetensors`. With `recompute` set,
    every chunk of a training batch is encoded under activation checkpointing, so that a batch of any size needs the
    memory of one chunk while loss and gradients stay the same ("gradient caching",
    https://arxiv.org/abs/2101.06983, here without its second loss evaluation).

    Attributes:
        representation: What the model makes of texts, by which the rest of the library chooses its way: `"dense"` (one
            vector a text), `"sparse"` (one vector over the vocabulary), `"tokens"` (one vector a token) or `"pair"`
            (no vectors: query and passage are read together and scored).
        candidate_sets: The candidates that the model can score in a batch, see [`hf_distill.models.candidates`].
        embedding_size: Width of its embedding of a text; None where a text has none.
    """

    representation: ClassVar[str]
    candidate_sets: ClassVar[tuple[str, ...]] = CANDIDATES
    embedding_size: int | None = None

    config_class = RetrievalConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _drops = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: RetrievalConfig, tokenizer: Any = None):
        super().__init__(config)
        self.tokenizer = tokenizer
        self.source: ModelSource | None = None
        self.recompute = False
        self.attention_is_fixed = False
        self.training_modules = nn.ModuleDict()
        # Read by transformers where a model's tied weights are asked for; the backbones answer for themselves.
        self.all_tied_weights_keys: dict[str, str] = {}

    # ---------------------------------------------------------------------------------------------- to override

    @property
    def towers(self) -> dict[str, nn.Module]:
        """The backbones by attribute name."""
        return {"backbone": self.backbone}

    @abstractmethod
    def processor(self) -> TextProcessor:
        """How this model reads text."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What changes the model's outputs apart from its weights and its reading of text, as JSON."""

    def check_export(self) -> None:  # noqa: B027 - most models can always be saved
        """Raises [`InputError`] if no other library could make the same of a saved model; asked before training."""

    @abstractmethod
    def _export(self, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        """Writes the native folder."""

    @abstractmethod
    def _restore(self, folder: Path) -> None:
        """Takes over the weights that `_export` wrote."""

    # ------------------------------------------------------------------------------------------- scores of a batch

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks of the (first) backbone.

        Raises:
            InputError: If the family shares its blocks.
        """
        return block_list(plain_model(self.backbone))[1]

    @property
    def num_layers(self) -> int:
        """Number of transformer blocks."""
        return plain_model(self.backbone).config.num_hidden_layers

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raises [`InputError`] for a layer number that this model does not have, or if its layers give no scores."""
        if self.representation == "sparse":
            raise InputError(
                "the layers of a lexical model give no scores",
                where="layers",
                cure="Use a loss on its final scores (kl), or a dense, multi-vector or cross-encoder teacher",
            )
        check_layers(layers, self.num_layers, str(self.name_or_path or type(self).__name__))

    def batch_scores(self, output: Any, batch: Mapping[str, Any], candidates: str) -> torch.Tensor:
        """Training scores of a collated batch, float32, in the layout of [`hf_distill.models.candidates`].

        Args:
            output: What `forward` returned for the batch's tokens.
            batch: The collator's batch.
            candidates: One of `candidate_sets`.
        """
        return candidate_scores(self, *arrange(output.query, output.passage, batch), candidates)

    def layer_scores(self, output: Any, batch: Mapping[str, Any], candidates: str) -> torch.Tensor:
        """What the layers that `forward` was asked for say about the candidates: float32 `[K, Q, C]`.

        See [`hf_distill.models.layer_scores`] for how a layer becomes scores.
        """
        return vector_layer_scores(*arrange(*output.layers, batch), candidates)

    def layer_tokens(self, output: Any, batch: Mapping[str, Any]) -> LayerTokens:
        """The tokens of the layers that `forward` was asked for, with `layer_tokens` set.

        Raises:
            InputError: If the model reads query and passage together.
        """
        raise InputError(
            f"a {type(self).__name__} has no token vectors of queries and passages apart",
            where="losses",
            cure="Compare rankings of layers instead (layer_alignment), which needs no common tokens",
        )

    # -------------------------------------------------------------------------------------------------- running

    def train(self, mode: bool = True) -> RetrievalModel:
        """Sets training or inference mode; on a CPU this also chooses the attention that is fastest there."""
        super().train(mode)
        self._drops = mode and has_dropout(self)
        if not mode:
            self._attend("sdpa")
        return self

    def _attend(self, implementation: str) -> None:
        usual = all(plain_model(tower).config._attn_implementation in _USUAL for tower in self.towers.values())
        if usual and self.device.type == "cpu":
            use_attention(self, implementation)

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes that FSDP divides one by one: the blocks.

        Not the embeddings, which transformers names too: they are also looked up outside their module.
        """
        try:
            return sorted({type(block_list(plain_model(tower))[1][0]).__name__ for tower in self.towers.values()})
        except InputError:
            return []

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
        if not self.training:
            return function(*arguments)
        # On CPUs the backward pass of PyTorch's fused attention is slow in half precision, a tenth of the eager one's
        # speed, and dropout keeps it from being fused; in float32 without dropout it is the faster one.
        precise = self.dtype == torch.float32 and not torch.is_autocast_enabled(self.device.type)
        self._attend("sdpa" if precise and not self._drops else "eager")
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(_recomputed, function, *arguments, use_reentrant=False, preserve_rng_state=True)
        return _train(function, *arguments)

    def _inputs(self, tower: nn.Module, chunk: Mapping[str, torch.Tensor], embeddings=None) -> dict[str, Any]:
        """The keyword arguments of a backbone for one padded chunk."""
        plain = plain_model(tower)
        names = forward_names(type(plain))
        mask = chunk["attention_mask"]
        inputs: dict[str, Any] = {"attention_mask": mask}
        if embeddings is None:
            inputs["input_ids"] = chunk["input_ids"]
        else:
            inputs["inputs_embeds"] = embeddings
        if "use_cache" in names:
            inputs["use_cache"] = False
        padded_left = self.tokenizer is not None and self.tokenizer.padding_side == "left"
        if padded_left and "position_ids" in names and position_offset(plain) is None:
            # Backbones count positions from the left edge; the first token has to be at 0 however much padding there
            # is. (Those of the RoBERTa family count from the token ids and need no help.)
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        return inputs

    def _embedded(self, tower: nn.Module, chunks: list[Mapping[str, torch.Tensor]]) -> list[torch.Tensor | None]:
        """Word embeddings of several chunks from one lookup, or Nones where chunks are better looked up one by one.

        The gradient of a lookup is a dense matrix as large as the vocabulary, zero-filled at every lookup; one lookup
        for a batch pays for it once. Where activations are recomputed, memory must not grow with the batch: then the
        embeddings that are held until the backward pass may take as much as that matrix, and no more.
        """
        plain = plain_model(tower)
        tokens = sum(chunk["input_ids"].numel() for chunk in chunks)
        wanted = (
            len(chunks) > 1
            and not (self.recompute and tokens > plain.get_input_embeddings().weight.shape[0])
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
        unused = tuple(f"{name}.{part}" for name, tower in self.towers.items() for part in unused_parts(tower))
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
        state = self.state_dict() if state_dict is None else state_dict
        empty = [name for name, tensor in state.items() if tensor.numel() == 0]
        if empty:
            raise InputError(
                f"the parameter {empty[0]!r} is empty in this process, so it is sharded over processes",
                where="save_pretrained",
                cure="Pass the consolidated weights as state_dict; under ZeRO-3 set "
                "stage3_gather_16bit_weights_on_model_save in the DeepSpeed configuration",
            )
        kept_apart = self._kept_apart()
        private = {name: tensor.contiguous() for name, tensor in state.items() if name in kept_apart}
        # A checkpoint that a full disk or a kill cuts off must not look like a finished one.
        with staged_files(folder) as temporary:
            self._export(temporary, state)
            if private:
                from safetensors.torch import save_file

                save_file(private, temporary / layouts.TRAINING_FILE)
        if not private:
            (folder / layouts.TRAINING_FILE).unlink(missing_ok=True)

    def load_checkpoint(self, folder: str | os.PathLike) -> None:
        """Takes over the weights that `save_pretrained` wrote for this very model, in place (to resume training).

        Adapters are restored as adapters: the exported folder holds them merged, `training_modules.safetensors` apart.

        Raises:
            InputError: If the folder's weights do not fit this model.
        """
        folder = Path(folder)
        try:
            self._restore(folder)
            expected = self._kept_apart()
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

    def _kept_apart(self) -> set[str]:
        """The tensors that go to `training_modules.safetensors`: what is trained along, and adapters."""
        names = {f"training_modules.{name}" for name in self.training_modules.state_dict()}
        for tower_name, tower in self.towers.items():
            if is_adapted(tower):
                names |= {f"{tower_name}.{name}" for name, one in tower.named_parameters() if one.requires_grad}
        return names

    def _save_tower(self, name: str, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        """Saves one backbone natively, adapters merged, and its tokenizer beside it."""
        tower = self.towers[name]
        own = {key[len(name) + 1 :]: tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
        if is_adapted(tower):
            # A copy is merged: merging and un-merging the live weights would change them by rounding.
            duplicate = copy.deepcopy(tower)
            duplicate.load_state_dict(own)
            merged = duplicate.merge_and_unload()
            with quiet_transformers():
                merged.save_pretrained(folder, state_dict=self._to_stored(merged.state_dict()))
        else:
            with quiet_transformers():
                tower.save_pretrained(folder, state_dict=self._to_stored(own))
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
            loaded, report = type(tower).from_pretrained(
                folder, config=copy.deepcopy(tower.config), dtype=tower.dtype, output_loading_info=True
            )
        own = set(tower.state_dict())
        wrong = [
            key for key in (*report["missing_keys"], *report["unexpected_keys"]) if key in own or "pooler" not in key
        ]
        if wrong:
            raise RuntimeError(f"weights differ in {sorted(wrong)[:3]}")
        stored = {key: tensor for key, tensor in loaded.state_dict().items() if key in own}
        tower.load_state_dict(self._from_stored(stored))

    def _to_stored(self, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """A backbone's weights as its folder holds them; the same, unless an archetype says otherwise."""
        return state

    def _from_stored(self, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The way back from `_to_stored`."""
        return state


# ------------------------------------------------------------------------------------------------------- helpers


def _train(function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    with FastOnCpu():
        return function(*arguments)


def _recomputed(function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    return_freed_memory()
    return _train(function, *arguments)


def use_attention(model: RetrievalModel, implementation: str) -> None:
    """Switches the attention of every tower, for example to `"eager"` for training on a CPU and `"sdpa"` else.

    Does nothing (and costs microseconds) where it is in use already. A backbone that lacks it keeps its own, and so
    does a model that was opened with an attention of the user's choice.
    """
    if model.attention_is_fixed:
        return
    for tower in model.towers.values():
        plain = plain_model(tower)
        if plain.config._attn_implementation == implementation:
            continue
        if implementation == "sdpa" and not getattr(plain, "_supports_sdpa", False):
            continue
        plain.set_attn_implementation(implementation)
