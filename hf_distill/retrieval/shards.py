"""Long work cut in shards: each is complete or absent, so that a killed job goes on where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..console import progress
from ..errors import InputError
from ..files import atomic_path, cache_folder, fingerprint, read_json, write_json


MANIFEST = "manifest.json"
_TEMPORARY = re.compile(r"\.shard-\d+.*\.tmp")


def default_shard_rows(rows: int, largest: int = 8192, smallest: int = 256) -> int:
    """Rows of a shard: 16 shards where that leaves `smallest` rows each, so that processes share the work.

    A function of the number of rows alone: on any number of processes the shards are the same.
    """
    return int(min(largest, max(smallest, -(-rows // 16))))


def digest(*arrays: np.ndarray) -> str:
    """16 hexadecimal digits of the types, shapes and contents of arrays."""
    content = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        content.update(f"{array.dtype.str}{array.shape}".encode())
        content.update(array.reshape(-1).view(np.uint8).data)
    return content.hexdigest()[:16]


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes one `.npy` file under exactly this name, whatever its ending."""
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)


class ShardedJob:
    """Work whose result is a folder of shards and a manifest that says what they were made from.

    Shards are written by this process or, under a launcher of accelerate, by all of its processes: process r of W
    writes every W-th of those that are missing. What a shard contains must depend on `key` and its number alone; then
    any number of processes, killed and started again at any time, leave the same bytes. Two independent runs in one
    folder do the same work twice, and the second result of a shard replaces an equal one.

    All processes have to come here together.

    Args:
        folder: Where shards and manifest stand.
        key: JSON-like settings that determine the content, for example fingerprints of weights and texts.
        num_shards: How many shards there are.
        suffix: Ending of the shards' names; a shard may also be a folder.
        info: JSON-like facts for readers of the manifest that follow from `key`.

    Raises:
        InputError: By `run`, if the folder holds the work of another key, or the processes do not share a folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        key: Mapping[str, Any],
        num_shards: int,
        *,
        suffix: str = ".npy",
        info: Mapping[str, Any] | None = None,
    ):
        self.folder, self.num_shards, self.suffix = Path(folder), int(num_shards), suffix
        # What JSON makes of it is what a later process will read and compare.
        self.key = _as_json({**key, "num_shards": self.num_shards})
        self.info = _as_json(info or {})
        self._bar: Any = None
        self._advanced = 0

    @classmethod
    def cached(
        cls,
        kind: str,
        key: Mapping[str, Any],
        num_shards: int,
        cache_dir: str | os.PathLike | None = None,
        **options: Any,
    ) -> ShardedJob:
        """A job in the cache folder, under a name made of `kind` and the fingerprint of `key`."""
        key = {"kind": kind, **key}
        return cls(cache_folder(cache_dir) / kind / fingerprint(_as_json(key)), key, num_shards, **options)

    def path(self, shard: int) -> Path:
        """The file (or folder) of shard number `shard`."""
        return self.folder / f"shard-{shard:05d}{self.suffix}"

    def paths(self) -> list[Path]:
        """The files of all shards, in order."""
        return [self.path(shard) for shard in range(self.num_shards)]

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there yet."""
        try:
            with os.scandir(self.folder) as entries:
                present = {entry.name for entry in entries}
        except FileNotFoundError:
            present = set()
        return [shard for shard in range(self.num_shards) if self.path(shard).name not in present]

    def is_complete(self) -> bool:
        """Whether a manifest of this very key and all shards are there."""
        return self._state() == "ours" and not self.missing()

    def is_complete_for_all(self) -> bool:
        """`is_complete` as the main process sees it, the same in all processes: for decisions on common work."""
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        seen = [self.is_complete() if PartialState().is_main_process else None]
        return bool(broadcast_object_list(seen)[0])

    def advance(self, amount: int) -> None:
        """Moves the progress bar within a shard; for use inside `write_shard`."""
        if self._bar is not None:
            self._bar.update(amount)
            self._advanced += amount

    def run(
        self,
        write_shard: Callable[..., None],
        label: str,
        *,
        sizes: Sequence[int] | None = None,
        unit: str = "shard",
        prepare: Callable[[int], Any] | None = None,
    ) -> None:
        """Writes the missing shards.

        Args:
            write_shard: Called with the number of a shard and the temporary path to write it at (and with what
                `prepare` returned, where that is given).
            label: For the progress bar.
            sizes: How much work each shard is, in `unit`s; 1 each by default.
            unit: What the progress bar counts.
            prepare: Called with the number of a shard, in a thread, while the shard before is written.
        """
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        state = PartialState()
        # One process looks, all act on what it saw: lists made at different moments would differ.
        news: list[Any] = [self._open() if state.is_main_process else None]
        error, missing = broadcast_object_list(news)[0]
        if error is not None:
            raise InputError(**error)
        if not missing:
            return
        mine = missing[state.process_index :: state.num_processes]
        sizes = [1] * self.num_shards if sizes is None else sizes
        self._bar = progress(total=sum(sizes[shard] for shard in mine), label=label, unit=unit)
        try:
            for shard, prepared in _ahead(mine, prepare):
                self._advanced = 0
                self._write(shard, write_shard, (prepared,) if prepare else ())
                self.advance(sizes[shard] - self._advanced)
        finally:
            self._bar.close()
            self._bar = None
        state.wait_for_everyone()
        absent = self.missing()
        if absent:
            raise InputError(
                f"{len(absent)} of {self.num_shards} shards are not there after all processes have finished",
                where=str(self.folder),
                cure="Let all machines share this folder: set HF_DISTILL_CACHE to one on a common file system",
            )
        if state.is_main_process:
            # Every shard is there, so what is left under a temporary name is from a process that was killed.
            for entry in self.folder.iterdir():
                if _TEMPORARY.fullmatch(entry.name):
                    shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)

    def _write(self, shard: int, write_shard: Callable[..., None], extra: tuple) -> None:
        target = self.path(shard)
        try:
            with atomic_path(target) as temporary:
                write_shard(shard, temporary, *extra)
        except OSError as error:
            # Another run in this folder may have finished the shard and tidied up; its bytes are the same.
            if target.exists():
                return
            raise InputError(
                f"cannot be written ({error.strerror or error})",
                where=str(target),
                cure="Choose another cache folder with HF_DISTILL_CACHE; finished shards are kept",
            ) from error

    def _state(self) -> str | dict[str, Any]:
        """`"new"`, `"ours"`, or the key of somebody else's manifest."""
        path = self.folder / MANIFEST
        if not path.exists():
            return "new"
        try:
            found = dict(read_json(path)["key"])
        except (ValueError, KeyError, TypeError):
            found = {"manifest": "unreadable"}
        return "ours" if found == self.key else found

    def _open(self) -> tuple[dict[str, Any] | None, list[int]]:
        """Checks or writes the manifest; the error as keyword arguments of `InputError`, and the missing shards."""
        found = self._state()
        if isinstance(found, dict):
            names = sorted(name for name in {*found, *self.key} if found.get(name) != self.key.get(name))
            differing = ", ".join(
                f"{name} is {_short(found.get(name))} there and {_short(self.key.get(name))} here" for name in names
            )
            return {
                "problem": f"the folder holds the work of other settings: {differing}",
                "where": str(self.folder / MANIFEST),
                "cure": "Choose another folder, or remove this one",
            }, []
        if found == "new":
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / MANIFEST, {"key": self.key, "info": self.info, "made_with": _made_with()})
        return None, self.missing()


@contextlib.contextmanager
def working_folder(cache_dir: str | os.PathLike | None, keep: bool) -> Iterator[Path]:
    """The cache folder, or (`keep=False`) a temporary one inside it that all processes share and that is removed."""
    if keep:
        yield cache_folder(cache_dir)
        return
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    name: list[Any] = [None]
    if state.is_main_process:
        cache_folder(cache_dir).mkdir(parents=True, exist_ok=True)
        name = [tempfile.mkdtemp(prefix="working-", dir=cache_folder(cache_dir))]
    folder = Path(broadcast_object_list(name)[0])
    try:
        yield folder
        state.wait_for_everyone()
    finally:
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)


def _ahead(shards: list[int], prepare: Callable[[int], Any] | None) -> Iterator[tuple[int, Any]]:
    if prepare is None or not shards:
        yield from ((shard, None) for shard in shards)
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = pool.submit(prepare, shards[0])
        for number, shard in enumerate(shards):
            prepared = coming.result()
            if number + 1 < len(shards):
                coming = pool.submit(prepare, shards[number + 1])
            yield shard, prepared


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _made_with() -> dict[str, Any]:
    """What the bytes depend on beside the key: equal bytes are promised for equal software, threads and hardware."""
    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
