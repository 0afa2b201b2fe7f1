"""A process that talks to the Hub on loopback on behalf of the tests.

The Hub's clients read their settings when they are imported, so a test cannot talk to `tests/hub_server.py` from the
process that runs it. The fixture `hub_client` is one other process, started when it is first used and kept for the
whole session, so that the libraries are imported once:

    def pushed(folder, repo):                     # at the top level of the test's module
        from hf_distill.hub import push_folder
        return push_folder(folder, repo).url

    def test_push(hub, hub_client, tmp_path):
        url = hub_client(pushed, tmp_path, "alice/student")
        hub_client(pushed, tmp_path, "alice/student", env={"HF_TOKEN": "hf_bob"})

Arguments and results are pickled. What the function raises is raised as [`RemoteError`]; `hub_client.log` are the
lines that `hf_distill` logged, `hub_client.sleeps` the seconds that somebody wanted to sleep: nobody sleeps long
there, so that back-off costs a test no time.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


_LONGEST_SLEEP = 0.02


class RemoteError(Exception):
    """What a function raised in the other process: the name of its class, its message, its traceback."""

    def __init__(self, kind: str, message: str, trace: str):
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.trace = kind, message, trace


class HubClient:
    """See the module's text."""

    def __init__(self, environment: Mapping[str, str]):
        self.log: list[str] = []
        self.sleeps: list[float] = []
        self._connection, theirs = multiprocessing.Pipe()
        os.set_inheritable(theirs.fileno(), True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub_client", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=Path(__file__).parents[1],
            env={**os.environ, **environment},
        )
        theirs.close()

    def __call__(
        self, function: Callable[..., Any], *args: Any, env: Mapping[str, str | None] | None = None, **kwargs: Any
    ) -> Any:
        """The result of `function(*args, **kwargs)` there; `env` are variables of this call (None takes one away)."""
        caches = {"HF_DISTILL_CACHE": os.environ["HF_DISTILL_CACHE"]}
        self._connection.send((function, args, kwargs, {**caches, **(env or {})}))
        good, answer, self.log, self.sleeps = self._connection.recv()
        if not good:
            raise RemoteError(*answer)
        return answer

    def close(self) -> None:
        self._connection.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:  # on a busy machine
            self._process.kill()
            self._process.wait()


def verb(*words: Any) -> tuple[int, str]:
    """Runs a verb of the command line in this process; the exit code, and the sentence that it ended with."""
    import contextlib
    import io

    from hf_distill.cli.main import main

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            main([str(word) for word in words])
    except SystemExit as end:
        text = errors.getvalue()
        return end.code, text[max(text.rfind("error: "), 0) :]
    return 0, ""


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _serve(connection: Connection) -> None:
    sleeps: list[float] = []
    really_sleep = time.sleep

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        really_sleep(min(seconds, _LONGEST_SLEEP))

    time.sleep = sleep
    handler = _Lines()
    logging.getLogger("hf_distill").addHandler(handler)
    logging.getLogger("hf_distill").setLevel(logging.INFO)
    while True:
        try:
            function, args, kwargs, variables = connection.recv()
        except EOFError:
            return
        before = dict(os.environ)
        for name, value in variables.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        handler.lines, sleeps[:] = [], []
        try:
            good, answer = True, function(*args, **kwargs)
        except BaseException as error:
            good, answer = False, (type(error).__name__, str(error), traceback.format_exc())
        os.environ.clear()
        os.environ.update(before)
        connection.send((good, answer, handler.lines, list(sleeps)))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
