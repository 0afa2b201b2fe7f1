"""Linear layers on vectors: the Dense modules of sentence-transformers, in memory and in their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .layouts import ProjectionLayout
from .loading import read_weights


class Projection(nn.Linear):
    """A linear layer and an activation, computed in float32 whatever the autocast."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: str = "Identity"):
        super().__init__(in_features, out_features, bias=bias)
        self.activation = getattr(nn, activation)()

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        with torch.autocast(vectors.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return self.activation(F.linear(vectors.float(), self.weight.float(), bias))

    @property
    def layout(self) -> ProjectionLayout:
        """What this layer is, without a folder."""
        activation = type(self.activation).__name__
        return ProjectionLayout(self.in_features, self.out_features, self.bias is not None, activation)


class Projections(nn.ModuleList):
    """The linear layers that a configuration lists, applied in their order; none leaves vectors as they are."""

    def __init__(self, settings: Sequence[Mapping[str, object]]):
        super().__init__(Projection(**one) for one in settings)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        for projection in self:
            vectors = projection(vectors)
        return vectors

    def fill(self, layouts: Sequence[ProjectionLayout]) -> None:
        """Takes over the weights of Dense modules' folders; a layer that has none stays as it is."""
        for projection, layout in zip(self, layouts):
            if layout.folder is not None:
                state = read_weights(layout.folder)
                prefix = "linear."
                own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                projection.load_state_dict(own)

    def restore(self, layouts: Sequence[ProjectionLayout]) -> None:
        """`fill`, where every layer has to have its folder."""
        if len(self) != len(layouts):
            raise RuntimeError(f"the folder has {len(layouts)} Dense modules, the model {len(self)}")
        self.fill(layouts)

    def exported(
        self, name: str, state: Mapping[str, torch.Tensor]
    ) -> list[tuple[ProjectionLayout, dict[str, torch.Tensor]]]:
        """The layers and their tensors as the writers of layouts take them.

        Args:
            name: The model's attribute that holds this list.
            state: The model's state dictionary.
        """
        found = []
        for number, module in enumerate(self):
            parts = [part for part, _ in module.named_parameters()]
            tensors = {f"linear.{part}": state[f"{name}.{number}.{part}"].contiguous() for part in parts}
            found.append((module.layout, tensors))
        return found


def projection_settings(listed: Sequence[Mapping[str, object]] | None, width: int, wanted: int | None) -> list[dict]:
    """The settings of a model's linear layers: those that are listed, else one to the `wanted` width, if any.

    Args:
        listed: Of layers that exist already; None for a model that has said nothing yet.
        width: Of the vectors that the layers read.
        wanted: Of the vectors that a new layer is to make; None or 0 for no layer.
    """
    if listed is not None:
        return list(listed)
    return [ProjectionLayout(width, wanted, bias=False).settings()] if wanted else []
