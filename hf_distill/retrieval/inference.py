"""A copy of a model that is as fast as it can be made without changing what it computes."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack

from ..console import get_logger
from ..errors import InputError
from ..models.base import RetrievalModel, use_attention
from ..models.copies import frozen_copy
from .packing import pack_linears, register_matmul_attention


logger = get_logger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Tokens of a batch, padding included. A batch of this size keeps a small encoder's activations in a CPU core's cache,
# where larger batches are slower; a GPU wants to be filled.
_BUDGETS = {
    ("cpu", "float32"): 2048,
    ("cpu", "bfloat16"): 2048,
    ("cuda", "float32"): 16384,
    ("cuda", "bfloat16"): 32768,
}
_BUDGET_WITH_AMX = 4096
_OTHER_BUDGET = 8192


def choose_dtype(dtype: str | None, device: torch.device | str) -> str:
    """`"float32"` or `"bfloat16"`; `"auto"` is bfloat16 where the hardware computes with it and is fast at it."""
    dtype = str(dtype or "auto").removeprefix("torch.")
    if dtype in DTYPES:
        return dtype
    if dtype != "auto":
        raise InputError(f"{dtype!r} is not a precision", where="dtype", cure="Use auto, float32 or bfloat16")
    device = torch.device(device)
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if device.type == "cpu" and _cpu_has("amx_tile", "avx512_bf16") else "float32"


def default_budget(device: torch.device, dtype: str) -> int:
    """Tokens of a batch that suit a device."""
    if device.type == "cpu" and dtype == "bfloat16" and _cpu_has("amx_tile"):
        return _BUDGET_WITH_AMX
    return _BUDGETS.get((device.type, dtype), _OTHER_BUDGET)


def inference_device(model: RetrievalModel, device: str | torch.device | None = None) -> torch.device:
    """`device`, else the GPU that the model is on, else what accelerate gives to this process."""
    if device is not None:
        return torch.device(device)
    if model.device.type != "cpu":
        return model.device
    from accelerate import PartialState

    return PartialState().device


def plan_batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Cuts texts into batches: sorted by length, longest first, at most `budget` tokens each with their padding.

    Args:
        lengths: `int[n]`, tokens of each text.
        budget: Most tokens of a batch; a longer text is a batch of its own.

    Yields:
        Positions of the texts of a batch. Every position occurs once; the batches depend on `lengths` alone.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        count = max(1, budget // max(1, int(lengths[order[start]])))
        yield order[start : start + count]
        start += count


def pad_batch(rows: Sequence[Sequence[int]], fill: int, left: bool = False) -> np.ndarray:
    """Token ids as `int64[len(rows), longest]`."""
    width = max(map(len, rows))
    result = np.full((len(rows), width), fill, dtype=np.int64)
    for target, row in zip(result, rows):
        if left:
            target[width - len(row) :] = row
        else:
            target[: len(row)] = row
    return result


class InferenceModel:
    """A model for encoding or scoring many texts; the model it is made from stays as it is.

    On x86 CPUs its linear layers hold their weights in the layout of the matrix kernels (oneDNN), with GELU fused
    where it follows: the same function, up to twice as fast. Outputs of [`DenseRetriever`] are pooled and normalised
    in float32 always.

    Args:
        model: The model. Make a new copy after it was trained further.
        dtype: Precision of the weights and the arithmetic; see `choose_dtype`.
        device: Where to run; by default on the model's GPU or the one that accelerate gives to this process.
        token_budget: Most tokens of a batch; by default what suits the device.
    """

    def __init__(
        self,
        model: RetrievalModel,
        *,
        dtype: str | None = "auto",
        device: str | torch.device | None = None,
        token_budget: int | None = None,
    ):
        self.device = inference_device(model, device)
        self.dtype = choose_dtype(dtype, self.device)
        if token_budget is not None and token_budget < 1:
            raise InputError(f"{token_budget} tokens", where="token_budget", cure="Give a positive number")
        self.token_budget = token_budget or default_budget(self.device, self.dtype)
        self.processor = model.processor()
        self._source = model
        self._model: RetrievalModel | None = None
        self._key: dict[str, Any] | None = None

    @property
    def representation(self) -> str:
        """What the model makes of texts, see [`RetrievalModel`]."""
        return self._source.representation

    @property
    def model(self) -> RetrievalModel:
        """The copy, made when it is first needed: work that is all in the cache needs none."""
        if self._model is None:
            self._model = frozen_copy(self._source, DTYPES[self.dtype], self.device)
            if self.device.type == "cpu":
                pack_linears(self._model, self.token_budget)
                if self.dtype == "bfloat16" and not _cpu_has("amx_tile") and not self._source.attention_is_fixed:
                    # Without AMX the fused attention of CPUs is slower in bfloat16 than two matrix products.
                    use_attention(self._model, register_matmul_attention())
        return self._model

    def key(self) -> dict[str, Any]:
        """What determines this copy's outputs, for cache keys."""
        if self._key is None:
            self._key = {
                "weights": self._source.weights_fingerprint(),
                "dtype": self.dtype,
                "token_budget": self.token_budget,
                **{f"processor_{name}": value for name, value in self.processor.settings().items()},
            }
        return self._key

    def encode(
        self,
        features: Sequence[Sequence[int]],
        kind: str,
        advance: Callable[[int], None] | None = None,
        layers: Sequence[int] = (),
    ) -> np.ndarray:
        """Vectors of tokenised texts, `float32[n, D]`, of a [`DenseRetriever`].

        Args:
            features: Token ids, as `processor.encode(texts, kind)` returns them.
            kind: `"query"` or `"passage"`.
            advance: Called with the number of texts after every batch.
            layers: Numbers of layers, from 1, whose pooled vectors are wanted instead: `float32[n, K, H]`.
        """

        def forward(chunk: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.model.encode(chunk, kind, None, layers)[1] if layers else self.model.encode(chunk, kind)

        return self.run(features, None, forward, advance)

    def score(
        self,
        features: Sequence[Sequence[int]],
        token_types: Sequence[Sequence[int]] | None,
        advance: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Scores of tokenised pairs, `float32[n]`, of a [`CrossEncoderRanker`].

        Args:
            features: Token ids, as `processor.pairs` returns them.
            token_types: Token types, as it returns them too.
            advance: Called with the number of pairs after every batch.
        """
        return self.run(features, token_types, self.model.score_chunk, advance)

    def encode_sparse(
        self, features: Sequence[Sequence[int]], kind: str, advance: Callable[[int], None] | None = None
    ) -> csr_matrix:
        """Term weights of tokenised texts, `scipy.sparse.csr_matrix[n, V]`, of a [`LexicalRetriever`].

        Args:
            features: Token ids, as `processor.encode(texts, kind)` returns them.
            kind: `"query"` or `"passage"`.
            advance: Called with the number of texts after every batch.
        """
        parts, order = [], []
        for batch, weights in self.outputs(features, None, lambda chunk: self.model.encode(chunk, kind)):
            rows, terms = weights.nonzero(as_tuple=True)
            values = weights[rows, terms].cpu().numpy()
            self.check_finite(values)
            ends = torch.bincount(rows, minlength=len(batch)).cumsum(0).cpu().numpy()
            indptr, terms = np.concatenate([[0], ends]), terms.to(torch.int32).cpu().numpy()
            parts.append(csr_matrix((values, terms, indptr), shape=tuple(weights.shape)))
            order.append(batch)
            if advance is not None:
                advance(len(batch))
        return vstack(parts, format="csr")[np.argsort(np.concatenate(order))]

    def run(
        self,
        features: Sequence[Sequence[int]],
        token_types: Sequence[Sequence[int]] | None,
        forward: Callable[[dict[str, torch.Tensor]], torch.Tensor],
        advance: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """What `forward` gives for every text (or pair), in their order: `float32[n, ...]`.

        Args:
            features: Token ids.
            token_types: Token types of pairs, or None.
            forward: From a padded chunk of n texts to a tensor `[n, ...]`.
            advance: Called with the number of texts after every batch.
        """
        result: torch.Tensor | None = None
        for batch, output in self.outputs(features, token_types, forward):
            if result is None:
                result = torch.empty((len(features), *output.shape[1:]), dtype=torch.float32, device=self.device)
            # Kept on the device, so that a GPU never waits for a copy.
            result[torch.from_numpy(batch).to(self.device)] = output
            if advance is not None:
                advance(len(batch))
        values = result.cpu().numpy()
        self.check_finite(values)
        return values

    def outputs(
        self,
        features: Sequence[Sequence[int]],
        token_types: Sequence[Sequence[int]] | None,
        forward: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Positions of the texts of every batch, and what the model makes of them."""
        if not len(features):
            raise InputError("no texts", where="encoding", cure="Give at least one")
        lengths = np.fromiter(map(len, features), dtype=np.int64, count=len(features))
        fill, left = self.processor.pad_token_id, self.processor.padding_side == "left"
        asynchronous = self.device.type == "cuda"
        for batch in plan_batches(lengths, self.token_budget):
            rows = batch.tolist()
            columns = np.arange(lengths[batch[0]])
            if left:
                columns = columns[::-1]
            arrays = {
                "input_ids": pad_batch([features[row] for row in rows], fill, left),
                "attention_mask": (columns < lengths[batch][:, None]).astype(np.int64),
            }
            if token_types is not None:
                arrays["token_type_ids"] = pad_batch([token_types[row] for row in rows], 0, left)
            chunk = {name: torch.from_numpy(array) for name, array in arrays.items()}
            if asynchronous:
                chunk = {name: one.pin_memory().to(self.device, non_blocking=True) for name, one in chunk.items()}
            elif self.device.type != "cpu":
                chunk = {name: one.to(self.device) for name, one in chunk.items()}
            with torch.inference_mode():
                output = forward(chunk)
            yield batch, output

    def check_finite(self, values: np.ndarray) -> None:
        """Raises [`InputError`] for outputs that are no numbers."""
        if not np.isfinite(values).all():
            raise InputError(
                f"the model's outputs are not finite in {self.dtype}",
                where=str(self._source.name_or_path or type(self._source).__name__),
                cure="Use dtype float32; if it happens there too, the weights are broken",
            )


@functools.cache
def _cpu_has(*names: str) -> bool:
    """Whether the CPU has one of the instruction sets."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return any(getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in names)
