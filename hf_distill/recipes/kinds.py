"""The kinds of stages: each is a verb of the command line, with what the graph has to know about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..errors import InputError


# What an input field may name, and what a stage may leave.
COLLECTION, MODEL, ROWS, RUN, FIGURES, ANYTHING = "collection", "model", "rows", "run", "figures", "anything"


@dataclass(frozen=True)
class StageKind:
    """What the graph knows about a verb.

    Args:
        verb: The verb of `hf-distill`.
        version: Raised by hand when the same settings would give another result; finished stages are then done again.
        result: What lies in the stage's folder afterwards; None for a stage that leaves nothing (its record counts).
        inputs: Fields that name an artefact, and of which sort.
        required: Groups of fields, of each of which one must be given.
        trains: Whether the number of processes is part of the result.
        system: The system of `metrics.json` that is the stage's own, for the tables.
        output: The field that says where the result goes.
    """

    verb: str
    version: int
    result: str | None
    inputs: Mapping[str, str] = field(default_factory=dict)
    required: tuple[tuple[str, ...], ...] = (("data",),)
    trains: bool = False
    system: str | None = None
    output: str | None = "output_dir"


KINDS: dict[str, StageKind] = {}


def register_kind(kind: StageKind) -> StageKind:
    """Makes a verb usable as a stage."""
    KINDS[kind.verb] = kind
    return kind


register_kind(
    StageKind(
        "train",
        1,
        MODEL,
        {"data": COLLECTION, "model": MODEL, "rows": ROWS, "mine_with": MODEL},
        (("data",), ("model",)),
        trains=True,
        system="trained",
    )
)
register_kind(
    StageKind(
        "pretrain", 1, MODEL, {"data": COLLECTION, "model": MODEL, "stream": ANYTHING}, (("model",),), trains=True
    )
)
register_kind(
    StageKind("pool", 1, ROWS, {"data": COLLECTION, "rows": ROWS}, (("data",), ("rows",))),
)
register_kind(
    StageKind(
        "mine",
        1,
        ROWS,
        {"data": COLLECTION, "model": MODEL, "run": RUN, "filter_teacher": MODEL},
        (("data",), ("model", "run")),
    )
)
register_kind(
    StageKind(
        "episode",
        1,
        ROWS,
        {"data": COLLECTION, "model": MODEL, "previous": ROWS, "answers": RUN},
        (("data",), ("model",)),
    )
)
register_kind(
    StageKind(
        "forgetting",
        1,
        FIGURES,
        {"data": COLLECTION, "rows": ROWS, "model": MODEL, "twin": MODEL},
        (("data",), ("rows",), ("model",)),
    )
)
register_kind(
    StageKind(
        "score",
        1,
        ROWS,
        {"data": COLLECTION, "rows": ROWS, "model": MODEL, "run": RUN},
        (("data",), ("rows",), ("model", "run")),
    )
)
register_kind(
    StageKind(
        "select",
        1,
        ROWS,
        {"data": COLLECTION, "rows": ROWS, "answers": RUN},
        (("data",), ("rows",)),
    )
)
register_kind(
    StageKind(
        "distill",
        1,
        MODEL,
        {"data": COLLECTION, "teacher": MODEL, "student": MODEL, "rows": ROWS, "mine_with": MODEL},
        (("data",), ("teacher",), ("student",)),
        trains=True,
        system="student",
    )
)
register_kind(
    StageKind(
        "progressive",
        1,
        MODEL,
        {"data": COLLECTION, "student": MODEL, "rows": ROWS, "mine_with": MODEL},
        (("data",), ("student",), ("phases",)),
        trains=True,
        system="student",
    )
)
register_kind(
    StageKind(
        "evaluate",
        1,
        FIGURES,
        {"data": COLLECTION, "model": MODEL, "rerank": MODEL},
        (("data",), ("model",)),
    )
)
register_kind(
    StageKind("convert", 1, COLLECTION, {"input": ANYTHING}, (("input",),)),
)
register_kind(
    StageKind("compare", 1, ANYTHING, {"data": COLLECTION, "systems": ANYTHING}, (("systems",),)),
)
register_kind(
    StageKind("explain", 1, ANYTHING, {"data": COLLECTION, "model": MODEL}, (("model",), ("data", "query"))),
)
register_kind(
    StageKind("push", 1, None, {"folder": ANYTHING, "data": COLLECTION}, (("folder",), ("repo_id",)), output=None),
)


def kind_of(verb: str, where: str) -> StageKind:
    """The kind of a stage.

    Raises:
        InputError: If there is none of that name, naming the nearest.
    """
    if verb not in KINDS:
        raise InputError(f"there is no kind of stage {verb!r}", where=where, cure=nearest(verb, KINDS))
    return KINDS[verb]


def nearest(name: str, known: Iterable[str]) -> str:
    """A cure for a misspelt name: the nearest known ones, or all."""
    known = [str(one) for one in known]
    close = difflib.get_close_matches(str(name), known, n=3)
    return f"Did you mean {' or '.join(close)}" if close else f"Known are: {', '.join(known) or 'none'}"
