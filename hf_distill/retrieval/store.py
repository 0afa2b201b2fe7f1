"""Embeddings on disk: shards of `.npy` files, memory-mapped, addressed by position."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..files import fingerprint, read_json
from .shards import MANIFEST, ShardedJob, default_shard_rows, digest, write_array


if TYPE_CHECKING:
    from ..data import TextTable

STORAGES = ("float32", "float16")


class VectorStore(ABC):
    """What stores of one vector for each row of a table have in common: a folder of shards and its manifest."""

    folder: Path
    key: dict[str, Any]
    # Facts that follow from `key`.
    info: Mapping[str, Any] = MappingProxyType({})
    dim: int
    # Ending of the shards' names.
    suffix = ".npy"

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} x {self.dim} in {self.folder})"

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.dim

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of what the vectors were made from."""
        return fingerprint(self.key)

    def _read_manifest(self) -> list[Path]:
        """Reads `key`; the paths of all shards."""
        try:
            manifest = read_json(self.folder / MANIFEST)
            self.key, self.info = manifest["key"], manifest.get("info", {})
            count = int(self.key["num_shards"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"no store of embeddings ({error})",
                where=str(self.folder / MANIFEST),
                cure="Give a folder that encode_table or EmbeddingStore.write made, or one .npy file",
            ) from None
        paths = [self.folder / f"shard-{number:05d}{self.suffix}" for number in range(count)]
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            raise InputError(
                f"{len(missing)} of {count} shards are missing ({missing[0]}, ...)",
                where=str(self.folder),
                cure="Run the command that makes it again; it goes on where it stopped",
            )
        return paths

    def _check(self, table: TextTable) -> None:
        if len(self) != len(table):
            raise InputError(
                f"{len(self)} vectors for {len(table)} {table.noun} of {table.where}",
                where=str(self.folder),
                cure="Give the embeddings of this collection",
            )
        if self.key.get("table", table.fingerprint) != table.fingerprint:
            raise InputError(
                f"made from other {table.noun} than those of {table.where} (the fingerprints differ)",
                where=str(self.folder),
                cure="Give the embeddings of this collection",
            )


class EmbeddingStore(VectorStore):
    """One vector for each row of a table; only what is asked for is read from disk.

    Args:
        folder: A folder that `encode_table` or `EmbeddingStore.write` made, or one `.npy` file `[rows, dim]`.
        table: The queries or the corpus that the vectors stand for, to check that they fit.

    Raises:
        InputError: If the folder is incomplete or of other texts than those of `table`.
    """

    def __init__(self, folder: str | os.PathLike, table: TextTable | None = None):
        self.folder = Path(folder)
        self.key: dict[str, Any] = {}
        if self.folder.is_file():
            paths = [self.folder]
        else:
            paths = self._read_manifest()
        self._shards = [_open(path) for path in paths]
        widths = {shard.shape[1] for shard in self._shards}
        if len(widths) > 1:
            raise InputError(f"shards of widths {sorted(widths)}", where=str(self.folder), cure="Remove the folder")
        self.dim: int = widths.pop()
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        if table is not None:
            self._check(table)

    @classmethod
    def write(
        cls,
        folder: str | os.PathLike,
        vectors: np.ndarray,
        table: TextTable,
        *,
        origin: Mapping[str, Any] | None = None,
    ) -> EmbeddingStore:
        """Stores vectors that were made elsewhere, so that they can teach.

        Args:
            folder: Where to.
            vectors: `float[len(table), D]`.
            table: The queries or the corpus that they stand for.
            origin: Where they came from.
        """
        vectors = np.asarray(vectors)
        if vectors.ndim != 2 or len(vectors) != len(table):
            raise InputError(
                f"vectors of shape {vectors.shape} for {len(table)} {table.noun}",
                where="EmbeddingStore.write",
                cure="Give one vector for each",
            )
        if not np.isfinite(vectors).all():
            row = int(np.argmin(np.isfinite(vectors).all(axis=1)))
            raise InputError(
                "the vector is not finite", where=f"row {row} ({table.ids_at([row])[0]!r})", cure="Mend the vectors"
            )
        vectors = vectors if vectors.dtype == np.float16 else vectors.astype(np.float32)
        rows = default_shard_rows(len(vectors))
        key = {
            "origin": dict(origin or {}),
            "table": table.fingerprint,
            "rows": len(table),
            "content": digest(vectors),
        }
        job = ShardedJob(folder, key, -(-len(vectors) // rows))
        job.run(lambda shard, path: write_array(path, vectors[shard * rows : (shard + 1) * rows]), "store embeddings")
        return cls(folder, table)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def dtype(self) -> np.dtype:
        """float32 or float16: how the vectors are stored."""
        return self._shards[0].dtype

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of what the vectors were made from."""
        if self.key:
            return super().fingerprint
        status = self.folder.stat()
        return fingerprint([str(self.folder.resolve()), status.st_size, status.st_mtime_ns])

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Vectors `start` to `stop`, `float32[n, D]`."""
        start, stop = max(0, start), min(stop, len(self))
        parts = []
        for shard, end in zip(self._shards, self._ends.tolist()):
            begin = end - len(shard)
            if end > start and begin < stop:
                # A copy: torch does not like the read-only memory of a mapped file.
                parts.append(np.array(shard[max(0, start - begin) : stop - begin], dtype=np.float32))
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty((0, self.dim), np.float32)])

    def take(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Vectors at `positions`, in their order, `float32[n, D]`; `IndexError` outside of the store."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= len(self)):
            raise IndexError(f"positions {positions.min()}..{positions.max()} outside of 0..{len(self) - 1}")
        result = np.empty((len(positions), self.dim), dtype=np.float32)
        owner = np.searchsorted(self._ends, positions, side="right")
        order = np.lexsort((positions, owner))  # the file is read from front to back
        owners, starts = np.unique(owner[order], return_index=True)
        for number, group in zip(owners.tolist(), np.split(order, starts[1:])):
            shard = self._shards[number]
            result[group] = shard[positions[group] - (self._ends[number] - len(shard))]
        return result

    def blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """All vectors as pairs *(first row, float32[at most `rows`, D])*."""
        for start in range(0, len(self), rows):
            yield start, self.rows(start, start + rows)


def _open(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(
            f"cannot be read ({error})", where=str(path), cure="Remove this file and run the command again"
        ) from None
    if array.ndim != 2 or array.dtype not in (np.float32, np.float16):
        raise InputError(
            f"an array of shape {array.shape} and type {array.dtype}",
            where=str(path),
            cure="Embeddings are float32 or float16 of shape [rows, dim]",
        )
    return array
