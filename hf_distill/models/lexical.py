"""Lexical retrieval: a text becomes weights of vocabulary terms (SPLADE-max), which an inverted index serves.

Formal et al., "SPLADE v2: Sparse Lexical and Expansion Model for Information Retrieval" (2021), equations 3 and 6:
with z the masked-LM logits of a text's tokens, the weight of term v is max over tokens of log(1 + relu(z_v)). LED and
LexMAE use the same and differ in which tokens take part.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from ..console import get_logger
from ..errors import InputError
from . import writing
from .backbones import plain_model
from .bi_encoder import BiEncoderConfig, Both, Kind, RetrieverOutput, VectorRetriever
from .opening import Opening
from .token_maximum import replaced_forward, token_maximum


logger = get_logger(__name__)

POOLED_TOKENS = ("all", "text", "inner")


class LexicalRetrieverConfig(BiEncoderConfig):
    """Settings of a [`LexicalRetriever`].

    Args:
        pooled_tokens: Which tokens' terms count: `"all"` (as public SPLADE models), `"text"` (no start or separator
            token anywhere, as LexMAE) or `"inner"` (neither the first nor the last token, as LED: a separator between
            title and text takes part).
        query_terms: Keep only so many of a query's heaviest terms; None for all.
        passage_terms: The same for passages.
        temperature: What scores are divided by in training.
        query_prompt: Text put before every query.
        passage_prompt: Text put before every passage.
        query_length: Most tokens of a query.
        passage_length: Most tokens of a passage.
        template: How a document's title and text become one passage.
    """

    model_type = "hf_distill_lexical"

    pooled_tokens: str = "all"
    query_terms: int | None = None
    passage_terms: int | None = None
    # Read by whoever compares vectors; lexical ones are compared by dot product as they are.
    similarity: str = "dot"
    normalize: bool = False

    def check(self) -> None:
        super().check()
        if self.pooled_tokens not in POOLED_TOKENS:
            raise InputError(
                f"pooled_tokens is {self.pooled_tokens!r}", cure=f"Choose one of {', '.join(POOLED_TOKENS)}"
            )
        for option in ("query_terms", "passage_terms"):
            terms = getattr(self, option)
            if terms is not None and terms < 1:
                raise InputError(f"{option} is {terms}", cure="Keep one term at least, or leave it out")


def splade_max(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Term weights from masked-LM logits: the definition, for logits that are all in memory.

    Args:
        logits: Float[T, L, V].
        mask: Bool[T, L], True for tokens that take part.

    Returns:
        Float32 `[T, V]`, 0 or more.
    """
    largest = logits.masked_fill(~mask.unsqueeze(-1).bool(), 0.0).amax(1)
    return torch.log1p(torch.relu(largest.float()))


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Start and separator, as far as a tokenizer has them."""
    found = (tokenizer.cls_token, tokenizer.sep_token)
    return tuple(dict.fromkeys(token for token in found if token is not None))


def term_names(tokenizer: Any, terms: int) -> list[str]:
    """The names of a model's terms; of those beyond the tokenizer's vocabulary (padding of the matrix) `[id]`."""
    names = tokenizer.convert_ids_to_tokens(range(terms))
    return [f"[{term}]" if name is None else name for term, name in enumerate(names)]


def pooled_mask(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, pooled_tokens: str, special_ids: tuple[int, ...]
) -> torch.Tensor:
    """Which tokens' terms count, Bool[T, L]; see [`LexicalRetrieverConfig`].

    Args:
        input_ids: `[T, L]`.
        attention_mask: `[T, L]`, padded on any side.
        pooled_tokens: `"all"`, `"text"` or `"inner"`.
        special_ids: What `"text"` leaves out.
    """
    keep = attention_mask.bool()
    if pooled_tokens == "text":
        for special in special_ids:
            keep = keep & (input_ids != special)
    elif pooled_tokens == "inner":
        place = attention_mask.cumsum(1)
        keep = keep & (place > 1) & (place < place[:, -1:])
    return keep


def keep_heaviest(weights: torch.Tensor, terms: int | None) -> torch.Tensor:
    """`[T, V]` with all but each row's `terms` largest weights set to 0."""
    if terms is None or terms >= weights.shape[1]:
        return weights
    values, columns = weights.topk(terms, dim=1)
    return torch.zeros_like(weights).scatter(1, columns, values)


