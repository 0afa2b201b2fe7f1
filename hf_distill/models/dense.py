"""Dense retrieval: one vector a text, from one encoder or from two."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from ..errors import InputError
from . import layouts
from .backbones import block_list, freeze_unused, plain_model
from .base import RetrievalConfig, RetrievalModel
from .candidates import arrange
from .layer_scores import LayerTokens, block_outputs, pad_tokens
from .layouts import Layout, ProjectionLayout, TowerLayout
from .loading import choose_length, load_backbone, load_tokenizer
from .processing import TextProcessor, tokenizer_fingerprint
from .projections import Projection, Projections, projection_settings
from .source import ModelSource, find_model


Kind = Literal["query", "passage"]
_POOLINGS = ("cls", "mean", "last")


class DenseRetrieverConfig(RetrievalConfig):
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
        projection_dim: Width of the vectors after a linear layer; None for the backbone's own.
        projections: The linear layers between pooling and normalisation, as dictionaries.
        tied: Whether one encoder reads queries and passages.
        tied_projections: Whether both share the linear layers.
    """

    model_type = "hf_distill_dense"

    pooling: str = "mean"
    normalize: bool = False
    similarity: str = "cosine"
    temperature: float | None = None
    passage_prompt: str = ""
    query_length: int = 512
    passage_length: int = 512
    projection_dim: int | None = None
    projections: list | None = None
    tied: bool = True
    tied_projections: bool = True


@dataclass
class RetrieverOutput(ModelOutput):
    """What a [`DenseRetriever`] gives for a batch.

    Args:
        query: Float32 `[T, D]`, one vector a text of the query batch.
        passage: Float32 `[T, D]`, one vector a text of the passage batch.
        projected: For every projection in `training_modules` its (query, passage) vectors.
        layers: For the chosen layers the pooled (query, passage) vectors, float32 `[T, K, H]` each.
        layer_tokens: Where they were asked for, the tokens' hidden states `[T, K, L, H]` of both, then their masks.
    """

    query: torch.Tensor | None = None
    passage: torch.Tensor | None = None
    projected: dict[str, tuple] | None = field(default=None)
    layers: tuple | None = None
    layer_tokens: tuple | None = None


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


