"""Multi-vector retrieval: one vector a token, compared by MaxSim (late interaction)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AddedToken, AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from ..distributed import gather_rows, max_over_processes
from ..errors import InputError
from ..losses.maxsim import maxsim, own_maxsim
from . import layouts
from .backbones import freeze_unused, plain_model
from .base import RetrievalConfig, RetrievalModel
from .candidates import arrange, take_rows
from .dense import Kind
from .layer_scores import LayerTokens, block_outputs, pad_tokens
from .layouts import ProjectionLayout
from .loading import choose_length, load_backbone, load_tokenizer, longest_input, quiet_transformers
from .processing import TextProcessor
from .projections import Projections, projection_settings
from .source import ModelSource, find_model
from .token_layouts import PUNCTUATION, TokenLayout, fits_pylate, read_token_layout, write_native, write_pylate


LAYOUTS = ("inserted", "lead")
# Marker tokens of a new model: those that BERT's vocabulary has to spare, else new ones.
_SPARE_MARKERS = ("[unused0]", "[unused1]")
_NEW_MARKERS = ("[Q] ", "[D] ")
_LEAD_MARKERS = ("[unused1]", "[unused2]")


class MultiVectorConfig(RetrievalConfig):
    """Settings of a [`MultiVectorRetriever`].

    Args:
        query_marker: The token after [CLS] that says that this is a query; empty for none.
        passage_marker: The same for passages.
        query_prompt: Text put before every query, after the marker.
        passage_prompt: Text put before every passage, after the marker.
        query_length: Most tokens of a query.
        passage_length: Most tokens of a passage.
        query_expansion: Width that queries are filled up to with [MASK] tokens, which count in MaxSim ("query
            augmentation"); 0 for none.
        attend_to_expansion: Whether the encoder attends to that fill.
        expansion_token: What to fill with instead of [MASK].
        skip_words: Tokens of passages that do not count, punctuation for example.
        normalize: Whether token vectors are scaled to length 1.
        temperature: What scores are divided by in training.
        projection_dim: Width of the vectors after a linear layer; 0 for the backbone's own.
        projections: The linear layers on token vectors, as dictionaries.
        layout: `"inserted"` puts the markers after [CLS]; `"lead"` replaces [CLS] by them and cuts queries without
            keeping [SEP], as the code of LEAD does. It is for fidelity, and cannot be exported.
        template: How a document's title and text become one passage.
    """

    model_type = "hf_distill_multi_vector"

    query_marker: str = ""
    passage_marker: str = ""
    passage_prompt: str = ""
    query_length: int = 32
    passage_length: int = 180
    query_expansion: int = 32
    attend_to_expansion: bool = False
    expansion_token: str | None = None
    skip_words: list | None = None
    normalize: bool = True
    temperature: float = 1.0
    projection_dim: int | None = None
    projections: list | None = None
    layout: str = "inserted"


@dataclass
class TokenVectors:
    """Vectors of the tokens of T texts, padded to one length.

    Args:
        vectors: Float32 `[T, L, D]`.
        mask: Boolean `[T, L]`, the tokens that count.
        layers: Float32 `[T, L, H]` each, the hidden states of the chosen layers.
    """

    vectors: torch.Tensor
    mask: torch.Tensor
    layers: tuple[torch.Tensor, ...] = ()


@dataclass
class MultiVectorOutput(ModelOutput):
    """What a [`MultiVectorRetriever`] gives for a batch.

    Args:
        query: `(vectors [T, L, D], mask [T, L])` of the query batch.
        passage: The same of the passage batch.
        layers: The (query, passage) hidden states of the chosen layers, a tuple of float32 `[T, L, H]` each.
    """

    query: tuple | None = None
    passage: tuple | None = None
    layers: tuple | None = None


class LeadTextProcessor(TextProcessor):
    """The reading of the original code of LEAD: a marker in the place of [CLS], queries cut without keeping [SEP]."""

    markers: tuple[int, int] = (0, 0)

    def queries(self, texts: Sequence[str]) -> list[list[int]]:
        rows = self._single(texts, self.query_prompt, self.query_length + 1)
        whole = self._single(texts, self.query_prompt, self.tokenizer.model_max_length)
        # Cut text has lost its [SEP] there, text that fits has kept it.
        cut = [full if len(full) <= self.query_length else row[:-1] for row, full in zip(rows, whole)]
        return [[self.markers[0], *row[1:]] for row in cut]

    def passages(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self.markers[1], *row[1:]] for row in super().passages(texts)]

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "layout": "lead", "markers": list(self.markers)}


class MultiVectorRetriever(RetrievalModel):
    """An encoder whose token vectors are compared by MaxSim.

    Khattab and Zaharia, "ColBERT: Efficient and Effective Passage Search via Contextualized Late Interaction over
    BERT" (2020, https://arxiv.org/abs/2004.12832). Open one with [`MultiVectorRetriever.from_pretrained`].

    Args:
        config: The settings.
        backbone: A transformers model without head; made from `config.backbone` if None.
        tokenizer: Its tokenizer, which knows the markers.
    """

    config_class = MultiVectorConfig
    representation = "tokens"

    def __init__(self, config: MultiVectorConfig, backbone: PreTrainedModel | None = None, tokenizer: Any = None):
        super().__init__(config, tokenizer)
        if backbone is None:
            backbone = AutoModel.from_config(AutoConfig.for_model(**config.backbone))
        self.backbone = backbone
        freeze_unused(plain_model(backbone))
        config.hidden_size = width = plain_model(backbone).config.hidden_size
        config.skip_words = list(config.skip_words or [])
        config.projections = projection_settings(config.projections, width, config.projection_dim)
        self.projections = Projections(config.projections)
        config.projection_dim = config.projections[-1]["out_features"] if config.projections else 0
        config.backbone = plain_model(backbone).config.to_dict()
        _check_settings(config)
        self._skipped, self._fill = [], None
        if tokenizer is not None:
            self._read_tokenizer(tokenizer)

    def _read_tokenizer(self, tokenizer: Any) -> None:
        config = self.config
        tokenizer.model_max_length = longest_input(plain_model(self.backbone)) or 1 << 20
        ids = [tokenizer.convert_tokens_to_ids(word) for word in config.skip_words]
        # A word that is no token of its own would stand for all unknown words.
        self._skipped = [one for one in ids if one is not None and one != tokenizer.unk_token_id]
        if not config.query_expansion:
            return
        if tokenizer.padding_side != "right":
            raise InputError(
                "queries are filled up on their right, but the tokenizer pads on the left",
                where="query_expansion",
                cure="Set query_expansion to 0",
            )
        fill = config.expansion_token
        self._fill = tokenizer.mask_token_id if fill is None else tokenizer.convert_tokens_to_ids(fill)
        if self._fill is None and fill is None:
            self._fill = tokenizer.eos_token_id
        if self._fill is None or (fill is not None and self._fill == tokenizer.unk_token_id):
            raise InputError(
                f"the tokenizer has no token {fill or '[MASK]'} to fill queries up with",
                where="query_expansion",
                cure="Set query_expansion to 0, or expansion_token to a token of its vocabulary",
            )

    @classmethod
    def from_pretrained(  # noqa: D417 - overrides are described as one
        cls,
        pretrained_model_name_or_path: str | Path | ModelSource,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "float32",
        attn_implementation: str | None = None,
        **overrides: Any,
    ) -> MultiVectorRetriever:
        """Opens a multi-vector model of PyLate, sentence-transformers or Stanford's ColBERT, or makes one of any
        encoder, with a new projection (to be trained).

        Args:
            pretrained_model_name_or_path: The folder or Hub id.
            revision: Branch, tag or commit on the Hub.
            dtype: The weights' precision; float32 unless said otherwise, whatever the checkpoint's is.
            attn_implementation: Fixes the attention; by default it is chosen by device and mode.
            overrides: Fields of [`MultiVectorConfig`] that replace what the checkpoint says, and `skip_punctuation`
                (leave punctuation out of passages). A new model has a projection to 128 dimensions, none with
                `projection_dim=0`.

        Raises:
            InputError: If the model cannot be found, read, or run as a multi-vector model.
        """
        unknown = set(overrides) - set(_SETTINGS)
        if unknown:
            raise InputError(
                f"unknown settings {sorted(unknown)}",
                where="MultiVectorRetriever.from_pretrained",
                cure=f"Known are {', '.join(_SETTINGS)}",
            )
        overrides = {key: value for key, value in overrides.items() if value is not None}
        source = find_model(pretrained_model_name_or_path, revision)
        name = source.name
        layout = read_token_layout(source.folder, name)
        backbone = load_backbone(layout.folder, name, dtype, attention=attn_implementation)
        tokenizer = load_tokenizer(layout.folder, name, backbone, layout.lowercase)
        layout = _with_inline_projection(layout)
        config = _config_of(layout, backbone, tokenizer, overrides, name)
        config.name_or_path = name
        _register_markers(backbone, tokenizer, (config.query_marker, config.passage_marker))
        model = cls(config, backbone, tokenizer)
        model.projections.fill(layout.projections)
        model.to(backbone.dtype)
        model.source = source
        model.attention_is_fixed = attn_implementation is not None
        return model.eval()

    @property
    def token_size(self) -> int:
        """Width of the token vectors."""
        return self.projections[-1].out_features if len(self.projections) else self.config.hidden_size

    def processor(self) -> TextProcessor:
        config = self.config
        settings = {
            "tokenizer": self.tokenizer,
            "kind": "bi",
            "query_length": config.query_length,
            "passage_length": config.passage_length,
            "template": config.template,
        }
        if config.layout == "lead":
            processor = LeadTextProcessor(
                **settings, query_prompt=config.query_prompt, passage_prompt=config.passage_prompt
            )
            processor.markers = tuple(
                self.tokenizer.convert_tokens_to_ids(marker) for marker in (config.query_marker, config.passage_marker)
            )
            return processor
        return TextProcessor(
            **settings,
            query_prompt=config.query_marker + config.query_prompt,
            passage_prompt=config.passage_marker + config.passage_prompt,
        )

    def settings(self) -> dict[str, Any]:
        config = self.config
        return {
            "normalize": config.normalize,
            "query_expansion": config.query_expansion,
            "attend_to_expansion": config.attend_to_expansion,
            "expansion_token": config.expansion_token,
            "skip_words": config.skip_words,
            "activations": [settings["activation"] for settings in config.projections],
        }

    # -------------------------------------------------------------------------------------------------- running

    def expanded(self, chunk: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """A chunk of queries filled up with [MASK] tokens, and which of its tokens count (boolean `[t, l]`)."""
        ids, attention = chunk["input_ids"], chunk["attention_mask"]
        width = self.config.query_expansion
        if not width:
            return dict(chunk), attention.bool()
        missing = max(0, width - ids.shape[1])
        ids, attention = F.pad(ids, (0, missing)), F.pad(attention, (0, missing))
        filled = (attention == 0) & (torch.arange(ids.shape[1], device=ids.device) < width)
        counted = attention.bool() | filled
        if self.config.attend_to_expansion:
            attention = attention.masked_fill(filled, 1)
        return {"input_ids": ids.masked_fill(filled, self._fill), "attention_mask": attention}, counted

    def encode(
        self,
        chunk: Mapping[str, torch.Tensor],
        kind: Kind,
        embeddings: torch.Tensor | None = None,
        layers: Sequence[int] = (),
    ) -> tuple[torch.Tensor, ...]:
        """Token vectors of one padded chunk.

        Args:
            chunk: `input_ids` and `attention_mask`, `[t, l]`; queries not yet filled up.
            kind: `"query"` or `"passage"`.
            embeddings: The word embeddings `[t, l, H]` of the chunk (of queries: of the filled one), where they are
                known already.
            layers: Numbers of layers, from 1, whose hidden states are wanted too.

        Returns:
            Float32 `[t, l, D]`, the boolean mask `[t, l]` of the tokens that count, and float32 `[t, l, H]` for each
            of `layers`.
        """
        if kind == "query":
            chunk, counted = self.expanded(chunk)
        else:
            counted = chunk["attention_mask"].bool()
            if self._skipped:
                skipped = torch.tensor(self._skipped, device=counted.device)
                counted = counted & ~torch.isin(chunk["input_ids"], skipped)
        inputs = self._inputs(self.backbone, chunk, embeddings)
        with block_outputs(self.blocks if layers else (), layers) as found:
            vectors = self.backbone(**inputs).last_hidden_state
        vectors = self.projections(vectors).float()
        if self.config.normalize:
            vectors = F.normalize(vectors, dim=-1)
        return vectors, counted, *(found[number].float() for number in layers)

    def forward(
        self,
        query: Mapping[str, Any] | None = None,
        passage: Mapping[str, Any] | None = None,
        layers: Sequence[int] = (),
        layer_tokens: bool = False,
    ) -> MultiVectorOutput:
        """Token vectors of a batch of queries and a batch of passages, in one call.

        Args:
            query: A token batch: `chunks`, each with `input_ids` and `attention_mask` `[t_i, l_i]`, and `inverse`
                `[T]`, which restores the order of the texts.
            passage: The same for passages.
            layers: Numbers of layers, from 1, whose hidden states are wanted too.
            layer_tokens: As in other retrievers; here a layer always is its tokens.
        """
        batches = {kind: batch for kind, batch in (("query", query), ("passage", passage)) if batch is not None}
        seen = [
            self.expanded(chunk)[0] if kind == "query" else chunk
            for kind, batch in batches.items()
            for chunk in batch["chunks"]
        ]
        embeddings = iter(self._embedded(self.backbone, seen))
        found: dict[str, TokenVectors] = {}
        for kind, batch in batches.items():
            parts = [
                self._maybe_recompute(self.encode, chunk, kind, next(embeddings), layers) for chunk in batch["chunks"]
            ]
            longest = max(part[1].shape[1] for part in parts)
            padded = [[pad_tokens(one, longest, 1) for one in part] for part in parts]
            vectors, mask, *of_layers = (take_rows(torch.cat(same), batch["inverse"]) for same in zip(*padded))
            found[kind] = TokenVectors(vectors, mask, tuple(of_layers))
        both = [found.get("query"), found.get("passage")]
        return MultiVectorOutput(
            *(None if one is None else (one.vectors, one.mask) for one in both),
            layers=tuple(None if one is None else one.layers for one in both) if layers else None,
        )

    def batch_scores(self, output: Any, batch: Mapping[str, Any], candidates: str) -> torch.Tensor:
        vectors = arrange(output.query[0], output.passage[0], batch)
        masks = arrange(output.query[1], output.passage[1], batch)
        return token_scores(*vectors, *masks, candidates) / self.config.temperature

    def layer_scores(self, output: Any, batch: Mapping[str, Any], candidates: str) -> torch.Tensor:
        masks = arrange(output.query[1], output.passage[1], batch)
        # One by one: stacked they would be copied, and again for each matrix product.
        layers = (arrange(*layer, batch) for layer in zip(*output.layers))
        return torch.stack([token_scores(*layer, *masks, candidates) for layer in layers])

    def layer_tokens(self, output: Any, batch: Mapping[str, Any]) -> LayerTokens:
        layers, masks = (torch.stack(one, 1) for one in output.layers), (output.query[1], output.passage[1])
        return LayerTokens(*arrange(*layers, batch), *arrange(*masks, batch))

    # --------------------------------------------------------------------------------------------------- saving

    def check_export(self) -> None:
        check_exportable(self.config)

    def save_pretrained(self, *arguments: Any, **options: Any) -> None:
        """Writes the native folder: PyLate's layout where it fits, else that of sentence-transformers 6.

        Raises:
            InputError: For the layout of LEAD, which no library opens.
        """
        self.check_export()
        super().save_pretrained(*arguments, **options)

    def _export(self, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        config = self.config
        projections = self.projections.exported("projections", state)
        self._save_tower("backbone", folder, state)
        (write_pylate if fits_pylate(config) else write_native)(folder, config, projections)
        layouts.write_json(
            folder / layouts.EXTRA_FILE,
            {"archetype": "multi-vector", "temperature": config.temperature, "template": config.template},
        )

    def _restore(self, folder: Path) -> None:
        layout = read_token_layout(folder, str(folder))
        self._restore_tower("backbone", layout.folder)
        self.projections.restore(layout.projections)


def token_scores(
    query: torch.Tensor,
    passage: torch.Tensor,
    query_mask: torch.Tensor,
    passage_mask: torch.Tensor,
    candidates: str,
) -> torch.Tensor:
    """MaxSim of every query with its candidates, float32.

    Args:
        query: `[Q, Lq, D]`.
        passage: `[Q, M, Ld, D]`, the row's own candidates.
        query_mask: Boolean `[Q, Lq]`.
        passage_mask: Boolean `[Q, M, Ld]`. It is gathered with the tokens: every process must know which tokens of
            the others' passages are padding.
        candidates: `"own"` gives `[Q, M]`, `"in_batch"` `[Q, Q·M]`, `"global"` `[W·Q, W·Q·M]`.
    """
    with torch.autocast(query.device.type, enabled=False):
        if candidates == "own":
            return own_maxsim(query.float(), passage.float(), passage_mask, query_mask)
        passage, passage_mask = passage.flatten(0, 1), passage_mask.flatten(0, 1)
        if candidates == "global":
            query, query_mask = _gather_tokens(query, query_mask)
            passage, passage_mask = _gather_tokens(passage, passage_mask)
        return maxsim(query.float(), passage.float(), passage_mask, query_mask)


def _gather_tokens(vectors: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[n, L, D]` and `[n, L]` of all processes, padded to the longest text of any of them."""
    longest = max_over_processes(mask.shape[1], mask.device)
    return gather_rows(pad_tokens(vectors, longest, 1)), gather_rows(pad_tokens(mask, longest, 1))


def check_exportable(config: MultiVectorConfig) -> None:
    """Raises [`InputError`] for a model that cannot be written so that other libraries read it the same way."""
    if config.layout == "lead":
        raise InputError(
            "a model that replaces [CLS] by its markers has no layout that other libraries read",
            where="layout",
            cure="Train with layout 'inserted' to export; 'lead' is for comparing with the original code",
        )


# ------------------------------------------------------------------------------------------------------- opening

_SETTINGS = (
    "query_marker", "passage_marker", "query_prompt", "passage_prompt", "query_length", "passage_length",
    "query_expansion", "attend_to_expansion", "expansion_token", "skip_words", "skip_punctuation", "normalize",
    "temperature", "projection_dim", "layout", "template",
)  # fmt: skip


def _check_settings(config: MultiVectorConfig) -> None:
    if config.layout not in LAYOUTS:
        raise InputError(f"layout is {config.layout!r}", cure=f"Choose one of {', '.join(LAYOUTS)}")
    if not config.temperature > 0:
        raise InputError(f"temperature is {config.temperature}", cure="Choose a positive number")
    if not 0 <= config.query_expansion <= config.query_length:
        raise InputError(
            f"queries of at most {config.query_length} tokens cannot be filled up to {config.query_expansion}",
            where="query_expansion",
            cure="Choose 0 (none) to query_length",
        )


def _config_of(
    layout: TokenLayout, backbone: PreTrainedModel, tokenizer: Any, overrides: dict[str, Any], name: str
) -> MultiVectorConfig:
    """The configuration that a layout and the user's overrides make."""
    lead = overrides.get("layout") == "lead"
    settings = dict(overrides)
    if settings.pop("skip_punctuation", None):
        settings["skip_words"] = list(PUNCTUATION)
    elif overrides.get("skip_punctuation") is False:
        settings["skip_words"] = []
    wanted = settings.pop("projection_dim", None)
    have = layout.projections[-1].out_features if layout.projections else 0 if layout.is_multi_vector else None
    if wanted is not None and have is not None and wanted != have:
        raise InputError(
            f"projection_dim is {wanted}, but the model has {have or 'no projection'}",
            where=name,
            cure="Leave projection_dim out, or start from a model without a Dense module",
        )
    settings.setdefault("skip_words", list(layout.skip_words))
    settings.setdefault("normalize", layout.normalize)
    for option in ("template", "temperature"):
        if getattr(layout, option) is not None:
            settings.setdefault(option, getattr(layout, option))
    markers, prompts = layout.markers, layout.prompts
    if lead:
        markers = _LEAD_MARKERS
    elif markers is None:
        markers, prompts = _markers_of(layout, tokenizer)
    for kind, marker, prompt, recorded in zip(
        ("query", "passage"), markers, prompts, (layout.query_length, layout.passage_length)
    ):
        settings.setdefault(f"{kind}_marker", marker)
        settings.setdefault(f"{kind}_prompt", prompt)
        usual = recorded or {"query": 32, "passage": 180}[kind]
        limit = longest_input(backbone)
        option = f"{kind}_length"
        settings[option] = choose_length(
            settings.get(option), usual if limit is None else min(usual, limit), tokenizer, backbone, name, option
        )
    expansion = layout.expansion
    if expansion is None or (expansion and expansion == layout.query_length):
        # The usual width is that of the queries, also of queries that were given another length.
        expansion = settings["query_length"]
    if tokenizer.padding_side == "left" and not layout.is_multi_vector:
        expansion = 0
    settings.setdefault("query_expansion", expansion)
    settings.setdefault("attend_to_expansion", layout.attend or lead)
    settings.setdefault("expansion_token", layout.expansion_token)
    if layout.projections:
        settings["projections"] = [projection.settings() for projection in layout.projections]
    elif layout.is_multi_vector:
        settings["projection_dim"] = 0
    else:
        settings["projection_dim"] = 128 if wanted is None else wanted
    return MultiVectorConfig(**settings)


def _markers_of(layout: TokenLayout, tokenizer: Any) -> tuple[tuple[str, str], tuple[str, str]]:
    """Markers and prompts where the folder does not tell them apart, or of a new model."""
    if not layout.is_multi_vector:
        vocabulary = tokenizer.get_vocab()
        spare = all(marker in vocabulary for marker in _SPARE_MARKERS)
        return (_SPARE_MARKERS if spare else _NEW_MARKERS), ("", "")
    added = set(tokenizer.get_added_vocab())
    found = [tokenizer.tokenize(prompt) for prompt in layout.prompts]
    if all(len(pieces) == 1 and pieces[0] in added for pieces in found):
        return layout.prompts, ("", "")
    return ("", ""), layout.prompts


def _register_markers(backbone: PreTrainedModel, tokenizer: Any, markers: tuple[str, str]) -> None:
    """Makes every marker one token that text cannot split, and gives new ones an embedding."""
    vocabulary = tokenizer.get_vocab()
    wanted = []
    for marker in markers:
        # Stanford's markers stand in the text with a space after them, which belongs to no token.
        token = marker if marker in vocabulary or marker.strip() not in vocabulary else marker.strip()
        if token and tokenizer.tokenize(token) != [token]:
            wanted.append(AddedToken(token, normalized=False, special=True))
    if wanted:
        tokenizer.add_special_tokens({"additional_special_tokens": wanted}, replace_extra_special_tokens=False)
    largest = max(tokenizer.get_vocab().values())
    if largest >= backbone.get_input_embeddings().num_embeddings:
        with quiet_transformers():
            backbone.resize_token_embeddings(largest + 1, mean_resizing=False)


def _with_inline_projection(layout: TokenLayout) -> TokenLayout:
    """The layout with the projection that stands beside the transformer's weights, in Stanford's checkpoints."""
    if not layout.inline_projection:
        return layout
    from safetensors import safe_open

    path = layout.folder / "model.safetensors"
    if not path.is_file():
        raise InputError("the folder holds no model.safetensors", where=str(layout.folder), cure="Download it again")
    with safe_open(path, "pt") as weights:
        width, hidden = weights.get_slice("linear.weight").get_shape()
    return replace(layout, projections=(ProjectionLayout(hidden, width, bias=False, folder=layout.folder),))
