"""`hf-distill VERB ...`; the scripts in `run_scripts/` are the same verbs for `accelerate launch`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..console import launched_processes
from ..errors import HubError, InputError
from ..files import full_disk
from ..provenance import recording
from .launch import check_shared
from .parsing import NOT_PUSHED, exit_with, expanded, parse


VERBS = {
    "distill": "Train a small student from a strong teacher: mines, scores, trains and evaluates.",
    "progressive": "Train one student in phases, each with its own teacher, data, losses and schedule.",
    "train": "Train a bi-encoder or a cross-encoder on labelled rows.",
    "pretrain": "Pre-train a masked language model for lexical retrieval (LexMAE).",
    "tele": "Train a bi-encoder in episodes of teleportation negatives (ANCE-Tele).",
    "mine": "Find hard negatives and write them as a row set.",
    "episode": "Mine the teleportation negatives of an episode (ANCE-Tele).",
    "pool": "Put the negatives of several row sets into one.",
    "score": "Write a teacher's scores into a row set.",
    "select": "Keep the rows whose query satisfies a rule on the ranks of student and teacher.",
    "evaluate": "Measure models, BM25 or runs on a collection.",
    "forgetting": "Say what each episode learned and forgot, and where its negatives came from.",
    "compare": "Say which differences between runs are more than chance.",
    "reproduce": "Print or run the command that made a model or data set, and compare.",
    "recipe": "Run a file of stages (mine, train, score, distill ...) in order, resumable.",
    "convert": "Turn data in another format into a folder of this project's layout.",
    "push": "Push a model, rows, a collection or a checkpoint to the Hub.",
    "search": "Search a collection with a model.",
    "explain": "Show the terms that a lexical model sees in a query and a passage.",
    "export": "Write a lexical model's index for another engine.",
    "demo": "Build the demonstration collection and distil a student on it.",
}
# Verbs whose work several processes share; the others run in one.
SHARED = ("distill", "progressive", "train", "tele", "pretrain", "mine", "episode", "score", "evaluate")


def _usage() -> str:
    lines = "\n".join(f"  {name:<12}{summary}" for name, summary in VERBS.items())
    usage = "usage: hf-distill [--launch NAME] VERB [--config FILE.yaml] [--field value ...]"
    launch = "--launch starts several processes or a sharded engine; hf-distill --launch list shows the names."
    return f"{usage}\n\n{lines}\n\nhf-distill VERB --help says more.\n{launch}\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one verb; bad input ends with one sentence and exit code 2, a result that the Hub did not take with 3."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(_usage())
        raise SystemExit(0 if argv else 2)
    if argv[0] == "--version":
        from .. import __version__

        sys.stdout.write(f"hf_distill {__version__}\n")
        return
    if argv[0].partition("=")[0] == "--launch":
        _launch(argv)
    if argv[0] not in VERBS:
        exit_with(InputError(f"there is no verb {argv[0]!r}", cure=f"Choose one of {', '.join(VERBS)}"))
    failed = None
    try:
        verb = importlib.import_module(f"hf_distill.cli.{argv[0]}").VERB
        if launched_processes() > 1:
            check_shared(verb.name, SHARED)
        arguments = parse(verb, argv[1:])
        from ..console import start_logging

        start_logging()
        if not any(hasattr(one, "world_size") for one in arguments):  # with it the Trainer's arguments decide
            _join()
        with recording(verb.name, argv[1:], expanded(verb, argv[1:]), arguments):
            verb.run(*arguments)
    except InputError as error:
        exit_with(error)
    except HubError as error:
        failed = error  # the result is complete: the other processes are waited for as after a success
    except Exception as error:
        # Wherever no room was left: in a cache or in a temporary folder too.
        sentence = full_disk(error, ".")
        if sentence is None:
            raise
        exit_with(sentence)
    if "torch" in sys.modules:
        from ..distributed import leave

        leave()
    if failed is not None:
        exit_with(failed, NOT_PUSHED)


def _join() -> None:
    if launched_processes() > 1 or "ACCELERATE_MIXED_PRECISION" in os.environ:
        from ..distributed import join

        join()


def _launch(argv: list[str]) -> NoReturn:
    """`--launch NAME [options] VERB ...`"""
    from .launch import read_launch, run_launch, table

    words = [*argv[0].split("=", 1)[1:], *argv[1:]]
    if words[:1] in (["list"], ["--help"], ["-h"]):
        sys.stdout.write(table())
        raise SystemExit(0)
    try:
        run_launch(read_launch(words, SHARED, list(VERBS)))
    except InputError as error:
        exit_with(error)
