"""Dense retrieval: one vector a text, from one encoder or from two."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError
from . import layouts, writing
from .backbones import freeze_unused, plain_model
from .bi_encoder import BiEncoderConfig, Both, Kind, RetrieverOutput, VectorRetriever
from .candidates import arrange
from .layer_scores import LayerTokens
from .layouts import Layout, ProjectionLayout, TowerLayout
from .opening import Opening
from .processing import tokenizer_fingerprint
from .projections import Projection, Projections, projection_settings


_POOLINGS = ("cls", "mean", "last")
# What else sentence-transformers' modules may make, by the kind of a layout.
_OTHERS = {"cross-encoder": ("cross-encoder", "CrossEncoderRanker"), "lexical": ("lexical model", "LexicalRetriever")}


class DenseRetrieverConfig(BiEncoderConfig):
    """Settings of a [`DenseRetriever`].

    Args:
        pooling: How token vectors become one: `"cls"` (first token), `"mean"` or `"last"` (last token).
        normalize: Whether vectors are scaled to length 1.
        similarity: `"dot"` or `"cosine"`.
        temperature: What scores are divided by in training. Default: 0.05 for cosine and for unit vectors, else 1.
        query_prompt: Text put before every query.
        passage_prompt: Text put before every passage.
        query_length: Most tokens of a query.
        passage_length: Most tokens of a passage.
        template: How a document's title and text become one passage.
        projection_dim: Width of the vectors after a linear layer; None or 0 for the backbone's own.
        projections: The linear layers between pooling and normalisation, as dictionaries.
        tied: Whether one encoder reads queries and passages.
        tied_projections: Whether both share the linear layers.
    """

    model_type = "hf_distill_dense"

    pooling: str = "mean"
    normalize: bool = False
    similarity: str = "cosine"
    temperature: float | None = None
    projection_dim: int | None = None
    projections: list | None = None
    tied: bool = True
    tied_projections: bool = True

    def check(self) -> None:
        super().check()
        for option, known in (("pooling", _POOLINGS), ("similarity", ("dot", "cosine"))):
            if getattr(self, option) not in known:
                raise InputError(f"{option} is {getattr(self, option)!r}", cure=f"Choose one of {', '.join(known)}")


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Token vectors `[t, l, H]` and their mask `[t, l]` to one float32 vector a text, `[t, H]`."""
    if pooling == "mean":
        weights = mask.unsqueeze(-1).float()
        return (hidden.float() * weights).sum(1) / weights.sum(1).clamp_min(1e-9)
    positions = torch.arange(mask.shape[1], device=mask.device)
    real = mask.bool()
    if pooling == "cls":
        index = positions.expand_as(mask).masked_fill(~real, mask.shape[1] - 1).amin(1)
    else:
        index = positions.expand_as(mask).masked_fill(~real, 0).amax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), index].float()


