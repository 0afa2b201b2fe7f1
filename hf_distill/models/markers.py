"""Marker tokens of multi-vector models: which ones, how the vocabulary takes them, and LEAD's way of placing them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AddedToken, PreTrainedModel

from .loading import quiet_transformers
from .processing import TextProcessor
from .token_layouts import TokenLayout


# Marker tokens of a new model: those that BERT's vocabulary has to spare, else new ones.
_SPARE_MARKERS = ("[unused0]", "[unused1]")
_NEW_MARKERS = ("[Q] ", "[D] ")
LEAD_MARKERS = ("[unused1]", "[unused2]")


@dataclass
class LeadTextProcessor(TextProcessor):
    """The reading of the original code of LEAD: a marker in the place of [CLS], queries cut without keeping [SEP].

    Args:
        markers: Ids of the markers of queries and passages.
    """

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


def choose_markers(layout: TokenLayout, tokenizer: Any) -> tuple[tuple[str, str], tuple[str, str]]:
    """Markers and prompts of queries and passages: those of the folder, which may not tell them apart, or new ones."""
    if layout.markers is not None:
        return layout.markers, layout.prompts
    if not layout.is_multi_vector:
        vocabulary = tokenizer.get_vocab()
        spare = all(marker in vocabulary for marker in _SPARE_MARKERS)
        return (_SPARE_MARKERS if spare else _NEW_MARKERS), ("", "")
    added = set(tokenizer.get_added_vocab())
    found = [tokenizer.tokenize(prompt) for prompt in layout.prompts]
    if all(len(pieces) == 1 and pieces[0] in added for pieces in found):
        return layout.prompts, ("", "")
    return ("", ""), layout.prompts


def register_markers(backbone: PreTrainedModel, tokenizer: Any, markers: tuple[str, str]) -> None:
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
