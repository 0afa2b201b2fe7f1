"""One stage is one command in a process of its own, which ends with the process that started it.

A stage of one process is forked from a process that has imported the libraries and done nothing else, which spares it
the seconds that importing takes; a stage with a launch configuration is started as a person would start it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any


END_WITH = "HF_DISTILL_END_WITH"
"""Names the process whose end also ends a verb: that of the recipe."""

_PR_SET_PDEATHSIG = 1
_SECONDS_TO_END = 30.0
_SECONDS_TO_LOOK = 0.1


def verb_command(verb: str, config: Path, launch: str | None) -> list[str]:
    """The words after `hf-distill` that run a stage."""
    return [*(["--launch", launch] if launch else []), verb, "--config", str(config)]


def run_words(words: Sequence[str], log: Path, started: Callable[[int], None], says: Callable[[str], None]) -> int:
    """Runs `hf-distill WORDS` to its end.

    Args:
        words: Its arguments.
        log: What it prints is added to this file.
        started: Called with the number of its process.
        says: Called with the last line that it has printed, from time to time.

    Returns:
        The exit code.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        file.write(f"$ hf-distill {' '.join(words)}\n".encode())
        position = file.tell()
    process = _start(list(words), log)
    started(process.pid)
    try:
        while process.is_alive():
            process.join(_SECONDS_TO_LOOK)
            position = _tell(log, position, says)
        _tell(log, position, says)
    finally:
        if process.is_alive():
            process.terminate()
            process.join()
    return process.exitcode


def in_other_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function that is called in a process of its own; this one stays small."""
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, mp_context=_context()) as pool:
        return pool.submit(_as_here, _here(), function, *arguments).result()


@cache
def _context() -> Any:
    from multiprocessing import get_all_start_methods, get_context

    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["hf_distill.recipes.warm"])
    return context


def _start(words: list[str], log: Path) -> Any:
    if words[0] == "--launch":
        return _Command([sys.executable, "-m", "hf_distill", *words], log)
    process = _context().Process(target=_as_here, args=(_here(), _verb, words, str(log), os.getpid()))
    process.start()
    return process


def _here() -> tuple[dict[str, str], str]:
    """Environment and working folder, which the process that others are forked from has from its own start."""
    return dict(os.environ), os.getcwd()


def _as_here(here: tuple[dict[str, str], str], function: Callable[..., Any], *arguments: Any) -> Any:
    environment, folder = here
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    return function(*arguments)


def _verb(words: list[str], log: str, parent: int) -> None:
    """What the process of a stage does."""
    _end_with_parent()
    end_with(parent)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["hf-distill", *words]
    from ..cli.main import main

    try:
        main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    else:
        code = 0
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    sys.exit(code)


def _end_with_parent() -> None:
    # Otherwise a stage would go on after its recipe was killed, and the recipe's next start would find it at work.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_with(process: int) -> None:
    """Ends this process when another one has ended, whatever stands between them."""
    from threading import Thread

    def watch() -> None:
        while True:
            try:
                os.kill(process, 0)
            except ProcessLookupError:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.5)

    Thread(target=watch, daemon=True).start()


class _Command:
    """A program, with the few methods of a process of multiprocessing that are needed here."""

    def __init__(self, command: list[str], log: Path):
        with open(log, "ab") as file:
            self._process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                # The launcher hears of it at once, the processes that it has started within a moment.
                preexec_fn=_end_with_parent,
                env={**os.environ, END_WITH: str(os.getpid())},
            )
        self.pid = self._process.pid

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def join(self, timeout: float | None = None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)

    def terminate(self) -> None:
        self._process.terminate()

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()


def _tell(log: Path, position: int, says: Callable[[str], None]) -> int:
    """Reads what was added to the log after `position`, says its last line, and returns the new position."""
    with open(log, "rb") as file:
        file.seek(position)
        added = file.read()
    lines = added.replace(b"\r", b"\n").decode(errors="replace").split("\n")
    last = next((line.rstrip() for line in reversed(lines) if line.strip()), None)
    if last is not None:
        says(last)
    return position + len(added)


def wait_for_end(process: int | None) -> bool:
    """Waits for a stage's process of an earlier, killed start to end; False if it goes on."""
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
    return process != os.getpid() and (b"hf_distill" in words or b"multiprocessing.forkserver" in words)


def last_words(log: Path, lines: int = 15) -> str:
    """The end of a log."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.replace("\r", "\n").rstrip().splitlines()[-lines:])