class DenseRetriever(VectorRetriever):
    """An encoder (or two) whose vectors are compared by dot product or cosine.

    [`DenseRetriever.from_pretrained`] opens any dense model: a folder or Hub id, of any library, or saved by this
    class. Its options are fields of [`DenseRetrieverConfig`]. Build one from parts with `DenseRetriever(config,
    backbone, tokenizer)`.

    Args:
        config: The settings.
        backbone: A transformers model without head; made from `config.backbone` if None.
        tokenizer: Its tokenizer.
        passage_backbone: A second one for passages, where `config.tied` is False.
    """

    config_class = DenseRetrieverConfig
    archetype = "dense"
    representation = "dense"
    known_settings = (
        "pooling", "normalize", "similarity", "temperature", "query_prompt", "passage_prompt", "query_length",
        "passage_length", "template", "projection_dim", "tied",
    )  # fmt: skip
    recorded_settings = ("temperature", "template")
    # The vectors of texts and of their layers; the masks of their tokens, and these tokens in the layers.
    token_dims = (None, None, 1, 2)

    def __init__(
        self,
        config: DenseRetrieverConfig,
        backbone: PreTrainedModel | None = None,
        tokenizer: Any = None,
        passage_backbone: PreTrainedModel | None = None,
    ):
        super().__init__(config, backbone, tokenizer)
        self.passage_backbone = None
        if not config.tied:
            self.passage_backbone = copy.deepcopy(self.backbone) if passage_backbone is None else passage_backbone
            freeze_unused(plain_model(self.passage_backbone))
        config.projections = projection_settings(config.projections, config.hidden_size, config.projection_dim)
        self.projections = Projections(config.projections)
        self.passage_projections = None if config.tied_projections else Projections(config.projections)
        if config.temperature is None:
            config.temperature = 0.05 if config.normalize or config.similarity == "cosine" else 1.0

    @classmethod
    def _open(cls, opening: Opening) -> Self:
        name, layout = opening.name, opening.layout()
        layouts.expect_kind(layout, "dense", name)
        if layout.kind != "dense" and layout.query.pooling is None and opening.is_modular:
            what, archetype = _OTHERS[layout.kind]
            raise InputError(f"this is a {what}", where=name, cure=f"Open it with {archetype}")
        backbone, tokenizer = opening.tower(layout.query)
        passage_backbone = None
        if layout.passage is not None:
            passage_backbone, second = opening.tower(layout.passage)
            length = layout.passage.max_length or second.model_max_length
            layout = replace(layout, passage=replace(layout.passage, max_length=length))
            if tokenizer_fingerprint(second) != tokenizer_fingerprint(tokenizer):
                raise InputError(
                    "the two towers have different tokenizers", where=name, cure="Give towers that share a tokenizer"
                )
        config = DenseRetrieverConfig(**_settings_of(layout, backbone, tokenizer, opening))
        model = cls(config, backbone, tokenizer, passage_backbone).to(backbone.dtype)
        for modules, found in zip((model.projections, model.passage_projections), _projection_layouts(layout)):
            if modules is not None:
                modules.fill(found)
        return model

    @property
    def towers(self) -> dict[str, nn.Module]:
        towers = {"backbone": self.backbone}
        if self.passage_backbone is not None:
            towers["passage_backbone"] = self.passage_backbone
        return towers

    def tower(self, kind: Kind) -> nn.Module:
        return self.backbone if kind == "query" or self.passage_backbone is None else self.passage_backbone

    @property
    def embedding_size(self) -> int:
        """Width of the vectors."""
        return self.projections[-1].out_features if len(self.projections) else self.config.hidden_size

    def settings(self) -> dict[str, Any]:
        return {
            "pooling": self.config.pooling,
            "normalize": self.config.normalize,
            "similarity": self.config.similarity,
            "activations": [settings["activation"] for settings in self.config.projections],
        }

    # -------------------------------------------------------------------------------------------------- running

    def encode(
        self,
        chunk: Mapping[str, torch.Tensor],
        kind: Kind,
        embeddings: torch.Tensor | None = None,
        layers: Sequence[int] = (),
        layer_tokens: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Vectors of one padded chunk.

        Args:
            chunk: `input_ids` and `attention_mask`, `[t, l]`.
            kind: Which tower reads it.
            embeddings: Its word embeddings `[t, l, H]`, where they are known already.
            layers: Numbers of layers, from 1, whose pooled vectors are wanted too.
            layer_tokens: Whether their tokens are wanted as well.

        Returns:
            Float32 `[t, D]`; with `layers` also `[t, K, H]`, neither projected nor normalised; with `layer_tokens`
            also the mask `[t, l]` and the hidden states `[t, K, l, H]`.
        """
        tower, mask = self.tower(kind), chunk["attention_mask"]
        with self._watched(tower, layers) as found:
            hidden = tower(**self._inputs(tower, chunk, embeddings)).last_hidden_state
        vectors = pool(hidden, mask, self.config.pooling)
        second = kind == "passage" and self.passage_projections is not None
        vectors = (self.passage_projections if second else self.projections)(vectors)
        if self.config.normalize:
            vectors = F.normalize(vectors, dim=-1)
        if not layers:
            return vectors
        pooled = torch.stack([pool(found[number], mask, self.config.pooling) for number in layers], 1)
        if not layer_tokens:
            return vectors, pooled
        return vectors, pooled, mask.bool(), torch.stack([found[number].float() for number in layers], 1)

    def _output(self, found: list[Both]) -> RetrieverOutput:
        vectors, *more = found
        projected = {
            getattr(module, "label", name): tuple(None if one is None else module(one) for one in vectors)
            for name, module in self.training_modules.items()
            if isinstance(module, nn.Linear)
        }
        return RetrieverOutput(
            *vectors,
            projected=projected or None,
            layers=more[0] if more else None,
            layer_tokens=(*more[2], *more[1]) if more[1:] else None,
        )

    def layer_tokens(self, output: Any, batch: Mapping[str, Any]) -> LayerTokens:
        query, passage, query_mask, passage_mask = output.layer_tokens
        return LayerTokens(*arrange(query, passage, batch), *arrange(query_mask, passage_mask, batch))

    def add_projection(self, name: str, dimension: int) -> None:
        """Adds a linear layer from this model's vectors to `dimension`, trained along but not exported.

        Its outputs stand in [`RetrieverOutput`]`.projected[name]`; used to compare vectors of different widths.
        """
        projection = Projection(self.embedding_size, dimension).to(self.device, self.dtype)
        # A module's name may not hold a dot, as in a teacher called bge-base-v1.5.
        projection.label = name
        self.training_modules[name.replace(".", "_")] = projection

    # --------------------------------------------------------------------------------------------------- saving

    def _export(self, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        config = self.config
        shared = self.projections.exported("projections", state)
        if self.passage_backbone is None and self.passage_projections is None:
            self._save_tower("backbone", folder, state)
            tail = writing.write_tail(folder, config.pooling, config.hidden_size, shared, config.normalize)
            writing.write_modules(folder, [("", "Transformer"), *tail])
            writing.write_lengths(folder, config.query_length, config.passage_length)
        else:
            self._export_towers(folder, state, shared)
        writing.write_settings(
            folder,
            "SentenceTransformer",
            {"query": config.query_prompt, "document": config.passage_prompt},
            similarity_fn_name=config.similarity,
        )

    def _export_towers(self, folder: Path, state: Mapping[str, torch.Tensor], shared: list) -> None:
        config = self.config
        routes = {}
        own_projections = self.passage_projections is not None
        second = "backbone" if self.passage_backbone is None else "passage_backbone"
        for route, tower, length, attribute in (
            ("query", "backbone", config.query_length, "projections"),
            ("document", second, config.passage_length, "passage_projections"),
        ):
            subfolder = f"{route}_0_Transformer"
            self._save_tower(tower, folder / subfolder, state)
            writing.write_lengths(folder / subfolder, length, length)
            projections = getattr(self, attribute).exported(attribute, state) if own_projections else []
            tail = writing.write_tail(
                folder, config.pooling, config.hidden_size, projections, normalize=False, prefix=f"{route}_"
            )
            routes[route] = [(subfolder, "Transformer"), *tail]
        writing.write_router(folder, routes["query"], routes["document"])
        tail = writing.write_tail(
            folder, None, config.hidden_size, [] if own_projections else shared, config.normalize
        )
        writing.write_modules(folder, [("", "Router"), *tail])

    def _restore(self, folder: Path) -> None:
        layout = layouts.read_layout(folder, str(folder))
        self._restore_tower("backbone", layout.query.folder)
        if self.passage_backbone is not None:
            if layout.passage is None:
                raise RuntimeError("the folder holds one tower, the model has two")
            self._restore_tower("passage_backbone", layout.passage.folder)
        own, second = _projection_layouts(layout)
        self.projections.restore(own)
        if self.passage_projections is not None:
            self.passage_projections.restore(second)


def _settings_of(layout: Layout, backbone: PreTrainedModel, tokenizer: Any, opening: Opening) -> dict[str, Any]:
    """The settings that a layout and the user's wishes make."""
    name, wanted = opening.name, opening.wanted
    query, passage = layout.query, layout.passage or layout.query
    poolings = {tower.pooling for tower in (query, passage)} - {None}
    if len(poolings) > 1 or query.normalize != passage.normalize:
        raise InputError("the two towers pool or normalise differently", where=name)
    if wanted.get("tied") and layout.passage is not None:
        raise InputError("the model has two towers, which cannot become one", where=name, cure="Leave out tied")
    projections = _projection_layouts(layout)
    own, second = ([one.settings() for one in found] for found in projections)
    if own != second:
        raise InputError("the two towers have Dense modules of different shapes", where=name)
    width = wanted.get("projection_dim")
    if width is not None and own and own[-1]["out_features"] != width:
        raise InputError(
            f"projection_dim is {width}, but the model already projects to {own[-1]['out_features']}",
            where=name,
            cure="Leave projection_dim out, or start from a model without a Dense module",
        )
    decoder = any(part.endswith("ForCausalLM") for part in backbone.config.architectures or [])
    settings = opening.settings(
        layout,
        DenseRetriever.recorded_settings,
        **opening.reading(layout, backbone, tokenizer),
        pooling=next(iter(poolings), "last" if decoder else "mean"),
        normalize=query.normalize,
        similarity=layout.similarity or "cosine",
        tied=layout.passage is None,
        tied_projections=projections[0] == projections[1],
    )
    if {"similarity", "normalize"} & set(wanted) and "temperature" not in wanted:
        settings["temperature"] = None
    return settings | ({"projections": own, "projection_dim": own[-1]["out_features"]} if own else {})


def _projection_layouts(layout: Layout) -> tuple[tuple[ProjectionLayout, ...], tuple[ProjectionLayout, ...]]:
    def of(tower: TowerLayout) -> tuple[ProjectionLayout, ...]:
        return (*tower.projections, *layout.shared_projections)

    return of(layout.query), of(layout.passage or layout.query)
