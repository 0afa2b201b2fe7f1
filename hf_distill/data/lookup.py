"""From identifiers to positions without a dictionary: sorted 64-bit hashes, 16 bytes a row, memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from .arrow import BLOCK_ROWS, ArrowStrings


class DoubledIdError(ValueError):
    """One identifier in two rows; `first` and `second` are their positions."""

    def __init__(self, identifier: str, first: int, second: int):
        super().__init__(f"identifier {identifier!r} in rows {first} and {second}")
        self.identifier, self.first, self.second = identifier, first, second


def hash_ids(ids: Sequence[str], count: int) -> np.ndarray:
    """The XXH3 hashes (`uint64[count]`) of strings; lone surrogates, which no stored string has, hash too."""
    digest = xxhash.xxh3_64_intdigest
    try:
        return np.fromiter(map(digest, map(str.encode, ids)), dtype=np.uint64, count=count)
    except UnicodeEncodeError:
        encoded = [text.encode("utf-8", "surrogatepass") for text in ids]
        return np.fromiter(map(digest, encoded), dtype=np.uint64, count=count)


class IdIndex:
    """Finds the positions of strings in a column.

    Args:
        hashes: `uint64[n]`, ascending.
        order: `int64[n]`, the position that each hash belongs to.
    """

    def __init__(self, hashes: np.ndarray, order: np.ndarray):
        self.hashes, self.order = hashes, order

    @classmethod
    def build(cls, ids: ArrowStrings) -> IdIndex:
        """Hashes and sorts the strings; raises `DoubledIdError` when two of them are equal."""
        parts = [hash_ids(block.to_pylist(), len(block)) for block in ids.blocks()]
        hashes = np.concatenate(parts) if parts else np.empty(0, np.uint64)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        equal = np.flatnonzero(hashes[1:] == hashes[:-1])
        if equal.size:
            suspects = np.unique(np.concatenate([order[equal], order[equal + 1]]))
            seen: dict[str, int] = {}
            for position, identifier in zip(suspects.tolist(), ids.at(suspects)):
                if identifier in seen:
                    raise DoubledIdError(identifier, seen[identifier], position)
                seen[identifier] = position
        return cls(hashes, order)

    def save(self, folder: Path) -> None:
        """Writes both arrays beside the table."""
        np.save(folder / "id_hashes.npy", self.hashes)
        np.save(folder / "id_order.npy", self.order)

    @classmethod
    def load(cls, folder: Path) -> IdIndex:
        """Memory-maps both arrays."""
        return cls(*(np.load(folder / name, mmap_mode="r") for name in ("id_hashes.npy", "id_order.npy")))

    def find(self, wanted: Sequence[str], ids: ArrowStrings) -> np.ndarray:
        """Positions (`int64`) of `wanted` in the column that the index was built of, -1 where there is none."""
        result = np.full(len(wanted), -1, dtype=np.int64)
        for start in range(0, len(wanted), BLOCK_ROWS * 16):
            block = wanted[start : start + BLOCK_ROWS * 16]
            result[start : start + len(block)] = self._find_block(block, ids)
        return result

    def _find_block(self, wanted: Sequence[str], ids: ArrowStrings) -> np.ndarray:
        result = np.full(len(wanted), -1, dtype=np.int64)
        hashes = hash_ids(wanted, len(wanted))
        # In ascending order, so that neighbours in the memory map are touched one after the other.
        order = np.argsort(hashes)
        slots = np.empty(len(wanted), np.int64)
        slots[order] = np.searchsorted(self.hashes, hashes[order])
        open_items = np.arange(len(wanted))
        while True:  # a second round happens only where two identifiers share a 64-bit hash
            inside = slots < len(self.hashes)
            open_items, slots = open_items[inside], slots[inside]
            alive = self.hashes[slots] == hashes[open_items]
            open_items, slots = open_items[alive], slots[alive]
            if not open_items.size:
                return result
            candidates = self.order[slots]
            found = _equal(ids.take(candidates), [wanted[item] for item in open_items.tolist()])
            result[open_items[found]] = candidates[found]
            open_items, slots = open_items[~found], slots[~found] + 1


def _equal(stored: pa.Array, wanted: list[str]) -> np.ndarray:
    try:
        return pc.equal(stored, pa.array(wanted, pa.string())).to_numpy(zero_copy_only=False)
    except UnicodeEncodeError:  # half a surrogate pair, which is not stored anywhere
        return np.array([one == other for one, other in zip(stored.to_pylist(), wanted)])
