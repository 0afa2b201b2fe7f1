"""What a person sees while work goes on: log lines, progress bars, tables. Only the main process speaks."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any


# Of tables where there is no screen.
_PAGE_WIDTH = 160
# How narrow a table's columns become: free text, which gives way first, and then long names.
_NARROW_TEXT, _NARROW_NAME = 24, 16


def is_main_process() -> bool:
    """True in the process of rank 0, also before any process group exists."""
    return int(os.environ.get("RANK", 0)) == 0


def launched_processes() -> int:
    """Number of processes that a launcher started for this program; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def get_logger(name: str) -> logging.Logger:
    """A logger under `hf_distill`; the command line prints these at level INFO, a library user decides."""
    return logging.getLogger(name)


class _StderrHandler(logging.StreamHandler):
    """Writes to what standard error is now, which may have been redirected since the handler was made."""

    def __init__(self):
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        """Standard error."""
        return sys.stderr


def start_logging(level: int = logging.INFO) -> None:
    """Prints the log of `hf_distill` on standard error, as the command line does."""
    logger = logging.getLogger("hf_distill")
    if not logger.handlers:
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(level if is_main_process() else logging.ERROR)


def progress(items: Iterable | None = None, *, total: int | None = None, label: str, unit: str = "it") -> Any:
    """A tqdm bar on the main process; silent when standard error is not a terminal and `HF_DISTILL_PROGRESS` is 0."""
    from tqdm.auto import tqdm

    disable = not is_main_process() or os.environ.get("HF_DISTILL_PROGRESS") == "0"
    quiet = not sys.stderr.isatty()
    return tqdm(
        items, total=total, desc=label, unit=unit, disable=disable, leave=not quiet, mininterval=10 if quiet else 0.1
    )


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table on standard output; every column but the first is right-aligned.

    Nothing is cut off: on a narrow screen lines break between words, then long names within, and at last the table is
    wider than the screen.
    """
    if not is_main_process():
        return
    from rich.console import Console
    from rich.table import Table

    cells = [[str(cell) for cell in row] for row in rows]
    # Names may hold what rich takes for its own markup, such as [brackets].
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _PAGE_WIDTH
    lines = 3 * len(columns) + 1
    widths = _column_widths([columns, *cells], console.width - lines)
    console.width = max(console.width, sum(widths) + lines)
    table = Table(title=title, title_justify="left")
    for position, (column, width) in enumerate(zip(columns, widths)):
        table.add_column(column, justify="left" if position == 0 else "right", width=width, overflow="fold")
    for row in cells:
        table.add_row(*row)
    console.print(table)


def _column_widths(rows: Sequence[Sequence[str]], room: int) -> list[int]:
    """Widths of columns that fit into `room` together where they can; the widest ones give way first."""
    from rich.cells import cell_len

    def widest(column: Sequence[str], separator: str | None) -> int:
        return max(cell_len(part) for cell in column for part in ["", *cell.split(separator)])

    columns = list(zip(*rows))
    widths = [widest(column, "\n") for column in columns]
    words = [widest(column, None) for column in columns]
    text = [max(word, min(width, _NARROW_TEXT)) for word, width in zip(words, widths)]
    for least in (text, [min(word, _NARROW_NAME) for word in words]):
        while sum(widths) > room and widths != least:
            place = max(range(len(widths)), key=lambda one: (widths[one] > least[one], widths[one]))
            widths[place] -= 1
    return widths


def duration(seconds: float) -> str:
    """`"41 s"`, `"12 min"`, `"3.2 h"`, `"5 d"`."""
    if seconds < 1:
        return "< 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.0f} d"
