"""Freed memory goes back to the system, where the C library would keep it."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable


# What the process may grow by before freed memory is returned. Returning it costs the page faults of taking it again.
_SLACK_BYTES = 512 << 20

_after_last = 0


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None  # Not glibc: other allocators reuse aligned blocks.


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def return_freed_memory(slack: int = _SLACK_BYTES) -> bool:
    """Gives freed memory back to the system if the process has grown by `slack` bytes since it last did.

    glibc often cannot reuse freed blocks of the aligned kind that tensors on a CPU live in
    (https://sourceware.org/bugzilla/show_bug.cgi?id=14581), so that a loop that frees all it takes still grows.

    Returns:
        Whether memory was given back.
    """
    global _after_last
    trim = _malloc_trim()
    if trim is None or not os.path.exists("/proc/self/statm"):
        return False
    if not _after_last:
        _after_last = _resident_bytes()
    if _resident_bytes() < _after_last + slack:
        return False
    trim(0)
    _after_last = _resident_bytes()
    return True
