"""One stage is one command in a process of its own, which ends with the process that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path


_PR_SET_PDEATHSIG = 1
_SECONDS_TO_END = 30.0


def verb_command(verb: str, config: Path, launch: str | None) -> list[str]:
    """The command of a stage, as a person would type it."""
    start = [sys.executable, "-m", "hf_distill"]
    return [*start, *(["--launch", launch] if launch else []), verb, "--config", str(config)]


def _end_with_parent() -> None:
    # Otherwise a stage would go on after its recipe was killed, and the recipe's next start would find it at work.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def run_command(
    command: Sequence[str],
    log: Path,
    started: Callable[[int], None],
    says: Callable[[str], None],
) -> int:
    """Runs a command to its end.

    Args:
        command: Program and arguments.
        log: What it prints is added to this file.
        started: Called with the number of its process.
        says: Called with every line that it prints, of a progress bar each state.

    Returns:
        The exit code.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent
        )
        started(process.pid)
        rest = b""
        try:
            while part := process.stdout.read1(65536):
                file.write(part)
                file.flush()
                *lines, rest = (rest + part).replace(b"\r", b"\n").split(b"\n")
                for line in lines:
                    if line.strip():
                        says(line.decode(errors="replace").rstrip())
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


def wait_for_end(process: int | None) -> bool:
    """Waits for a process of an earlier, killed start to end; False if it goes on."""
    begin = time.monotonic()
    while process is not None and _is_stage(process):
        if time.monotonic() - begin > _SECONDS_TO_END:
            return False
        time.sleep(0.1)
    return True


def _is_stage(process: int) -> bool:
    """Whether the process is there and is one of ours (numbers are used again)."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
    return b"hf_distill" in words and process != os.getpid()


def last_words(log: Path, lines: int = 15) -> str:
    """The end of a log."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.replace("\r", "\n").rstrip().splitlines()[-lines:])
