"""What a reader passed over, and why."""

from __future__ import annotations

from typing import Any

from ..console import get_logger


logger = get_logger(__name__)


class Notes:
    """Counts by reason, each with the place where it happened first."""

    def __init__(self, counts: dict[str, dict[str, Any]] | None = None):
        self.counts: dict[str, dict[str, Any]] = dict(counts or {})

    def add(self, reason: str, count: int = 1, example: str | None = None) -> None:
        """Adds `count` cases of `reason`."""
        if count:
            entry = self.counts.setdefault(reason, {"count": 0, "first": example})
            entry["count"] += int(count)

    def lines(self) -> list[str]:
        """One line for each reason."""
        return [
            f"{entry['count']:,} {reason}" + (f", first in {entry['first']}" if entry["first"] else "")
            for reason, entry in self.counts.items()
        ]

    def log(self, where: str) -> None:
        """Says all of it as warnings."""
        for line in self.lines():
            logger.warning("%s: %s", where, line)
