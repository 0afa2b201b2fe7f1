"""What the archetypes share in running: batches of chunks through a backbone, and the scores of a batch."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..errors import InputError
from .backbones import block_list, forward_names, plain_model
from .candidates import CANDIDATES, arrange, candidate_scores, take_rows
from .dropout import has_dropout
from .layer_scores import LayerTokens, block_outputs, check_layers, pad_tokens, vector_layer_scores
from .loading import position_offset
from .memory import return_freed_memory
from .native import NativeModel, RetrievalConfig
from .processing import TextProcessor
from .products import FastOnCpu


# The attentions that are switched with the mode; any other was somebody's choice.
_USUAL = ("eager", "sdpa")
# Backbones that do nothing with token ids but look up embeddings, so that a lookup for several chunks is the same.
_PLAIN_LOOKUP = {"bert", "distilbert", "electra", "roberta", "xlm-roberta", "camembert", "albert", "llama", "qwen2",
                 "qwen3", "mistral"}  # fmt: skip


class RetrievalModel(NativeModel):
    """Base of the models that are trained and served.

    An archetype says how it reads texts and what it makes of them; these methods are abstract here, and in
    [`NativeModel`] those that say which folders it opens and writes.

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

    def __init__(self, config: RetrievalConfig, backbone: PreTrainedModel | None = None, tokenizer: Any = None):
        super().__init__(config, backbone, tokenizer)
        self.recompute = False

    # ---------------------------------------------------------------------------------------------- to override

    @abstractmethod
    def processor(self) -> TextProcessor:
        """How this model reads text."""

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model makes of a collated batch's tokens."""

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
        """Sets training or inference mode; on a CPU this also chooses the attention that is fastest there.

        In training that depends on precision too, which is known when a batch comes.
        """
        super().train(mode)
        self._drops = mode and has_dropout(self)
        if not mode:
            self._attend("sdpa")
        return self

    def _attend_for_training(self) -> None:
        # On CPUs the backward pass of PyTorch's fused attention is slow in half precision, a tenth of the eager one's
        # speed, and dropout keeps it from being fused; in float32 without dropout it is the faster one.
        precise = self.dtype == torch.float32 and not torch.is_autocast_enabled(self.device.type)
        self._attend("sdpa" if precise and not self._drops else "eager")

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

    def _maybe_recompute(self, function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        if not self.training:
            return function(*arguments)
        self._attend_for_training()
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(_recomputed, function, *arguments, use_reentrant=False, preserve_rng_state=True)
        return _train(function, *arguments)

    def _watched(self, tower: nn.Module, layers: Sequence[int]) -> AbstractContextManager[Mapping[int, torch.Tensor]]:
        """Within it, what chosen blocks of a tower put out is kept, by their numbers."""
        return block_outputs(block_list(plain_model(tower))[1], layers) if layers else nullcontext({})

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


# ------------------------------------------------------------------------------------------------------- helpers


def in_order(
    parts: Iterable[torch.Tensor | tuple[torch.Tensor, ...]],
    inverse: torch.Tensor,
    token_dims: Sequence[int | None] = (None,),
) -> tuple[torch.Tensor, ...]:
    """What a model made of the chunks of a token batch, put together.

    Args:
        parts: For every chunk a tensor or several, a row a text.
        inverse: `[T]`, which restores the order of the texts.
        token_dims: For each of the several the dimension that counts tokens, to be padded to the longest chunk's; None
            where there is none. The last stands for all further ones.
    """
    columns = zip(*(part if isinstance(part, tuple) else (part,) for part in parts))
    found = []
    for column, dim in zip(columns, itertools.chain(token_dims, itertools.repeat(token_dims[-1]))):
        if dim is not None:
            longest = max(part.shape[dim] for part in column)
            column = [pad_tokens(part, longest, dim) for part in column]
        found.append(take_rows(torch.cat(column), inverse))
    return tuple(found)


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
