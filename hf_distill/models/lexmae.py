"""LexMAE's pre-training model: an auto-encoder whose only channel is a distribution over the vocabulary.

Shen et al., "LexMAE: Lexicon-Bottlenecked Pretraining for Large-Scale Retrieval" (2023). The encoder and its masked-LM
head are those of a native model, which is what is saved; the weak decoder is trained along and thrown away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput

from ..errors import InputError
from .backbones import plain_model
from .base import RetrievalModel
from .lexical import ends_with_projection, pooled_mask, special_tokens
from .loading import auto_class, check_masked_lm, config_of_layers, load_tokenizer, quiet_transformers, read_config
from .native import RetrievalConfig
from .opening import Opening
from .processing import TextProcessor
from .token_maximum import replaced_forward, token_maximum


BOTTLENECKS = ("softmax", "saturated", "cls")


class LexMAEConfig(RetrievalConfig):
    """Settings of a [`LexMAEForPreTraining`].

    Args:
        decoder_layers: Layers of the decoder; 0 for plain masked language modelling.
        bottleneck: What stands for a text: `"softmax"` (the paper's distribution over terms), `"saturated"`
            (log(1 + relu) of the pooled logits, divided by their sum) or `"cls"` (the first hidden state: a dense
            auto-encoder).
        passage_length: Most tokens of a text.
        template: How a document's title and text become one passage.
    """

    model_type = "hf_distill_lexmae"

    decoder_layers: int = 2
    bottleneck: str = "softmax"
    passage_length: int = 144

    def check(self) -> None:
        super().check()
        if self.bottleneck not in BOTTLENECKS or self.decoder_layers < 0:
            raise InputError(
                f"bottleneck is {self.bottleneck!r} and decoder_layers {self.decoder_layers}",
                cure=f"Choose a bottleneck of {', '.join(BOTTLENECKS)}, and 0 layers or more",
            )


@dataclass
class LexMAEOutput(ModelOutput):
    """The losses of a batch.

    Args:
        encoder_loss: Mean cross-entropy at the tokens that the encoder had to predict.
        decoder_loss: The same of the decoder; None without one.
        bottleneck: Float32 `[B, H]`, what the decoder was given; None without one.
    """

    encoder_loss: torch.Tensor | None = None
    decoder_loss: torch.Tensor | None = None
    bottleneck: torch.Tensor | None = None


class GivenEmbeddings(nn.Module):
    """Stands for a model's embedding layer where its inputs are embedded already."""

    def forward(
        self, input_ids: Any = None, inputs_embeds: torch.Tensor | None = None, *_: Any, **__: Any
    ) -> torch.Tensor:
        return inputs_embeds


class DecoderHead(nn.Module):
    """A masked-LM head without a vocabulary matrix of its own: it is given the encoder's.

    Args:
        config: The encoder's configuration.
        width: Of the vocabulary matrix.
        terms: Size of the vocabulary.
    """

    def __init__(self, config: Any, width: int, terms: int):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, width)
        activation = getattr(config, "hidden_act", None) or getattr(config, "activation", "gelu")
        self.activation = ACT2FN[activation if isinstance(activation, str) else "gelu"]
        self.norm = nn.LayerNorm(width, eps=getattr(config, "layer_norm_eps", None) or 1e-12)
        self.bias = nn.Parameter(torch.zeros(terms))
        nn.init.normal_(self.dense.weight, std=getattr(config, "initializer_range", 0.02))
        nn.init.zeros_(self.dense.bias)

    def forward(self, hidden: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return F.linear(self.norm(self.activation(self.dense(hidden))), matrix, self.bias)


class LexMAEForPreTraining(RetrievalModel):
    """A masked-LM model with a lexical bottleneck and a small decoder behind it.

    `save_pretrained` writes an ordinary masked-LM checkpoint, and the decoder to `training_modules.safetensors` beside
    it. [`LexMAEForPreTraining.from_pretrained`] opens a masked language model to be pre-trained further, or makes a
    new one of its architecture. Its options are fields of [`LexMAEConfig`]; `new_head`, `"identity"` or `"random"`, to
    start a masked-LM head where the checkpoint has none; and `fresh`, to start all weights anew (only configuration
    and tokenizer are read).

    Args:
        config: The settings.
        backbone: A masked-LM model of transformers; made from `config.backbone` if None.
        tokenizer: Its tokenizer.
    """

    config_class = LexMAEConfig
    archetype = "lexmae"
    backbone_head = "masked_lm"
    known_settings = ("decoder_layers", "bottleneck", "passage_length", "template", "new_head", "fresh")
    # Not a retriever yet: cards say how to open it as what it is.
    representation = "masked_lm"

    def __init__(self, config: LexMAEConfig, backbone: PreTrainedModel | None = None, tokenizer: Any = None):
        super().__init__(config, backbone, tokenizer)
        backbone = self.backbone
        if not ends_with_projection(backbone):
            raise InputError(
                f"the masked-LM head of {backbone.config.model_type!r} does not end with its vocabulary matrix",
                where="pretraining",
                cure="Give a model of another family, such as BERT, DistilBERT, RoBERTa or ModernBERT",
            )
        if config.decoder_layers:
            matrix = backbone.get_input_embeddings().weight
            if matrix.shape != backbone.get_output_embeddings().weight.shape:
                raise InputError(
                    "word embeddings and vocabulary matrix have different widths",
                    where="pretraining",
                    cure="Give a model whose two matrices are tied",
                )
            self.training_modules["decoder"] = _small_decoder(backbone, config.decoder_layers)
            self.training_modules["decoder_head"] = DecoderHead(backbone.config, matrix.shape[1], matrix.shape[0])
        if tokenizer is not None:
            tokenizer.model_max_length = config.passage_length

    @classmethod
    def _open(cls, opening: Opening) -> Self:
        tower, wanted = opening.layout().query, opening.wanted
        new_head, fresh = wanted.pop("new_head", None), wanted.pop("fresh", False)
        if fresh:
            backbone = _fresh_backbone(tower.folder, opening)
            tokenizer = load_tokenizer(tower.folder, opening.name, backbone, tower.lowercase)
        else:
            backbone, tokenizer = opening.tower(tower, new_head)
        length = opening.length("passage_length", LexMAEConfig.passage_length, backbone, tokenizer)
        config = LexMAEConfig(**wanted | {"passage_length": length})
        return cls(config, backbone, tokenizer).to(backbone.dtype)

    def processor(self) -> TextProcessor:
        length = self.config.passage_length
        return TextProcessor(self.tokenizer, query_length=length, passage_length=length, template=self.config.template)

    def settings(self) -> dict[str, Any]:
        return {"decoder_layers": self.config.decoder_layers, "bottleneck": self.config.bottleneck}

    def train(self, mode: bool = True) -> LexMAEForPreTraining:
        """Sets training or inference mode, and on a CPU the attention that is fastest for it, also in the decoder."""
        super().train(mode)
        if mode:
            self._attend("eager")
        if "decoder" in self.training_modules:
            self.training_modules["decoder"].set_attn_implementation(
                plain_model(self.backbone).config._attn_implementation
            )
        return self

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        decoder_ids: torch.Tensor | None = None,
        decoder_labels: torch.Tensor | None = None,
    ) -> LexMAEOutput:
        """The losses of a batch, as [`MaskingCollator`] makes it; all inputs are `int64[B, L]`.

        Vocabulary logits are made only where there is a label, and a few texts at a time for the bottleneck.
        """
        head = self.backbone.get_output_embeddings()
        with replaced_forward(head, lambda hidden: hidden):
            output = self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                output_hidden_states=self.config.bottleneck == "cls" or None,
            )
        hidden = output.logits
        encoder_loss = _cross_entropy(head, hidden, labels)
        if "decoder" not in self.training_modules:
            return LexMAEOutput(encoder_loss=encoder_loss)
        if self.config.bottleneck == "cls":
            bottleneck = output.hidden_states[-1][:, 0]
        else:
            # On what the encoder read: mask tokens take part, a start or separator that stands for another does not.
            special = self.tokenizer.convert_tokens_to_ids(list(special_tokens(self.tokenizer)))
            text = pooled_mask(input_ids, attention_mask, "text", tuple(special))
            bottleneck = self.bag_of_words(token_maximum(head, hidden, text))
        decoded = self.decode(bottleneck, decoder_ids, attention_mask)
        matrix = self.backbone.get_input_embeddings().weight
        decoder_head = self.training_modules["decoder_head"]
        decoder_loss = _cross_entropy(lambda states: decoder_head(states, matrix), decoded, decoder_labels)
        return LexMAEOutput(encoder_loss=encoder_loss, decoder_loss=decoder_loss, bottleneck=bottleneck)

    def bag_of_words(self, pooled: torch.Tensor) -> torch.Tensor:
        """The mean of the word embeddings under a distribution made of pooled logits.

        The embeddings are constants here: the gradient reaches the encoder through the distribution alone.

        Args:
            pooled: Float[B, V], the largest logit of every term.

        Returns:
            Float32 `[B, H]`.
        """
        with torch.autocast(pooled.device.type, enabled=False):
            pooled = pooled.to(torch.promote_types(pooled.dtype, torch.float32))
            if self.config.bottleneck == "saturated":
                weights = torch.log1p(torch.relu(pooled))
                weights = weights / (weights.sum(1, keepdim=True) + 1e-4)
            else:
                weights = pooled.softmax(1)
            return weights @ self.backbone.get_input_embeddings().weight.detach().to(weights.dtype)

    def decode(
        self, bottleneck: torch.Tensor, decoder_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states `[B, L, H]` of the decoder, which reads the bottleneck in the first token's place."""
        base = getattr(self.backbone, self.backbone.base_model_prefix)
        embedded = base.embeddings(input_ids=decoder_ids)
        embedded = torch.cat([bottleneck.unsqueeze(1).to(embedded.dtype), embedded[:, 1:]], dim=1)
        decoder = self.training_modules["decoder"]
        return decoder(inputs_embeds=embedded, attention_mask=attention_mask).last_hidden_state

    def _export(self, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        self._save_tower("backbone", folder, state)

    def _record(self) -> dict[str, Any]:
        # How a lexical model that starts from here pools.
        return {"archetype": self.archetype, "pooled_tokens": "text", "template": self.config.template}


def _cross_entropy(project: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the places with a label; 0 where there is none."""
    chosen = labels >= 0
    logits = project(hidden[chosen])
    with torch.autocast(hidden.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels[chosen], reduction="sum") / chosen.sum().clamp(min=1)


def _small_decoder(backbone: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A new model of the same family with a few layers, which takes embedded tokens as they are."""
    total = backbone.config.num_hidden_layers
    config = config_of_layers(backbone.config, [number % total for number in range(layers)])
    with quiet_transformers():  # whole, also where an engine is to divide it later
        decoder = AutoModel.from_config(config)
    decoder.embeddings = GivenEmbeddings()
    if getattr(decoder, "pooler", None) is not None:
        decoder.pooler = None
    return decoder


def _fresh_backbone(folder: Path, opening: Opening) -> PreTrainedModel:
    config = read_config(folder, opening.name)
    check_masked_lm(config, opening.name)
    attention = {} if opening.attention is None else {"attn_implementation": opening.attention}
    with quiet_transformers():
        model = auto_class("masked_lm").from_config(config, **attention)
    return model.to(getattr(torch, opening.dtype) if isinstance(opening.dtype, str) else opening.dtype)
