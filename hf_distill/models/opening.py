"""A model that is being opened: where its files are, what was asked for, and how its parts are read.

Every archetype opens models in the same way: `RetrievalModel.from_pretrained` checks what was asked and finds the
files; the archetype says which layouts it reads and makes a model of one, by the methods here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from ..errors import InputError
from .layouts import Layout, read_layout
from .loading import Head, choose_length, load_backbone, load_tokenizer
from .source import ModelSource


class Tower(Protocol):
    """What has to be known of one encoder to open it."""

    folder: Path
    lowercase: bool


@dataclass
class Opening:
    """One call of `from_pretrained`.

    Args:
        source: The model's files.
        wanted: The settings that were asked for, by name.
        head: What the archetype's backbones carry on top.
        dtype: The weights' precision.
        attention: The attention implementation; None for transformers' choice.
    """

    source: ModelSource
    wanted: dict[str, Any]
    head: Head = "none"
    dtype: str | torch.dtype = "float32"
    attention: str | None = None

    @property
    def name(self) -> str:
        """What the user called the model, for messages."""
        return self.source.name

    @property
    def folder(self) -> Path:
        """The model's folder."""
        return self.source.folder

    @property
    def is_modular(self) -> bool:
        """Whether the folder lists modules, as sentence-transformers does, rather than being a bare checkpoint."""
        return (self.folder / "modules.json").is_file()

    def layout(self) -> Layout:
        """What the folder says about the model."""
        return read_layout(self.folder, self.name)

    def tower(self, tower: Tower, new_head: str | None = None) -> tuple[PreTrainedModel, Any]:
        """The transformers model of an encoder, and its tokenizer.

        Args:
            tower: The encoder.
            new_head: How to start a masked-LM head that it lacks; None refuses.
        """
        backbone = load_backbone(
            tower.folder, self.name, self.dtype, head=self.head, attention=self.attention, new_head=new_head
        )
        return backbone, load_tokenizer(tower.folder, self.name, backbone, tower.lowercase)

    def length(self, option: str, recorded: int | None, backbone: PreTrainedModel, tokenizer: Any) -> int:
        """A limit of length by its name: as asked, else as the folder says, else what the model can take."""
        return choose_length(self.wanted.get(option), recorded, tokenizer, backbone, self.name, option)

    def reading(self, layout: Layout, backbone: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
        """How a bi-encoder's folder reads queries and passages: their prompts and limits of length."""
        found: dict[str, Any] = {"query_prompt": layout.query_prompt, "passage_prompt": layout.passage_prompt}
        for option, tower in (("query_length", layout.query), ("passage_length", layout.passage or layout.query)):
            recorded = getattr(tower, option) or tower.max_length
            found[option] = self.length(option, recorded, backbone, tokenizer)
        return found

    def settings(self, layout: Layout, recorded: Sequence[str], **found: Any) -> dict[str, Any]:
        """The model's settings: as asked, else as `hf_distill.json` has them, else as they were found elsewhere.

        Args:
            layout: What the folder says.
            recorded: Names of what may stand in `hf_distill.json`.
            found: What the rest of the folder says.
        """
        own = {name: layout.extra[name] for name in recorded if layout.extra.get(name) is not None}
        return {**found, **own, **self.wanted}


def checked_settings(asked: dict[str, Any], known: Sequence[str], who: str) -> dict[str, Any]:
    """The settings that were asked for, without those left at None.

    Raises:
        InputError: For a setting that is not among the known ones.
    """
    unknown = sorted(set(asked) - set(known))
    if unknown:
        raise InputError(
            f"unknown settings {unknown}", where=f"{who}.from_pretrained", cure=f"Known are {', '.join(known)}"
        )
    return {name: value for name, value in asked.items() if value is not None}
