"""From text to token ids, exactly as the exported model's own tokenizer and sentence-transformers would do it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InputError
from ..files import fingerprint
from ..passages import DEFAULT_TEMPLATE


@dataclass
class TextProcessor:
    """Tokenises queries and passages as one model wants them. Picklable, so that data loader workers can hold it.

    Args:
        tokenizer: A fast tokenizer of transformers, with a padding token.
        kind: `"bi"` for models that read query and passage apart, `"cross"` for models that read them as a pair.
        query_prompt: Text put before every query (before the pair, for a `"cross"` model).
        passage_prompt: Text put before every passage; empty for a `"cross"` model.
        query_length: Most tokens of a query, prompt and special tokens included.
        passage_length: The same of a passage, or of a whole pair for a `"cross"` model.
        template: How a document's title and text become one passage; used by whoever renders documents.
    """

    tokenizer: Any
    kind: Literal["bi", "cross"] = "bi"
    query_prompt: str = ""
    passage_prompt: str = ""
    query_length: int = 512
    passage_length: int = 512
    template: str = DEFAULT_TEMPLATE

    @property
    def pad_token_id(self) -> int:
        return self.tokenizer.pad_token_id

    @property
    def padding_side(self) -> str:
        return self.tokenizer.padding_side

    def queries(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of queries: prompt and special tokens included, at most `query_length` each."""
        return self._single(texts, self.query_prompt, self.query_length)

    def passages(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered passages: prompt and special tokens included, at most `passage_length` each."""
        return self._single(texts, self.passage_prompt, self.passage_length)

    def encode(self, texts: Sequence[str], kind: Literal["query", "passage"]) -> list[list[int]]:
        """`queries(texts)` or `passages(texts)`."""
        return self.queries(texts) if kind == "query" else self.passages(texts)

    def pairs(self, queries: Sequence[str], passages: Sequence[str]) -> tuple[list[list[int]], list[list[int]] | None]:
        """Token ids of query-passage pairs, cut to `passage_length` tokens from the longer side first.

        Returns:
            The ids, and the token types (0 for the query, 1 for the passage) where the tokenizer makes them.
        """
        if len(queries) != len(passages):
            raise InputError(f"{len(queries)} queries for {len(passages)} passages", where="pairs")
        if not queries:
            return [], None
        prompt = self.query_prompt
        encoded = self.tokenizer(
            [prompt + query for query in queries] if prompt else list(queries),
            list(passages),
            truncation="longest_first",
            max_length=self.passage_length,
            return_attention_mask=False,
        )
        return encoded["input_ids"], encoded.get("token_type_ids")

    def pad(self, features: Sequence[Sequence[int]], token_type_ids: Sequence[Sequence[int]] | None = None) -> dict:
        """Pads token ids to one batch.

        Returns:
            `input_ids` and `attention_mask`, int64 `[len(features), longest]`, and `token_type_ids` where given.
        """
        import torch

        width = max(map(len, features))
        left = self.padding_side == "left"

        def stack(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
            padded = [[fill] * (width - len(r)) + list(r) if left else [*r, *[fill] * (width - len(r))] for r in rows]
            return torch.tensor(padded, dtype=torch.long)

        chunk = {
            "input_ids": stack(features, self.pad_token_id),
            "attention_mask": stack([[1] * len(row) for row in features], 0),
        }
        if token_type_ids is not None:
            chunk["token_type_ids"] = stack(token_type_ids, 0)
        return chunk

    def settings(self) -> dict[str, Any]:
        """Everything about the reading of text that changes a model's output, as JSON."""
        return {
            "kind": self.kind,
            "query_prompt": self.query_prompt,
            "passage_prompt": self.passage_prompt,
            "query_length": self.query_length,
            "passage_length": self.passage_length,
            "template": self.template,
            "padding_side": self.padding_side,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
        }

    def _single(self, texts: Sequence[str], prompt: str, length: int) -> list[list[int]]:
        if not len(texts):
            return []
        rows = self.tokenizer(
            [prompt + text for text in texts] if prompt else list(texts),
            truncation=True,
            max_length=length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        # A tokenizer without special tokens makes nothing of an empty text; a model needs one token at least.
        return rows if all(rows) else [row or [self.pad_token_id] for row in rows]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """16 hexadecimal digits that identify what a tokenizer does, whatever folder it came from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        text = repr(sorted(tokenizer.get_vocab().items())) + type(tokenizer).__name__
    else:
        # Truncation and padding are set anew by every call, so they are no property of the tokenizer.
        import json

        state = json.loads(backend.to_str())
        state.pop("truncation", None)
        state.pop("padding", None)
        text = json.dumps(state, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """16 hexadecimal digits that identify which token has which id, however a text is cut into them."""
    return fingerprint(tokenizer.get_vocab())


def prepare_tokenizer(tokenizer: Any, vocabulary_size: int | None, where: str) -> Any:
    """Checks that a tokenizer fits a model, and gives it a padding token if it has none.

    Args:
        tokenizer: The tokenizer.
        vocabulary_size: Rows of the model's embedding matrix.
        where: The model's name, for messages.

    Raises:
        InputError: If the tokenizer can emit ids that the model has no embedding for, or nothing can serve as padding.
    """
    from ..console import get_logger

    known = set(
        tokenizer("a the 0 1 der la и 的", add_special_tokens=False, truncation=True, max_length=64)["input_ids"]
    )
    if known <= {*tokenizer.all_special_ids}:
        # transformers makes an empty tokenizer, silently, where a folder has none.
        raise InputError(
            "there is no tokenizer, or it knows no words",
            where=where,
            cure="Save the model's own tokenizer into the folder (tokenizer.save_pretrained)",
        )
    if tokenizer.pad_token_id is None:
        substitute = tokenizer.eos_token or tokenizer.unk_token
        if substitute is None:
            raise InputError(
                "the tokenizer has neither a padding nor an end-of-sequence token",
                where=where,
                cure="Add one with tokenizer.add_special_tokens({'pad_token': '[PAD]'}), resize the embeddings, "
                "save both and load that folder",
            )
        tokenizer.pad_token = substitute
        get_logger(__name__).info("%s: the tokenizer has no padding token; using %r.", where, substitute)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if vocabulary_size is not None and largest >= vocabulary_size:
        raise InputError(
            f"the tokenizer's largest id is {largest}, but the model has embeddings for {vocabulary_size} tokens only",
            where=where,
            cure="Load the tokenizer that belongs to the model, or resize the embeddings "
            "(model.resize_token_embeddings(len(tokenizer))) and save the model again",
        )
    return tokenizer