class DenseRetriever(RetrievalModel):
    """An encoder (or two) whose vectors are compared by dot product or cosine.

    Open one with [`DenseRetriever.from_pretrained`]; build one from parts with `DenseRetriever(config, backbone,
    tokenizer)`.

    Args:
        config: The settings.
        backbone: A transformers model without head; made from `config.backbone` if None.
        tokenizer: Its tokenizer.
        passage_backbone: A second one for passages, where `config.tied` is False.
    """

    config_class = DenseRetrieverConfig
    representation = "dense"

    def __init__(
        self,
        config: DenseRetrieverConfig,
        backbone: PreTrainedModel | None = None,
        tokenizer: Any = None,
        passage_backbone: PreTrainedModel | None = None,
    ):
        super().__init__(config, tokenizer)
        _check_settings(config)
        if backbone is None:
            backbone = AutoModel.from_config(AutoConfig.for_model(**config.backbone))
        self.backbone = backbone
        self.passage_backbone = None
        if not config.tied:
            self.passage_backbone = copy.deepcopy(backbone) if passage_backbone is None else passage_backbone
        for tower in self.towers.values():
            freeze_unused(plain_model(tower))
        width = plain_model(backbone).config.hidden_size
        config.hidden_size = width
        config.projections = projection_settings(config.projections, width, config.projection_dim)
        self.projections = Projections(config.projections)
        self.passage_projections = None if config.tied_projections else Projections(config.projections)
        if config.temperature is None:
            config.temperature = 0.05 if config.normalize or config.similarity == "cosine" else 1.0
        config.backbone = plain_model(backbone).config.to_dict()
        if tokenizer is not None:
            tokenizer.model_max_length = max(config.query_length, config.passage_length)

    @classmethod
    def from_pretrained(  # noqa: D417 - overrides are described as one
        cls,
        pretrained_model_name_or_path: str | Path | ModelSource,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "float32",
        attn_implementation: str | None = None,
        **overrides: Any,
    ) -> DenseRetriever:
        """Opens any dense model: a folder or Hub id, of any library, or saved by this class.

        Args:
            pretrained_model_name_or_path: The folder or Hub id.
            revision: Branch, tag or commit on the Hub.
            dtype: The weights' precision; float32 unless said otherwise, whatever the checkpoint's is.
            attn_implementation: Fixes the attention; by default it is chosen by device and mode.
            overrides: Fields of [`DenseRetrieverConfig`] that replace what the checkpoint says.

        Raises:
            InputError: If the model cannot be found, read, or run as a dense retriever.
        """
        unknown = set(overrides) - set(_SETTINGS)
        if unknown:
            raise InputError(
                f"unknown settings {sorted(unknown)}",
                where="DenseRetriever.from_pretrained",
                cure=f"Known are {', '.join(_SETTINGS)}",
            )
        overrides = {key: value for key, value in overrides.items() if value is not None}
        source = find_model(pretrained_model_name_or_path, revision)
        name = source.name
        layout = layouts.read_layout(source.folder, name)
        layouts.expect_kind(layout, "dense", name)
        if layout.kind != "dense" and layout.query.pooling is None and (source.folder / "modules.json").is_file():
            raise InputError("this is a cross-encoder", where=name, cure="Open it with CrossEncoderRanker")
        backbone = load_backbone(layout.query.folder, name, dtype, attention=attn_implementation)
        tokenizer = load_tokenizer(layout.query.folder, name, backbone, layout.query.lowercase)
        passage_backbone = None
        if layout.passage is not None:
            passage_backbone = load_backbone(layout.passage.folder, name, dtype, attention=attn_implementation)
            second = load_tokenizer(layout.passage.folder, name, passage_backbone, layout.passage.lowercase)
            length = layout.passage.max_length or second.model_max_length
            layout = replace(layout, passage=replace(layout.passage, max_length=length))
            if tokenizer_fingerprint(second) != tokenizer_fingerprint(tokenizer):
                raise InputError(
                    "the two towers have different tokenizers", where=name, cure="Give towers that share a tokenizer"
                )
        config, projections = _settings_of(layout, backbone, tokenizer, overrides, name)
        config.name_or_path = name
        model = cls(config, backbone, tokenizer, passage_backbone)
        model.projections.fill(projections[0])
        if model.passage_projections is not None:
            model.passage_projections.fill(projections[1])
        model.to(backbone.dtype)
        model.source = source
        model.attention_is_fixed = attn_implementation is not None
        return model.eval()

    @property
    def towers(self) -> dict[str, nn.Module]:
        towers = {"backbone": self.backbone}
        if self.passage_backbone is not None:
            towers["passage_backbone"] = self.passage_backbone
        return towers

    @property
    def embedding_size(self) -> int:
        """Width of the vectors."""
        return self.projections[-1].out_features if len(self.projections) else self.config.hidden_size

    def processor(self) -> TextProcessor:
        config = self.config
        return TextProcessor(
            tokenizer=self.tokenizer,
            kind="bi",
            query_prompt=config.query_prompt,
            passage_prompt=config.passage_prompt,
            query_length=config.query_length,
            passage_length=config.passage_length,
            template=config.template,
        )

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
        if layers:
            return self._encode_layers(chunk, kind, embeddings, layers, layer_tokens)
        second = kind == "passage"
        tower = self.passage_backbone if second and self.passage_backbone is not None else self.backbone
        hidden = tower(**self._inputs(tower, chunk, embeddings)).last_hidden_state
        vectors = pool(hidden, chunk["attention_mask"], self.config.pooling)
        projections = self.passage_projections if second and self.passage_projections is not None else self.projections
        vectors = projections(vectors)
        return F.normalize(vectors, dim=-1) if self.config.normalize else vectors

    def _encode_layers(
        self,
        chunk: Mapping[str, torch.Tensor],
        kind: Kind,
        embeddings: torch.Tensor | None,
        layers: Sequence[int],
        layer_tokens: bool,
    ) -> tuple[torch.Tensor, ...]:
        second = kind == "passage" and self.passage_backbone is not None
        tower = self.passage_backbone if second else self.backbone
        with block_outputs(block_list(plain_model(tower))[1], layers) as found:
            vectors = self.encode(chunk, kind, embeddings)
        pooled = [pool(found[number], chunk["attention_mask"], self.config.pooling) for number in layers]
        if not layer_tokens:
            return vectors, torch.stack(pooled, 1)
        tokens = torch.stack([found[number].float() for number in layers], 1)
        return vectors, torch.stack(pooled, 1), chunk["attention_mask"].bool(), tokens

    def forward(
        self,
        query: Mapping[str, Any] | None = None,
        passage: Mapping[str, Any] | None = None,
        layers: Sequence[int] = (),
        layer_tokens: bool = False,
    ) -> RetrieverOutput:
        """Vectors of a batch of queries and a batch of passages, in one call.

        Args:
            query: A token batch: `chunks`, each with `input_ids` and `attention_mask` `[t_i, l_i]`, and `inverse`
                `[T]`, which restores the order of the texts.
            passage: The same for passages.
            layers: Numbers of layers, from 1, whose pooled vectors are wanted too.
            layer_tokens: Whether their tokens' hidden states are wanted as well.
        """
        batches = {kind: batch for kind, batch in (("query", query), ("passage", passage)) if batch is not None}
        if self.passage_backbone is None:
            chunks = [chunk for batch in batches.values() for chunk in batch["chunks"]]
            embeddings = iter(self._embedded(self.backbone, chunks))
        else:
            embeddings = iter(
                [
                    found
                    for kind, batch in batches.items()
                    for found in self._embedded(
                        self.backbone if kind == "query" else self.passage_backbone, batch["chunks"]
                    )
                ]
            )
        vectors: dict[str, torch.Tensor] = {}
        of_layers: dict[str, torch.Tensor] = {}
        tokens: dict[str, list[torch.Tensor]] = {}
        for kind, batch in batches.items():
            parts: list[Any] = [
                self._maybe_recompute(self.encode, chunk, kind, next(embeddings), layers, layer_tokens)
                for chunk in batch["chunks"]
            ]
            if layer_tokens and layers:
                longest = max(part[2].shape[1] for part in parts)
                padded = [(pad_tokens(part[2], longest, 1), pad_tokens(part[3], longest, 2)) for part in parts]
                tokens[kind] = [torch.cat(same)[batch["inverse"]] for same in zip(*padded)]
            if layers:
                of_layers[kind] = torch.cat([part[1] for part in parts])[batch["inverse"]]
                parts = [part[0] for part in parts]
            vectors[kind] = torch.cat(parts)[batch["inverse"]]
        query_vectors, passage_vectors = vectors.get("query"), vectors.get("passage")
        projected = {
            getattr(module, "label", name): tuple(
                None if one is None else module(one) for one in (query_vectors, passage_vectors)
            )
            for name, module in self.training_modules.items()
            if isinstance(module, nn.Linear)
        }
        return RetrieverOutput(
            query=query_vectors,
            passage=passage_vectors,
            projected=projected or None,
            layers=(of_layers.get("query"), of_layers.get("passage")) if layers else None,
            layer_tokens=tuple(tokens[kind][part] for part in (1, 0) for kind in tokens) if tokens else None,
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

    def similarity_scores(self, query: torch.Tensor, passage: torch.Tensor) -> torch.Tensor:
        """Training scores of queries `[Q, D]` with passages `[C, D]`: float32 `[Q, C]`, divided by the temperature."""
        return self._compare(query, passage, lambda q, p: q @ p.T)

    def own_scores(self, query: torch.Tensor, passage: torch.Tensor) -> torch.Tensor:
        """Training scores of queries `[Q, D]` with each one's own passages `[Q, M, D]`: float32 `[Q, M]`."""
        return self._compare(query, passage, lambda q, p: (p @ q.unsqueeze(-1)).squeeze(-1))

    def _compare(self, query: torch.Tensor, passage: torch.Tensor, product: Any) -> torch.Tensor:
        with torch.autocast(query.device.type, enabled=False):
            query, passage = query.float(), passage.float()
            if self.config.similarity == "cosine" and not self.config.normalize:
                query, passage = F.normalize(query, dim=-1), F.normalize(passage, dim=-1)
            return product(query, passage) / self.config.temperature

    # --------------------------------------------------------------------------------------------------- saving

    def _export(self, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        config = self.config
        shared = self.projections.exported("projections", state)
        if self.passage_backbone is None and self.passage_projections is None:
            self._save_tower("backbone", folder, state)
            tail = layouts.write_tail(folder, config.pooling, config.hidden_size, shared, config.normalize)
            layouts.write_modules(folder, [("", "Transformer"), *tail])
            layouts.write_lengths(folder, config.query_length, config.passage_length)
        else:
            self._export_towers(folder, state, shared)
        layouts.write_settings(
            folder,
            "SentenceTransformer",
            {"query": config.query_prompt, "document": config.passage_prompt},
            similarity_fn_name=config.similarity,
        )
        layouts.write_json(
            folder / layouts.EXTRA_FILE,
            {"archetype": "dense", "temperature": config.temperature, "template": config.template},
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
            layouts.write_lengths(folder / subfolder, length, length)
            projections = getattr(self, attribute).exported(attribute, state) if own_projections else []
            tail = layouts.write_tail(
                folder, config.pooling, config.hidden_size, projections, normalize=False, prefix=f"{route}_"
            )
            routes[route] = [(subfolder, "Transformer"), *tail]
        layouts.write_router(folder, routes["query"], routes["document"])
        tail = layouts.write_tail(
            folder, None, config.hidden_size, [] if own_projections else shared, config.normalize
        )
        layouts.write_modules(folder, [("", "Router"), *tail])

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


_SETTINGS = (
    "pooling", "normalize", "similarity", "temperature", "query_prompt", "passage_prompt", "query_length",
    "passage_length", "template", "projection_dim", "tied",
)  # fmt: skip


def _check_settings(config: DenseRetrieverConfig) -> None:
    for option, known in (("pooling", _POOLINGS), ("similarity", ("dot", "cosine"))):
        if getattr(config, option) not in known:
            raise InputError(f"{option} is {getattr(config, option)!r}", cure=f"Choose one of {', '.join(known)}")
    if config.temperature is not None and not config.temperature > 0:
        raise InputError(f"temperature is {config.temperature}", cure="Choose a positive number")


def _settings_of(
    layout: Layout, backbone: PreTrainedModel, tokenizer: Any, overrides: dict[str, Any], name: str
) -> tuple[DenseRetrieverConfig, tuple[tuple[ProjectionLayout, ...], tuple[ProjectionLayout, ...]]]:
    """The configuration a layout and the user's overrides make, and the projections to load per tower."""
    query, passage = layout.query, layout.passage or layout.query
    poolings = {tower.pooling for tower in (query, passage)} - {None}
    if len(poolings) > 1 or query.normalize != passage.normalize:
        raise InputError("the two towers pool or normalise differently", where=name)
    decoder = any(part.endswith("ForCausalLM") for part in backbone.config.architectures or [])
    projections = _projection_layouts(layout)
    wanted = overrides.get("projection_dim")
    if wanted is not None:
        have = projections[0][-1].out_features if projections[0] else None
        if have is not None and have != wanted:
            raise InputError(
                f"projection_dim is {wanted}, but the model already projects to {have}",
                where=name,
                cure="Leave projection_dim out, or start from a model without a Dense module",
            )
    settings: dict[str, Any] = {
        "pooling": next(iter(poolings), "last" if decoder else "mean"),
        "normalize": query.normalize,
        "similarity": layout.similarity or "cosine",
        "query_prompt": layout.query_prompt,
        "passage_prompt": layout.passage_prompt,
        "tied": layout.passage is None,
        **{key: layout.extra[key] for key in ("temperature", "template") if layout.extra.get(key) is not None},
        **overrides,
    }
    if {"similarity", "normalize"} & set(overrides) and "temperature" not in overrides:
        settings["temperature"] = None
    if overrides.get("tied") and layout.passage is not None:
        raise InputError("the model has two towers, which cannot become one", where=name, cure="Leave out tied")
    own, second = ([one.settings() for one in found] for found in projections)
    if own != second:
        raise InputError("the two towers have Dense modules of different shapes", where=name)
    for option, tower, recorded in (
        ("query_length", query, query.query_length),
        ("passage_length", passage, passage.passage_length),
    ):
        settings[option] = choose_length(
            overrides.get(option), recorded or tower.max_length, tokenizer, backbone, name, option
        )
    if own:
        settings["projections"] = own
        settings["projection_dim"] = own[-1]["out_features"]
    settings["tied_projections"] = projections[0] == projections[1]
    return DenseRetrieverConfig(**settings), projections


def _projection_layouts(layout: Layout) -> tuple[tuple[ProjectionLayout, ...], tuple[ProjectionLayout, ...]]:
    def of(tower: TowerLayout) -> tuple[ProjectionLayout, ...]:
        return (*tower.projections, *layout.shared_projections)

    return of(layout.query), of(layout.passage or layout.query)
