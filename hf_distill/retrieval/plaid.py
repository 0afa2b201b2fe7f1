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

# What the engine needs for the vectors of passages that it is given at once, and for each of their numbers: ours, and
# its own copies in half and in single precision.
_BLOCK_BYTES, _NUMBER_BYTES = 2**31, 12
_BITS, _ALL_BITS = 4, (1, 2, 4, 8)
# What may stand after the semicolon; see fast-plaid's `search`.
_SEARCH_OPTIONS = ("n_ivf_probe", "n_full_scores")
# Fewer tokens than these are searched without the engine.
SMALLEST = 1024


def is_plaid(factory: str) -> bool:
    """Whether an index's description names this engine."""
    return factory.partition(";")[0] == PLAID


def check_plaid(
    factory: str = PLAID, search_options: str | None = None, *, width: int | None = None, normalized: bool = True
) -> dict[str, int]:
    """The options of a description, `"Plaid;nbits=2,n_ivf_probe=32"`.

    Args:
        factory: The description.
        search_options: The options, if they do not stand in `factory`.
        width: Of the token vectors.
        normalized: Whether they have length 1.

    Raises:
        InputError: If an option is unknown or cannot be, if the engine is not there, or if it does not suit the model.
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
    bits = options["nbits"]
    if bits not in _ALL_BITS or (width or 8) * bits % 8:
        raise InputError(
            f"PLAID cannot compress {f'vectors of width {width}' if width else 'vectors'} to {bits} bits a number",
            where="index",
            cure=f"Choose nbits of {', '.join(map(str, _ALL_BITS))}, so that a vector fills whole bytes",
        )
    if not normalized:
        raise InputError(
            "PLAID finds passages by the directions of tokens, and this model's tokens differ in length",
            where="index",
            cure="Use Flat, or an index of FAISS over tokens, for example 'IVF4096,PQ16;nprobe=32'",
        )
    _import_plaid()
    return options


def _import_plaid() -> Any:
    try:
        from fast_plaid import search
    except ImportError as error:
        missing = importlib.util.find_spec("fast_plaid") is None
        raise InputError(
            "PLAID is not installed" if missing else f"the installed fast-plaid cannot be loaded ({error})",
            where="index",
            cure="pip install 'hf_distill[plaid]' (its wheels are each bound to a version of torch), or name an index "
            "of FAISS over tokens, for example 'IVF4096,PQ16;nprobe=32'",
        ) from None
    return search


class PlaidIndex:
    """Compressed token vectors of a corpus in fast-plaid's own files.

    Args:
        folder: What [`write_plaid`] wrote.
        named: `int64[n]`, the passages the engine holds: those with tokens.
        device: Where to search.
        options: Options of fast-plaid's `search`.
    """

    def __init__(self, folder: str | os.PathLike, named: np.ndarray, device: torch.device, options: dict[str, int]):
        self.named, self.options = named, dict(options)
        self._engine = _engine(folder, device)
        if "n_ivf_probe" in options:
            centroids = np.load(Path(folder) / "centroids.npy", mmap_mode="r", allow_pickle=False)
            self.options["n_ivf_probe"] = min(options["n_ivf_probe"], len(centroids))

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
    block = np.cumsum(passages.lengths[named]) * passages.shape[1] * _NUMBER_BYTES // _BLOCK_BYTES
    for number, chosen in enumerate(np.split(named, np.flatnonzero(np.diff(block)) + 1)):
        vectors = _halves(passages, chosen)
        # With a threshold above 0 the engine would keep a small corpus uncompressed as well.
        if number == 0:
            engine.create(vectors, nbits=bits, start_from_scratch=0)
        else:
            engine.update(vectors, start_from_scratch=0)
    engine.close()


def _halves(passages: TokenStore | Tokens, positions: np.ndarray) -> list[torch.Tensor]:
    """The token vectors of some passages, float16 `[tokens, D]` each."""
    tokens = passages.take(positions)
    return list(torch.from_numpy(tokens.vectors).half().split(tokens.lengths.tolist()))


def _engine(folder: str | os.PathLike, device: torch.device) -> Any:
    return _import_plaid().FastPlaid(index=str(folder), device=str(device))
