"""What retrievers share that read queries and passages apart: how both are read, run and compared."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..errors import InputError
from .backbones import freeze_unused, plain_model
from .base import RetrievalConfig, RetrievalModel, in_order
from .processing import TextProcessor


Kind = Literal["query", "passage"]
KINDS: tuple[Kind, Kind] = ("query", "passage")
# A tensor of the queries and one of the passages of a batch; None where the batch has none of them.
Both = tuple[torch.Tensor | None, torch.Tensor | None]


class BiEncoderConfig(RetrievalConfig):
    """Settings of every [`BiEncoder`].

    Args:
        query_prompt: Text put before every query.
        passage_prompt: Text put before every passage.
        query_length: Most tokens of a query.
        passage_length: Most tokens of a passage.
        temperature: What scores are divided by in training.
        template: How a document's title and text become one passage.
    """

    passage_prompt: str = ""
    query_length: int = 512
    passage_length: int = 512
    temperature: float = 1.0

    def check(self) -> None:
        super().check()
        if self.temperature is not None and not self.temperature > 0:
            raise InputError(f"temperature is {self.temperature}", cure="Choose a positive number")


class BiEncoder(RetrievalModel):
    """A model that reads queries and passages apart; an archetype says in `encode` what it makes of a text.

    An archetype whose layers can be asked for takes their numbers, and whether their tokens are wanted, as further
    arguments of `encode`.

    Attributes:
        token_dims: For each tensor that `encode` returns, the dimension that counts tokens (from 1, padded to the
            longest text of a batch), None for one row a text; the last stands for all further ones.
    """

    token_dims: ClassVar[tuple[int | None, ...]] = (None,)

    def __init__(self, config: BiEncoderConfig, backbone: PreTrainedModel | None = None, tokenizer: Any = None):
        super().__init__(config, backbone, tokenizer)
        freeze_unused(plain_model(self.backbone))
        if tokenizer is not None:
            tokenizer.model_max_length = max(config.query_length, config.passage_length)

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

    def tower(self, kind: Kind) -> nn.Module:
        """The backbone that reads queries or passages."""
        return self.backbone

    def seen(self, chunk: Mapping[str, torch.Tensor], kind: Kind) -> Mapping[str, torch.Tensor]:
        """The tokens that the backbone is given for a padded chunk."""
        return chunk

    @abstractmethod
    def encode(
        self, chunk: Mapping[str, torch.Tensor], kind: Kind, embeddings: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """What the model makes of one padded chunk, a row a text.

        Args:
            chunk: `input_ids` and `attention_mask`, `[t, l]`.
            kind: `"query"` or `"passage"`.
            embeddings: The word embeddings `[t, l, H]` of `seen(chunk, kind)`, where they are known already.
        """

    @abstractmethod
    def _output(self, found: list[Both]) -> ModelOutput:
        """The output of `forward`, of each tensor that `encode` returns for the queries and for the passages."""

    def forward(
        self,
        query: Mapping[str, Any] | None = None,
        passage: Mapping[str, Any] | None = None,
        layers: Sequence[int] = (),
        layer_tokens: bool = False,
    ) -> ModelOutput:
        """A batch of queries and a batch of passages, in one call, with one lookup of word embeddings a tower.

        Args:
            query: A token batch: `chunks`, each with `input_ids` and `attention_mask` `[t_i, l_i]`, and `inverse`
                `[T]`, which restores the order of the texts.
            passage: The same for passages.
            layers: Numbers of layers, from 1, that are wanted too.
            layer_tokens: Whether their tokens' hidden states are wanted as well.

        Returns:
            The archetype's output, such as [`RetrieverOutput`], texts in their order.
        """
        options = (layers, layer_tokens) if layers else ()
        batches = {kind: batch for kind, batch in zip(KINDS, (query, passage)) if batch is not None}
        chunks: dict[nn.Module, list[Mapping[str, torch.Tensor]]] = {}
        for kind, batch in batches.items():
            chunks.setdefault(self.tower(kind), []).extend(self.seen(chunk, kind) for chunk in batch["chunks"])
        embeddings = itertools.chain.from_iterable([self._embedded(*both) for both in chunks.items()])
        made = {}
        for kind, batch in batches.items():
            parts = [
                self._maybe_recompute(self.encode, chunk, kind, next(embeddings), *options)
                for chunk in batch["chunks"]
            ]
            made[kind] = in_order(parts, batch["inverse"], self.token_dims)
        nothing = (None,) * max(map(len, made.values()))
        return self._output(list(zip(*(made.get(kind, nothing) for kind in KINDS))))


@dataclass
class RetrieverOutput(ModelOutput):
    """What a [`VectorRetriever`] gives for a batch.

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


class VectorRetriever(BiEncoder):
    """A bi-encoder that makes one vector of a text; vectors are compared as `similarity` in its configuration says."""

    def similarity_scores(self, query: torch.Tensor, passage: torch.Tensor) -> torch.Tensor:
        """Training scores of queries `[Q, D]` with passages `[C, D]`: float32 `[Q, C]`, divided by the temperature."""
        return self._compare(query, passage, lambda q, p: q @ p.T)

    def own_scores(self, query: torch.Tensor, passage: torch.Tensor) -> torch.Tensor:
        """Training scores of queries `[Q, D]` with each one's own passages `[Q, M, D]`: float32 `[Q, M]`."""
        return self._compare(query, passage, lambda q, p: (p @ q.unsqueeze(-1)).squeeze(-1))

    def _compare(
        self,
        query: torch.Tensor,
        passage: torch.Tensor,
        product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        with torch.autocast(query.device.type, enabled=False):
            query, passage = query.float(), passage.float()
            if self.config.similarity == "cosine" and not self.config.normalize:
                query, passage = F.normalize(query, dim=-1), F.normalize(passage, dim=-1)
            return product(query, passage) / self.config.temperature
