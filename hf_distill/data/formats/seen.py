"""Which identifiers came before, without keeping them: 16 bytes each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import xxhash


def hashes_of(texts: pa.Array | pa.ChunkedArray | Sequence[str]) -> np.ndarray:
    """The XXH3 hashes (`uint64[n]`) of strings."""
    if isinstance(texts, (pa.Array, pa.ChunkedArray)):
        data = texts.cast(pa.binary()).to_pylist()
    else:
        data = [text.encode("utf-8", "surrogatepass") for text in texts]
    return np.fromiter(map(xxhash.xxh3_64_intdigest, data), dtype=np.uint64, count=len(data))


class Seen:
    """A growing set of 64-bit hashes, each with the hash of what it stands for.

    Kept as sorted runs, each at least twice as long as the next, so that adding costs little and nothing is copied
    often. Two of ten million identifiers share a hash with a probability of 3 in a million.
    """

    def __init__(self):
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        return sum(len(hashes) for hashes, _ in self._runs)

    def add(self, hashes: np.ndarray, contents: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Adds hashes.

        Args:
            hashes: `uint64[n]`.
            contents: `uint64[n]`, the hashes of what they stand for.

        Returns:
            `bool[n]`, whether each comes for the first time, and `bool[n]`, whether it stands for the same as then.
        """
        contents = np.zeros(len(hashes), np.uint64) if contents is None else contents
        distinct, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        known, content = self._find(distinct)
        content[~known] = contents[first[~known]]
        fresh = np.zeros(len(hashes), dtype=bool)
        fresh[first[~known]] = True
        self._push(distinct[~known], content[~known])
        return fresh, contents == content[inverse]

    def holds(self, hashes: np.ndarray) -> np.ndarray:
        """`bool[n]`: whether each hash was added."""
        return self._find(hashes)[0]

    def _find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        known, content = np.zeros(len(hashes), dtype=bool), np.zeros(len(hashes), np.uint64)
        for run, contents in self._runs:
            slots = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            hit = run[slots] == hashes
            known |= hit
            content[hit] = contents[slots[hit]]
        return known, content

    def _push(self, hashes: np.ndarray, contents: np.ndarray) -> None:
        if not len(hashes):
            return
        while self._runs and len(self._runs[-1][0]) < 2 * len(hashes):
            older, old_contents = self._runs.pop()
            hashes, contents = np.concatenate([older, hashes]), np.concatenate([old_contents, contents])
            order = np.argsort(hashes, kind="stable")
            hashes, contents = hashes[order], contents[order]
        self._runs.append((hashes, contents))
