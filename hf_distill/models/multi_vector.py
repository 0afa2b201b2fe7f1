"""Multi-vector retrieval: one vector a token, compared by MaxSim (late interaction)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..distributed import gather_rows, max_over_processes
from ..errors import InputError
from ..losses.maxsim import maxsim, own_maxsim
from .backbones import plain_model
from .bi_encoder import BiEncoder, BiEncoderConfig, Both, Kind
from .candidates import arrange
from .layer_scores import LayerTokens, pad_tokens
from .loading import longest_input
from .markers import LEAD_MARKERS, LeadTextProcessor, choose_markers, register_markers
from .opening import Opening
from .processing import TextProcessor
from .projections import Projections, projection_settings
from .token_layouts import PUNCTUATION, TokenLayout, fits_pylate, read_token_layout, write_native, write_pylate


LAYOUTS = ("inserted", "lead")


class MultiVectorConfig(BiEncoderConfig):
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
    query_length: int = 32
    passage_length: int = 180
    query_expansion: int = 32
    attend_to_expansion: bool = False
    expansion_token: str | None = None
    skip_words: list | None = None
    normalize: bool = True
    projection_dim: int | None = None
    projections: list | None = None
    layout: str = "inserted"

    def check(self) -> None:
        super().check()
        if self.layout not in LAYOUTS:
            raise InputError(f"layout is {self.layout!r}", cure=f"Choose one of {', '.join(LAYOUTS)}")
        if not 0 <= self.query_expansion <= self.query_length:
            raise InputError(
                f"queries of at most {self.query_length} tokens cannot be filled up to {self.query_expansion}",
                where="query_expansion",
                cure="Choose 0 (none) to query_length",
            )


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


class MultiVectorRetriever(BiEncoder):
    """An encoder whose token vectors are compared by MaxSim.

    Khattab and Zaharia, "ColBERT: Efficient and Effective Passage Search via Contextualized Late Interaction over
    BERT" (2020, https://arxiv.org/abs/2004.12832).

    [`MultiVectorRetriever.from_pretrained`] opens a multi-vector model of PyLate, sentence-transformers or Stanford's
    ColBERT, or makes one of any encoder, with a new projection (to be trained). Its options are fields of
    [`MultiVectorConfig`] and `skip_punctuation` (leave punctuation out of passages). A new model has a projection to
    128 dimensions, none with `projection_dim=0`.

    Args:
        config: The settings.
        backbone: A transformers model without head; made from `config.backbone` if None.
        tokenizer: Its tokenizer, which knows the markers.
    """

    config_class = MultiVectorConfig
    archetype = "multi-vector"
    representation = "tokens"
    known_settings = (
        "query_marker", "passage_marker", "query_prompt", "passage_prompt", "query_length", "passage_length",
        "query_expansion", "attend_to_expansion", "expansion_token", "skip_words", "skip_punctuation", "normalize",
        "temperature", "projection_dim", "layout", "template",
    )  # fmt: skip
    recorded_settings = ("temperature", "template")
    # The vectors of tokens, which of them count, and the tokens in each layer.
    token_dims = (1,)

    def __init__(self, config: MultiVectorConfig, backbone: PreTrainedModel | None = None, tokenizer: Any = None):
        super().__init__(config, backbone, tokenizer)
        config.skip_words = list(config.skip_words or [])
        config.projections = projection_settings(config.projections, config.hidden_size, config.projection_dim)
        self.projections = Projections(config.projections)
        config.projection_dim = config.projections[-1]["out_features"] if config.projections else 0
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
    def _open(cls, opening: Opening) -> Self:
        layout = read_token_layout(opening.folder, opening.name)
        backbone, tokenizer = opening.tower(layout)
        config = MultiVectorConfig(**_settings_of(layout, backbone, tokenizer, opening))
        register_markers(backbone, tokenizer, (config.query_marker, config.passage_marker))
        model = cls(config, backbone, tokenizer).to(backbone.dtype)
        model.projections.fill(layout.projections)
        return model

    @property
    def token_size(self) -> int:
        """Width of the token vectors."""
        return self.projections[-1].out_features if len(self.projections) else self.config.hidden_size

    def processor(self) -> TextProcessor:
        config, plain = self.config, super().processor()
        markers = (config.query_marker, config.passage_marker)
        if config.layout == "lead":
            ids = tuple(self.tokenizer.convert_tokens_to_ids(marker) for marker in markers)
            return LeadTextProcessor(**vars(plain), markers=ids)
        prompts = {
            "query_prompt": markers[0] + plain.query_prompt,
            "passage_prompt": markers[1] + plain.passage_prompt,
        }
        return replace(plain, **prompts)

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

    def seen(self, chunk: Mapping[str, torch.Tensor], kind: Kind) -> Mapping[str, torch.Tensor]:
        return self.expanded(chunk)[0] if kind == "query" else chunk

    def encode(
        self,
        chunk: Mapping[str, torch.Tensor],
        kind: Kind,
        embeddings: torch.Tensor | None = None,
        layers: Sequence[int] = (),
        layer_tokens: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """Token vectors of one padded chunk.

        Args:
            chunk: `input_ids` and `attention_mask`, `[t, l]`; queries not yet filled up.
            kind: `"query"` or `"passage"`.
            embeddings: The word embeddings `[t, l, H]` of the chunk (of queries: of the filled one), where they are
                known already.
            layers: Numbers of layers, from 1, whose hidden states are wanted too.
            layer_tokens: As in other retrievers; here a layer always is its tokens.

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
        with self._watched(self.backbone, layers) as found:
            vectors = self.backbone(**inputs).last_hidden_state
        vectors = self.projections(vectors).float()
        if self.config.normalize:
            vectors = F.normalize(vectors, dim=-1)
        return vectors, counted, *(found[number].float() for number in layers)

    def _output(self, found: list[Both]) -> MultiVectorOutput:
        vectors, masks, *of_layers = found
        sides = (None if mask is None else (vector, mask) for vector, mask in zip(vectors, masks))
        return MultiVectorOutput(*sides, layers=tuple(zip(*of_layers)) or None)

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
        if self.config.layout == "lead":
            raise InputError(
                "a model that replaces [CLS] by its markers has no layout that other libraries read",
                where="layout",
                cure="Train with layout 'inserted' to export; 'lead' is for comparing with the original code",
            )

    def _export(self, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        self._save_tower("backbone", folder, state)
        write = write_pylate if fits_pylate(self.config) else write_native
        write(folder, self.config, self.projections.exported("projections", state))

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


def _settings_of(layout: TokenLayout, backbone: PreTrainedModel, tokenizer: Any, opening: Opening) -> dict[str, Any]:
    """The settings that a layout and the user's wishes make."""
    wanted = dict(opening.wanted)
    lead = wanted.get("layout") == "lead"
    skip_punctuation = wanted.pop("skip_punctuation", None)
    if skip_punctuation is not None:
        wanted["skip_words"] = list(PUNCTUATION) if skip_punctuation else []
    found: dict[str, Any] = {
        "skip_words": list(layout.skip_words),
        "normalize": layout.normalize,
        "attend_to_expansion": layout.attend or lead,
        "expansion_token": layout.expansion_token,
        **_projections_of(layout, wanted.pop("projection_dim", None), opening.name),
    }
    for option in MultiVectorRetriever.recorded_settings:
        if getattr(layout, option) is not None:
            found[option] = getattr(layout, option)
    markers, prompts = (LEAD_MARKERS, layout.prompts) if lead else choose_markers(layout, tokenizer)
    recorded = (layout.query_length or 32, layout.passage_length or 180)
    for kind, marker, prompt, length in zip(("query", "passage"), markers, prompts, recorded):
        found[f"{kind}_marker"], found[f"{kind}_prompt"] = marker, prompt
        found[f"{kind}_length"] = opening.length(f"{kind}_length", length, backbone, tokenizer)
    expansion = layout.expansion
    if expansion is None or (expansion and expansion == layout.query_length):
        # The usual width is that of the queries, also of queries that were given another length.
        expansion = found["query_length"]
    if tokenizer.padding_side == "left" and not layout.is_multi_vector:
        expansion = 0
    return {**found, "query_expansion": expansion, **wanted}


def _projections_of(layout: TokenLayout, wanted: int | None, name: str) -> dict[str, Any]:
    """The projections of a layout, or that of a new model as wide as wanted."""
    if not layout.projections and not layout.is_multi_vector:
        return {"projection_dim": 128 if wanted is None else wanted}
    have = layout.projections[-1].out_features if layout.projections else 0
    if wanted not in (None, have):
        raise InputError(
            f"projection_dim is {wanted}, but the model has {have or 'no projection'}",
            where=name,
            cure="Leave projection_dim out, or start from a model without a Dense module",
        )
    return {"projections": [projection.settings() for projection in layout.projections]}
