"""What a run reads, noted where it is read: so the manifest of every verb is complete, and no verb thinks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any


@dataclass
class Recording:
    """One run of one verb.

    Args:
        verb: Its name.
        words: Its command line behind the verb, as typed.
        arguments: The same with a `--config` file's fields as flags, so that it can be repeated without the file.
        options: The parsed option objects.
        started: When it began.
        sources: What was read so far: by kind, name and revision, a function that gives the facts that identify the
            content. They are asked for when the manifest is written, and not at all where none is.
    """

    verb: str
    words: Sequence[str]
    arguments: Sequence[str]
    options: Sequence[Any]
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    sources: dict[tuple[str, str, str | None], Callable[[], dict[str, Any]]] = field(default_factory=dict)


_RECORDINGS: list[Recording] = []


@contextmanager
def recording(
    verb: str, words: Sequence[str], arguments: Sequence[str], options: Sequence[Any]
) -> Iterator[Recording]:
    """Notes what is read inside the block, for the manifests that are written there; the innermost one counts."""
    _RECORDINGS.append(Recording(verb, list(words), list(arguments), list(options)))
    try:
        yield _RECORDINGS[-1]
    finally:
        _RECORDINGS.pop()


def current() -> Recording | None:
    """The innermost recording; None in a program that is not the command line."""
    return _RECORDINGS[-1] if _RECORDINGS else None


def note_source(kind: str, name: Any, facts: Callable[[], dict[str, Any]], revision: str | None = None) -> None:
    """Notes that the run has read something.

    Args:
        kind: `"model"` or `"folder"` (facts: `files`, fingerprints by name), `"data"` (`fingerprints` of the parts;
            none where the commit says it all), `"rows"` or `"file"` (`fingerprint`).
        name: The folder, file or Hub id as it was asked for.
        facts: Gives what identifies the content, such as fingerprints.
        revision: The commit on the Hub.
    """
    for one in _RECORDINGS:
        one.sources.setdefault((kind, str(name), revision), facts)
