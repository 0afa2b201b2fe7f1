"""Cross-encoders: query and passage read together, one score a pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils import ModelOutput

from ..errors import InputError
from . import layouts, linear_head, writing
from .backbones import plain_model
from .base import RetrievalModel, in_order
from .native import RetrievalConfig
from .opening import Opening
from .processing import TextProcessor


class CrossEncoderConfig(RetrievalConfig):
    """Settings of a [`CrossEncoderRanker`].

    Args:
        query_prompt: Text put before every pair.
        max_length: Most tokens of a pair; the longer side is cut first.
        template: How a document's title and text become one passage.
        head: `"full"` for the classifier's own, `"linear"` for one linear layer on the first token, as LEAD has it;
            see [`hf_distill.models.linear_head`].
    """

    model_type = "hf_distill_cross_encoder"

    max_length: int = 512
    head: str = linear_head.FULL


@dataclass
class RankerOutput(ModelOutput):
    """What a [`CrossEncoderRanker`] gives where it is asked for its layers.

    Args:
        scores: Float32 `[T]`, one a pair.
        layers: Float32 `[T, K]`, the head's score of each chosen layer.
    """

    scores: torch.Tensor | None = None
    layers: torch.Tensor | None = None


class CrossEncoderRanker(RetrievalModel):
    """A transformers classifier of one label, whose logit is the score of a query-passage pair.

    [`CrossEncoderRanker.from_pretrained`] opens any cross-encoder of one label, or any encoder with a new head (to be
    trained): a folder or Hub id. Its options are fields of [`CrossEncoderConfig`]; `head` is for a new one.

    Args:
        config: The settings.
        backbone: A `...ForSequenceClassification` with `num_labels=1`; made from `config.backbone` if None.
        tokenizer: Its tokenizer.
    """

    config_class = CrossEncoderConfig
    archetype = "cross-encoder"
    representation = "pair"
    candidate_sets = ("own",)
    backbone_head = "classifier"
    known_settings = ("query_prompt", "max_length", "template", "head")

    def __init__(self, config: CrossEncoderConfig, backbone: PreTrainedModel | None = None, tokenizer: Any = None):
        super().__init__(config, backbone, tokenizer)
        if self.backbone.config.num_labels != 1:
            raise InputError(
                f"the classifier has {self.backbone.config.num_labels} labels, but a ranker gives one score",
                cure="Set num_labels=1",
            )
        if config.head == linear_head.LINEAR:
            linear_head.make_linear(self.backbone, "head", new=False)
        self._types = _token_types(tokenizer)
        if tokenizer is not None:
            tokenizer.model_max_length = config.max_length

    @classmethod
    def _open(cls, opening: Opening) -> Self:
        layout, name = opening.layout(), opening.name
        layouts.expect_kind(layout, "cross-encoder", name)
        if layout.passage is not None:
            raise InputError("the model has two towers", where=name, cure="Open it with DenseRetriever")
        backbone, tokenizer = opening.tower(layout.query)
        ranker = layout.kind == "cross-encoder"
        head = _open_head(backbone, name, opening.wanted.get("head"), trained=ranker)
        settings = opening.settings(
            layout,
            cls.recorded_settings,
            # The prompts of a dense model mean nothing to a ranker that starts from its encoder.
            query_prompt=layout.default_prompt if ranker else "",
            max_length=opening.length("max_length", layout.query.max_length, backbone, tokenizer),
        )
        return cls(CrossEncoderConfig(**settings | {"head": head}), backbone, tokenizer)

    def processor(self) -> TextProcessor:
        return TextProcessor(
            tokenizer=self.tokenizer,
            kind="cross",
            query_prompt=self.config.query_prompt,
            query_length=self.config.max_length,
            passage_length=self.config.max_length,
            template=self.config.template,
        )

    def settings(self) -> dict[str, Any]:
        head = type(plain_model(self.backbone)).__name__
        return {"head": head if self.config.head == linear_head.FULL else f"{head}, {self.config.head}"}

    def score_chunk(
        self,
        chunk: Mapping[str, torch.Tensor],
        embeddings: torch.Tensor | None = None,
        layers: Sequence[int] = (),
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Scores of one padded chunk of pairs.

        Args:
            chunk: `input_ids` and `attention_mask` `[t, l]`; optionally `token_type_ids`, which are otherwise found
                from the first separator.
            embeddings: Its word embeddings `[t, l, H]`, where they are known already.
            layers: Numbers of layers, from 1, that the whole head is applied to as well.

        Returns:
            Float32 `[t]`; with `layers` also `[t, K]`.
        """
        inputs = self._inputs(self.backbone, chunk, embeddings)
        if "token_type_ids" in chunk:
            inputs["token_type_ids"] = chunk["token_type_ids"]
        elif self._types == "after-separator":
            inputs["token_type_ids"] = _types_after_separator(chunk, self.tokenizer.sep_token_id)
        elif self._types == "own":
            raise InputError(
                f"{type(self.tokenizer).__name__} has token types of its own",
                where="score_chunk",
                cure="Pass token_type_ids with every chunk, as TextProcessor.pairs returns them",
            )
        with self._watched(self.backbone, layers) as found:
            scores = self._score(inputs)
        if not layers:
            return scores
        return scores, torch.stack([self._head(found[number], inputs) for number in layers], 1)

    def _score(self, inputs: dict[str, Any]) -> torch.Tensor:
        if self.config.head == linear_head.FULL:
            return self.backbone(**inputs).logits.squeeze(-1).float()
        classifier = plain_model(self.backbone)
        return linear_head.linear_score(classifier, classifier.base_model(**inputs).last_hidden_state)

    def _head(self, hidden: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """The scores `[t]` that the classifier's own head gives for a block's hidden states `[t, l, H]`."""
        if self.config.head == linear_head.LINEAR:
            return linear_head.linear_score(plain_model(self.backbone), hidden)
        # The head is whatever the architecture's forward does after its encoder: that forward is run with the encoder
        # replaced by the hidden states, which works for every family.
        with _replaced_encoder(plain_model(self.backbone), hidden):
            return self.backbone(**inputs).logits.squeeze(-1).float()

    def batch_scores(self, output: Any, batch: Mapping[str, Any], candidates: str) -> torch.Tensor:
        scores = output.scores if isinstance(output, RankerOutput) else output
        return scores.float().view(batch["passage_ids"].shape)

    def layer_scores(self, output: Any, batch: Mapping[str, Any], candidates: str) -> torch.Tensor:
        return output.layers.float().unflatten(0, batch["passage_ids"].shape).permute(2, 0, 1)

    def forward(self, pair: Mapping[str, Any], layers: Sequence[int] = ()) -> torch.Tensor | RankerOutput:
        """Scores of a batch of pairs.

        Args:
            pair: A token batch: `chunks`, each as [`score_chunk`] takes it, and `inverse` `[T]`, which restores the
                order of the pairs.
            layers: Numbers of layers, from 1, whose scores are wanted too.

        Returns:
            Float32 `[T]`; with `layers` a [`RankerOutput`].
        """
        # The heads of decoders find the last token by its id, so they must see the ids.
        by_ids = hasattr(plain_model(self.backbone), "score")
        embeddings = [None] * len(pair["chunks"]) if by_ids else self._embedded(self.backbone, pair["chunks"])
        parts = [self._maybe_recompute(self.score_chunk, *both, layers) for both in zip(pair["chunks"], embeddings)]
        found = in_order(parts, pair["inverse"])
        return RankerOutput(*found) if layers else found[0]

    def _export(self, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        config = self.config
        # Read by sentence-transformers where a folder has no modules.json, and by its versions before 6.
        plain_model(self.backbone).config.sentence_transformers = {"activation_fn": layouts.ACTIVATIONS["Identity"]}
        self._save_tower("backbone", folder, state)
        writing.write_modules(folder, [("", "Transformer")])
        writing.write_lengths(folder, config.max_length, config.max_length, transformer_task="sequence-classification")
        prompts = {"default": config.query_prompt} if config.query_prompt else {}
        writing.write_settings(
            folder,
            "CrossEncoder",
            prompts,
            default_prompt_name="default" if prompts else None,
            activation_fn=layouts.ACTIVATIONS["Identity"],
        )

    def _to_stored(self, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        linear = self.config.head == linear_head.LINEAR
        return linear_head.to_stored(plain_model(self.backbone), state) if linear else state

    def _from_stored(self, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        linear = self.config.head == linear_head.LINEAR
        return linear_head.from_stored(plain_model(self.backbone), state) if linear else state


def _open_head(backbone: PreTrainedModel, name: str, wanted: str | None, trained: bool) -> str:
    """Which head a classifier that was just opened has, made ready for use.

    Args:
        backbone: The classifier.
        name: What the user called the model, for messages.
        wanted: The head that was asked for, or None.
        trained: Whether the folder held a head.

    Raises:
        InputError: If it cannot be had.
    """
    if wanted not in (None, *linear_head.HEADS):
        raise InputError(f"{wanted!r} is no head of a ranker", where="head", cure="Use full or linear")
    if not trained:
        if wanted == linear_head.LINEAR:
            linear_head.make_linear(backbone, name, new=True)
        return wanted or linear_head.FULL
    found = linear_head.LINEAR if linear_head.has_linear_head(backbone) else linear_head.FULL
    if wanted not in (None, found):
        raise InputError(
            f"the head should be {wanted}, but the model was trained with a {found} one",
            where=name,
            cure="Leave head out, or start from an encoder without a head",
        )
    if found == linear_head.LINEAR:
        backbone.load_state_dict(linear_head.from_stored(backbone, backbone.state_dict()))
    return found


@contextmanager
def _replaced_encoder(classifier: PreTrainedModel, hidden: torch.Tensor) -> Iterator[None]:
    """Within it, the encoder of a classifier gives `hidden` as its last hidden state, whatever it is asked."""
    encoder = classifier.base_model
    pooler = getattr(encoder, "pooler", None)

    def forward(*_: Any, **__: Any) -> BaseModelOutputWithPoolingAndCrossAttentions:
        return BaseModelOutputWithPoolingAndCrossAttentions(hidden, None if pooler is None else pooler(hidden))

    encoder.forward = forward
    try:
        yield
    finally:
        del encoder.forward  # the class's own is in force again


def _types_after_separator(chunk: Mapping[str, torch.Tensor], separator: int) -> torch.Tensor:
    """Token types of pairs: 1 after the first separator, 0 before, on it, and on padding."""
    is_separator = (chunk["input_ids"] == separator).long()
    after = (is_separator.cumsum(1) - is_separator) > 0
    return after.long() * chunk["attention_mask"]


def _token_types(tokenizer: Any) -> str:
    """`"none"` where pairs have no token types, `"after-separator"` where they follow from it, else `"own"`."""
    if tokenizer is None or "token_type_ids" not in tokenizer.model_input_names:
        return "none"
    probe = tokenizer("a", "b c", return_tensors="pt")
    if tokenizer.sep_token_id is None:
        return "own"
    derived = _types_after_separator(probe, tokenizer.sep_token_id)
    return "after-separator" if torch.equal(derived, probe["token_type_ids"]) else "own"
