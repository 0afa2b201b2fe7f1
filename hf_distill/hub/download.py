"""Files from the Hub, checked against the hashes that the repository names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import cache_folder, fingerprint, read_json, write_json


def check_content(folder: Path, siblings: Iterable[Any]) -> None:
    """Compares downloaded files with the SHA-256 that the Hub keeps of every LFS file.

    The client library looks at sizes only. A hash that was right is remembered by the file's size and time of change,
    so that large weights are read once, not at every start.

    Args:
        folder: A snapshot of the repository; files that are not in it are passed over.
        siblings: Of `HfApi.repo_info(..., files_metadata=True)`.

    Raises:
        InputError: For the first file that differs, which is then removed from the cache.
    """
    for sibling in siblings:
        expected = getattr(getattr(sibling, "lfs", None), "sha256", None)
        path = folder / sibling.rfilename
        if expected is not None and path.is_file():
            check_file(path, expected)


def check_file(path: Path, expected: str) -> None:
    """Raises [`InputError`] and removes the file if its SHA-256 is not `expected`."""
    blob = path.resolve()
    status = blob.stat()
    good = [status.st_size, status.st_mtime_ns, expected]
    memo = cache_folder() / "downloads" / f"{fingerprint(str(blob))}.json"
    if memo.is_file() and read_json(memo) == good:
        return
    with open(blob, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        blob.unlink()
        if path.is_symlink():
            path.unlink()
        raise InputError(
            f"the downloaded file is damaged: its SHA-256 is {found[:12]}…, the Hub says {expected[:12]}…",
            where=str(path),
            cure="It was removed; start the same command again to download it anew",
        )
    write_json(memo, good)
