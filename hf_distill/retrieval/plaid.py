"""PLAID as the engine that finds a multi-vector model's candidates: compressed token vectors, through fast-plaid.

Santhanam et al., "PLAID: An Efficient Engine for Late Interaction Retrieval" (2022): a token is its nearest centroid
and a residual of a few bits; passages are found by their centroids and scored by the decompressed tokens. Here the
best of them are then ranked by exact MaxSim, like the candidates of any other index over tokens.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import InputError
from .shards import ShardedJob


if TYPE_CHECKING:
    from .multi_vector import Tokens, TokenStore

PLAID = "Plaid"

# Raised by hand when the same key would give another index.
PLAID_VERSION = 1

# Tokens of passages that the engine is given at once: 1 GiB at a width of 128.
_BLOCK_TOKENS = 2**22
_BITS = 4
# What may stand after the semicolon; see fast-plaid's `search`.
_SEARCH_OPTIONS = ("n_ivf_probe", "n_full_scores")


def is_plaid(factory: str) -> bool:
    """Whether an index's description names this engine."""
    return factory.partition(";")[0] == PLAID


def check_plaid(factory: str = PLAID, search_options: str | None = None) -> dict[str, int]:
    """The options of a description, `"Plaid;nbits=2,n_ivf_probe=32"`.

    Raises:
        InputError: If an option is unknown or no number, or if the engine is not installed.
    """
    options = {"nbits": _BITS}
    written = search_options or factory.partition(";")[2]
    for part in filter(None, (part.strip() for part in written.split(","))):
        name, _, value = part.partition("=")
        if name not in ("nbits", *_SEARCH_OPTIONS) or not value.isdecimal() or int(value) < 1:
            raise InputError(
                f"{part!r} is no option of PLAID",
                where="index",
                cure="Write for example Plaid;nbits=2,n_ivf_probe=32,n_full_scores=8192",
            )
        options[name] = int(value)
    if importlib.util.find_spec("fast_plaid") is None:
        raise InputError(
            "PLAID is not installed",
            where="index",
            cure="pip install 'hf_distill[plaid]' (its wheels are bound to a version of torch), or name an index of "
            "FAISS over tokens, for example 'IVF4096,PQ16;nprobe=32'",
        )
    return options


class PlaidIndex:
    """Compressed token vectors of a corpus in fast-plaid's own files.

    Args:
        folder: What [`write_plaid`] wrote.
        named: `int64[n]`, the passages the engine holds: those with tokens.
        device: Where to search.
        options: Options of fast-plaid's `search`.
    """

    def __init__(self, folder: str | os.PathLike, named: np.ndarray, device: torch.device, options: dict[str, int]):
        self.named, self.options = named, options
        self._engine = _engine(folder, device)

    @classmethod
    def build(
        cls,
        passages: TokenStore,
        factory: str = PLAID,
        *,
        device: torch.device,
        search_options: str | None = None,
        cache_dir: str | os.PathLike | None = None,
    ) -> PlaidIndex:
        """Makes the index of a store, or finds it in the cache; all of accelerate's processes must call this.

        Args:
            passages: The token vectors.
            factory: `"Plaid"`, with options after a semicolon: see [`check_plaid`].
            device: Where to compress and search.
            search_options: The options, if they do not stand in `factory`.
            cache_dir: Instead of the default cache folder.

        Raises:
            InputError: See [`check_plaid`].
        """
        options = check_plaid(factory, search_options)
        bits = options.pop("nbits")
        named = np.flatnonzero(passages.lengths)
        key = {"version": PLAID_VERSION, "vectors": passages.fingerprint, "nbits": bits}
        job = ShardedJob.cached("plaid", key, 1, cache_dir, suffix="")
        job.run(
            lambda _, path: write_plaid(path, passages, named, bits, device),
            "PLAID index",
            sizes=[len(named)],
            unit="passage",
        )
        return cls(job.path(0), named, device, options)

    def find(self, queries: Tokens, count: int) -> list[np.ndarray]:
        """At most `count` passages for each query, as ascending positions `int64[m]`."""
        found: list[np.ndarray] = [np.empty(0, np.int64) for _ in range(len(queries))]
        asked = np.flatnonzero(queries.lengths)
        tokens = [torch.from_numpy(np.ascontiguousarray(queries.rows(row, row + 1).vectors)) for row in asked]
        if not tokens:
            return found
        # Of those scored by their centroids the engine decompresses a quarter.
        options = {"top_k": min(count, len(self.named)), "n_full_scores": max(4096, 16 * count), **self.options}
        results = self._engine.search(tokens, show_progress=False, **options)
        for row, hits in zip(asked, results):
            found[row] = np.sort(self.named[[position for position, _ in hits]])
        return found


def write_plaid(
    folder: str | os.PathLike,
    passages: TokenStore | Tokens,
    named: Sequence[int] | np.ndarray,
    bits: int = _BITS,
    device: torch.device | str = "cpu",
) -> None:
    """Compresses passages into fast-plaid's files, a block at a time: memory does not grow with the corpus.

    Centroids come from the first block; the engine adds some where later tokens are far from all of them.

    Args:
        folder: Receives the files.
        passages: The token vectors.
        named: `int64[n]`, which passages: each must have a token.
        bits: Of a residual.
        device: Where to compress.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    engine = _engine(folder, torch.device(device))
    named = np.asarray(named, np.int64)
    block = np.cumsum(passages.lengths[named]) // _BLOCK_TOKENS
    for number, chosen in enumerate(np.split(named, np.flatnonzero(np.diff(block)) + 1)):
        tokens = passages.take(chosen)
        vectors = torch.from_numpy(tokens.vectors).half().split(tokens.lengths.tolist())
        # Without the threshold the engine would keep small corpora uncompressed as well.
        if number == 0:
            engine.create(list(vectors), nbits=bits, start_from_scratch=0)
        else:
            engine.update(list(vectors), start_from_scratch=0)
    engine.close()


def _engine(folder: str | os.PathLike, device: torch.device) -> Any:
    from fast_plaid.search import FastPlaid

    return FastPlaid(index=str(folder), device=str(device))
