"""Files that are either complete or absent, and fingerprints of what they were made from."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import InputError


# Errors of a file system that takes no more: full, over quota, or a file at its largest.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# The same as libraries say it that write files by themselves: safetensors (Rust), faiss and torch (C++), numpy.
_FULL_TEXT = re.compile(
    r"no space left|disk quota|file too large|os error (28|27|122)\b|PytorchStreamWriter failed|unexpected pos \d+"
    r"|requested and \d+ written",
    re.IGNORECASE,
)


def full_disk(error: BaseException, folder: str | os.PathLike) -> InputError | None:
    """The sentence for an error that says that nothing more fits into `folder`; None for any other error."""
    if isinstance(error, InputError) or not isinstance(error, Exception):
        return None
    if not (isinstance(error, OSError) and error.errno in _FULL or _FULL_TEXT.search(str(error))):
        return None
    # A temporary folder is the name of nothing that a person knows.
    folder = next(place for place in (Path(folder), *Path(folder).parents) if place.suffix != ".tmp")
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    usage = shutil.disk_usage(place)
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "the disk is full"
    return InputError(
        f"cannot be written to ({reason}; {readable_size(usage.free)} of {readable_size(usage.total)} are free)",
        where=str(folder),
        cure="Make room and start the same command again: what was finished is kept",
    )


def readable_size(size: float) -> str:
    """A number of bytes as people read it, `1.5 GiB` say."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


@contextmanager
def saying_full_disk(folder: str | os.PathLike) -> Iterator[None]:
    """Turns the error of a full disk, in whatever library it occurs, into [`InputError`]."""
    try:
        yield
    except Exception as error:
        sentence = full_disk(error, folder)
        if sentence is None:
            raise
        raise sentence from error


@contextmanager
def atomic_path(target: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary sibling of `target` (a file or a folder) that takes its name only if the block succeeds.

    A process killed inside the block leaves `target` as it was; the sibling's name starts with a dot, so that no
    reader takes it for a result.

    Raises:
        InputError: If the disk is full.
    """
    target = Path(target)
    if target.is_symlink() and target.is_dir():
        target = target.resolve()  # the folder is replaced, not the link to it
    temporary = _temporary_name(target)
    try:
        with saying_full_disk(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if temporary.is_dir():
                _replace_folder(temporary, target)
            else:
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, target)
    finally:
        _remove(temporary)


def _replace_folder(temporary: Path, target: Path) -> None:
    # A folder takes the place of an empty one or of none. Another process may put its own there in between: the last
    # one stays.
    while True:
        aside = _temporary_name(target)
        try:
            with suppress(FileNotFoundError):
                os.replace(target, aside)
            os.replace(temporary, target)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                continue
            if not target.exists() and aside.exists():
                os.replace(aside, target)  # what was there is better than nothing
            raise
        else:
            return
        finally:
            _remove(aside)


@contextmanager
def staged_files(folder: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary folder whose files go to `folder` when the block has succeeded and all are complete.

    Other files in `folder` stay. Where the block fails, `folder` is as it was: no file in it is ever half written. One
    process at a time may do so.

    Raises:
        InputError: If the disk is full.
    """
    folder = Path(folder)
    temporary = _temporary_name(folder / "files")
    try:
        with saying_full_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder / "files")
            temporary.mkdir()
            yield temporary
            for path in sorted(temporary.rglob("*")):
                if path.is_file():
                    target = folder / path.relative_to(temporary)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, target)
    finally:
        _remove(temporary)


def remove_leftovers(target: Path) -> None:
    """Removes what killed processes left under temporary names of `target`; no other process may be writing it."""
    name = re.compile(rf"\.{re.escape(target.name)}\.\d+\.[0-9a-f]{{8}}\.tmp")
    for entry in target.parent.iterdir():
        if name.fullmatch(entry.name):
            _remove(entry)


def _temporary_name(target: Path) -> Path:
    return target.parent / f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 `text` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Reads a UTF-8 JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that identify a JSON-like `value` (the order of keys does not count)."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_fingerprint(path: str | os.PathLike) -> str:
    """16 hexadecimal digits of the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def cache_folder(override: str | os.PathLike | None = None) -> Path:
    """Where reusable work is kept: `override`, else `$HF_DISTILL_CACHE`, else `~/.cache/hf_distill`."""
    if override is not None:
        return Path(override)
    if os.environ.get("HF_DISTILL_CACHE"):
        return Path(os.environ["HF_DISTILL_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hf_distill"
