"""A teacher that reads every batch along with the student."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..losses.combine import ANCHOR
from ..models.base import RetrievalModel
from ..models.candidates import arrange
from ..models.copies import frozen_copy
from ..models.layer_scores import LayerTokens
from .base import Teacher


class LiveTeacher(Teacher):
    """A frozen model: in evaluation mode, without gradient, outside the trained module.

    Args:
        name: By which loss terms name it.
        model: A retriever, which scores any candidates, or a ranker, which scores the row's own.
        dtype: In which precision it reads, `torch.bfloat16` say: then a copy of the model does. By default in that of
            its weights. Scores are float32 always.
    """

    def __init__(self, name: str, model: RetrievalModel, dtype: torch.dtype | None = None):
        super().__init__(name)
        self._weights: str | None = None
        if dtype not in (None, model.dtype):
            self._weights = model.weights_fingerprint()  # they are known by those that were given
            model = frozen_copy(model, dtype, model.device)
        self.model = model if self.is_joint else model.eval().requires_grad_(False)
        self.num_layers = model.num_layers
        self.processor = model.processor()
        self.candidate_sets = model.candidate_sets
        self.embedding_size = model.embedding_size
        self.tokens = name
        self._output: Any = None
        self._scores: dict[str, torch.Tensor] = {}
        self._layers: Sequence[int] = ()
        self._wants_tokens = False

    def to(self, device: torch.device) -> None:
        self.model.to(device)

    def begin_batch(self, layers: Sequence[int] = (), layer_tokens: bool = False) -> None:
        self._output, self._scores, self._layers, self._wants_tokens = None, {}, layers, layer_tokens

    def _forward(self, batch: Mapping[str, Any]) -> Any:
        if self._output is None:
            with torch.no_grad():
                self._output = self.model(**model_inputs(batch, self.tokens, self._layers, self._wants_tokens))
        return self._output

    def embeddings(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.embedding_size is None:
            return super().embeddings(batch)
        output = self._forward(batch)
        return arrange(output.query.float(), output.passage.float(), batch)

    def scores(self, batch: Mapping[str, Any], candidates: str) -> torch.Tensor:
        # Several terms of a loss ask for the same ones.
        if candidates not in self._scores:
            self._scores[candidates] = self.model.batch_scores(self._forward(batch), batch, candidates)
        return self._scores[candidates]

    def check_layers(self, layers: Sequence[int]) -> None:
        self.model.check_layers(layers)

    def layer_scores(self, batch: Mapping[str, Any], layers: Sequence[int], candidates: str) -> torch.Tensor:
        scores = self.model.layer_scores(self._forward(batch), batch, candidates)
        return scores if tuple(layers) == tuple(self._layers) else scores[[self._layers.index(one) for one in layers]]

    def layer_tokens(self, batch: Mapping[str, Any]) -> LayerTokens:
        return self.model.layer_tokens(self._forward(batch), batch)

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "model": self.model.name_or_path,
            "weights": self._weights or self.model.weights_fingerprint(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }


class JointTeacher(LiveTeacher):
    """A teacher that is trained along with the student: a part of the trained module, in training mode.

    Its scores carry gradients, so that whatever compares them with the student's trains both.

    Args:
        name: By which loss terms name it.
        model: The teacher, in float32 weights.
    """

    is_joint = True

    def __init__(self, name: str, model: RetrievalModel):
        super().__init__(name, model)

    def to(self, device: torch.device) -> None:
        """Nothing: the trainer moves the module that it is a part of."""

    def receive(self, output: Any) -> None:
        """Takes the output of its forward of this batch, which ran together with the student's."""
        self._output = output


def model_inputs(
    batch: Mapping[str, Any], name: str, layers: Sequence[int] = (), layer_tokens: bool = False
) -> dict[str, Any]:
    """The keyword arguments of a model's forward for its tokens of a batch, asking for layers where any are wanted."""
    inputs = dict(batch["tokens"][name])
    if layers:
        inputs["layers"] = tuple(layers)
        if layer_tokens:
            inputs["layer_tokens"] = True
    return inputs


class Anchor(LiveTeacher):
    """The student as it is now, for losses that hold it there (learning without forgetting).

    It reads the student's own tokens, so that it costs one forward without gradient.

    Args:
        model: The student; a copy is kept.
        tokens: By which name the batch has the student's tokens.
    """

    def __init__(self, model: RetrievalModel, tokens: str = "student"):
        super().__init__(ANCHOR, copy.deepcopy(model))
        self.processor, self.tokens = None, tokens
