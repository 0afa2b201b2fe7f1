"""The table of stages that a person watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ..console import duration, get_logger, print_table


logger = get_logger(__name__)

COLUMNS = ("stage", "verb", "state", "time", "result")


@dataclass
class Line:
    """One stage of the table."""

    stage: str
    verb: str
    state: str = "waits"
    seconds: float = 0.0
    result: str = ""
    since: float | None = None

    def cells(self) -> list[str]:
        """The cells of the table, the time running on for a stage at work."""
        running = time.monotonic() - self.since if self.since is not None else 0.0
        seconds = self.seconds + running
        return [self.stage, self.verb, self.state, duration(seconds) if seconds else "", self.result]


class Board:
    """A live table on a terminal; a line for every change elsewhere.

    Args:
        title: Above the table.
        lines: The stages.
    """

    def __init__(self, title: str, lines: Iterable[Line]):
        self.title, self.lines = title, {line.stage: line for line in lines}
        self._live: Any = None
        self._tail = ""

    def __enter__(self) -> Board:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(stderr=True)
            self._live = Live(get_renderable=self._render, console=console, refresh_per_second=2)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._tail = ""
            self._live.__exit__(kind, error, trace)
            self._live = None

    def _render(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.title, title_justify="left")
        for column in COLUMNS:
            table.add_column(column, justify="right" if column == "time" else "left", no_wrap=True)
        for line in self.lines.values():
            table.add_row(*line.cells(), style={"running": "bold", "done": "green", "failed": "red"}.get(line.state))
        return Group(table, Text(self._tail[:200], style="dim"))

    def begins(self, stage: str, words: str) -> None:
        """A stage is at work."""
        line = self.lines[stage]
        line.state, line.since = "running", time.monotonic()
        if self._live is None:
            logger.info("%s: %s", stage, words)

    def says(self, text: str) -> None:
        """The last line that the stage at work has printed."""
        self._tail = text

    def ends(self, stage: str, state: str, seconds: float, result: str) -> None:
        """A stage has ended."""
        line = self.lines[stage]
        line.state, line.since, line.seconds, line.result = state, None, seconds, result
        if self._live is None:
            logger.info("%s: %s after %s%s", stage, state, duration(seconds), f", {result}" if result else "")

    def was_done(self, stage: str, seconds: float, result: str) -> None:
        """A stage has nothing to do."""
        line = self.lines[stage]
        line.state, line.seconds, line.result = "done", seconds, result

    def show(self) -> None:
        """Prints the table as it stands."""
        print_table(self.title, COLUMNS, [line.cells() for line in self.lines.values()])