class LexicalRetriever(VectorRetriever):
    """A masked language model whose pooled logits are the weights of terms, compared by dot product.

    [`LexicalRetriever.from_pretrained`] opens any masked language model, a public SPLADE checkpoint, or what this
    class saved: a folder or Hub id. Its options are fields of [`LexicalRetrieverConfig`], and `new_head`:
    `"identity"` or `"random"` to start a masked-LM head where the checkpoint has none.

    Args:
        config: The settings.
        backbone: A masked-LM model of transformers; made from `config.backbone` if None.
        tokenizer: Its tokenizer.
    """

    config_class = LexicalRetrieverConfig
    archetype = "lexical"
    representation = "sparse"
    backbone_head = "masked_lm"
    known_settings = (
        "pooled_tokens", "query_terms", "passage_terms", "temperature", "query_prompt", "passage_prompt",
        "query_length", "passage_length", "template", "new_head",
    )  # fmt: skip
    recorded_settings = ("pooled_tokens", "query_terms", "passage_terms", "temperature", "template")

    def __init__(self, config: LexicalRetrieverConfig, backbone: PreTrainedModel | None = None, tokenizer: Any = None):
        super().__init__(config, backbone, tokenizer)
        self._pools_in_head = ends_with_projection(plain_model(self.backbone))

    @classmethod
    def _open(cls, opening: Opening) -> Self:
        layout, name = opening.layout(), opening.name
        if layout.passage is not None or (opening.is_modular and layout.kind not in ("lexical", "dense")):
            raise InputError(
                "this is no lexical model", where=name, cure="Open it with load_model, which finds out what it is"
            )
        backbone, tokenizer = opening.tower(layout.query, opening.wanted.pop("new_head", None))
        special, skipped = set(special_tokens(tokenizer)), set(layout.query.skipped_tokens)
        if skipped not in (set(), special):
            raise InputError(
                f"the model leaves the tokens {sorted(skipped)} out of its pooling",
                where=name,
                cure=f"Supported are none and {sorted(special)}",
            )
        settings = opening.settings(
            layout,
            cls.recorded_settings,
            **opening.reading(layout, backbone, tokenizer),
            pooled_tokens="text" if skipped else "all",
        )
        return cls(LexicalRetrieverConfig(**settings), backbone, tokenizer)

    @property
    def embedding_size(self) -> int:
        """Number of terms."""
        return plain_model(self.backbone).get_output_embeddings().weight.shape[0]

    def settings(self) -> dict[str, Any]:
        names = ("pooled_tokens", "query_terms", "passage_terms")
        return {name: getattr(self.config, name) for name in names} | {"special": self.special_ids()}

    def special_ids(self) -> tuple[int, ...]:
        """The ids of start and separator, which `pooled_tokens="text"` leaves out."""
        return tuple(self.tokenizer.convert_tokens_to_ids(list(special_tokens(self.tokenizer))))

    # -------------------------------------------------------------------------------------------------- running

    def encode(
        self, chunk: Mapping[str, torch.Tensor], kind: Kind, embeddings: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Term weights of one padded chunk.

        Args:
            chunk: `input_ids` and `attention_mask`, `[t, l]`.
            kind: `"query"` or `"passage"`, which may keep different numbers of terms.
            embeddings: Its word embeddings `[t, l, H]`, where they are known already.

        Returns:
            Float32 `[t, V]`, 0 or more; a text of special tokens alone may have none above 0.
        """
        plain = plain_model(self.backbone)
        keep = pooled_mask(chunk["input_ids"], chunk["attention_mask"], self.config.pooled_tokens, self.special_ids())
        inputs = self._inputs(self.backbone, chunk, embeddings)
        if self._pools_in_head:
            head = plain.get_output_embeddings()
            with replaced_forward(head, lambda hidden: token_maximum(head, hidden, keep)):
                largest = self.backbone(**inputs).logits
            weights = torch.log1p(torch.relu(largest.float()))
        else:
            weights = splade_max(self.backbone(**inputs).logits, keep)
        return keep_heaviest(weights, self.config.query_terms if kind == "query" else self.config.passage_terms)

    def _output(self, found: list[Both]) -> RetrieverOutput:
        return RetrieverOutput(*found[0])

    # --------------------------------------------------------------------------------------------------- saving

    def check_export(self) -> None:
        """Raises [`InputError`] if sentence-transformers could not pool the same tokens."""
        separator = self.tokenizer.sep_token
        if self.config.pooled_tokens == "inner" and separator and separator in self.config.template:
            raise InputError(
                f"pooled_tokens='inner' with {separator} inside passages cannot be expressed in sentence-transformers",
                where=str(self.name_or_path or "LexicalRetriever"),
                cure="Use pooled_tokens='text' (no separator takes part), or a template without separator",
            )

    def _export(self, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        config = self.config
        self._save_tower("backbone", folder, state)
        # Where no separator stands inside a text, the inner tokens are those that are not special.
        skipped = () if config.pooled_tokens == "all" else special_tokens(self.tokenizer)
        tail = writing.write_lexical_tail(folder, self.embedding_size, skipped)
        writing.write_modules(folder, [("", "Transformer"), *tail])
        writing.write_lengths(folder, config.query_length, config.passage_length, transformer_task="fill-mask")
        writing.write_settings(
            folder,
            "SparseEncoder",
            {"query": config.query_prompt, "document": config.passage_prompt},
            similarity_fn_name="dot",
        )
        if config.query_terms or config.passage_terms:
            logger.info("In sentence-transformers pass max_active_dims to keep the heaviest terms only.")


def ends_with_projection(backbone: PreTrainedModel) -> bool:
    """Whether a model's logits are its output layer's result and nothing else, so that pooling can be done in it."""
    head = backbone.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    probe = {"input_ids": torch.ones((1, 3), dtype=torch.long, device=head.weight.device)}
    seen = []
    training = backbone.training
    backbone.eval()
    with torch.no_grad():
        logits = backbone(**probe).logits
        with replaced_forward(head, lambda hidden: seen.append(hidden) or hidden):
            passed = backbone(**probe).logits
        same = len(seen) == 1 and passed is seen[0] and torch.allclose(head(passed), logits, atol=1e-5)
    backbone.train(training)
    return same
