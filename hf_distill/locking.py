"""One process at a time in a folder: a lock that ends with its owner, however that ends, and who that owner is."""

from __future__ import annotations

import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from .console import get_logger
from .errors import InputError
from .files import read_json, write_json


logger = get_logger(__name__)

# Held until this process ends; an entry for each lock file.
_HELD: dict[Path, Any] = {}


def lock_folder(folder: str | os.PathLike, *, beside: bool = False) -> None:
    """Makes this process the only one that works in a folder, until it ends or calls [`unlock_folder`].

    Who holds the lock (process, host, since when) stands in a file next to it, for the message to another one.

    Args:
        folder: Made if it is not there (unless `beside`).
        beside: Put the lock next to the folder, for one that is replaced as a whole.

    Raises:
        InputError: If another process works there now, or it is a file.
    """
    from filelock import FileLock, Timeout

    if Path(folder).is_file():
        raise InputError("is a file where a folder is needed", where=str(folder), cure="Choose another --output_dir")
    path = _lock_path(Path(folder), beside)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _HELD.setdefault(path, FileLock(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another process is working on this: {_owner(path)}",
            where=str(folder),
            cure="Wait for it to end, end it, or choose another --output_dir",
        ) from None
    except (OSError, NotImplementedError) as error:
        logger.info("%s cannot be locked (%s): start no second process in it.", folder, error)
        return
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    write_json(_owner_path(path), {"process": os.getpid(), "host": platform.node(), "began": began})


def unlock_folder(folder: str | os.PathLike, *, beside: bool = False) -> None:
    """Gives the folder free, and leaves no trace of the lock in it."""
    path = _lock_path(Path(folder), beside)
    lock = _HELD.pop(path, None)
    if lock is not None and lock.is_locked:
        _owner_path(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        lock.release(force=True)


def _lock_path(folder: Path, beside: bool) -> Path:
    folder = folder.resolve()
    return folder.parent / f".{folder.name}.lock" if beside else folder / ".lock"


def _owner_path(lock: Path) -> Path:
    return lock.with_name(f"{lock.name}.json")


def _owner(lock: Path) -> str:
    # The owner writes its name right after it got the lock; what an earlier one left does not count.
    for _ in range(20):
        with suppress(OSError, ValueError, KeyError, TypeError):
            owner = read_json(_owner_path(lock))
            if owner["host"] != platform.node() or _is_alive(owner["process"]):
                return f"process {owner['process']} on {owner['host']}, since {owner['began']}"
        time.sleep(0.05)
    return "its name is not known"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
