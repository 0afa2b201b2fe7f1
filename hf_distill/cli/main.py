"""`hf-distill VERB ...`; the scripts in `run_scripts/` are the same verbs for `accelerate launch`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from ..errors import InputError
from .parsing import exit_with, parse


VERBS = {
    "distill": "Train a small student from a strong teacher: mines, scores, trains and evaluates.",
    "train": "Train a bi-encoder or a cross-encoder on labelled rows.",
    "mine": "Find hard negatives and write them as a row set.",
    "score": "Write a teacher's scores into a row set.",
    "evaluate": "Measure models, BM25 or runs on a collection.",
    "search": "Search a collection with a model.",
    "demo": "Build the demonstration collection and distil a student on it.",
}


def _usage() -> str:
    lines = "\n".join(f"  {name:<10}{summary}" for name, summary in VERBS.items())
    usage = "usage: hf-distill VERB [--config FILE.yaml] [--field value ...]"
    return f"{usage}\n\n{lines}\n\nhf-distill VERB --help says more.\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one verb; bad input ends with one sentence and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(_usage())
        raise SystemExit(0 if argv else 2)
    if argv[0] == "--version":
        from .. import __version__

        sys.stdout.write(f"hf_distill {__version__}\n")
        return
    if argv[0] not in VERBS:
        exit_with(InputError(f"there is no verb {argv[0]!r}", cure=f"Choose one of {', '.join(VERBS)}"))
    try:
        verb = importlib.import_module(f"hf_distill.cli.{argv[0]}").VERB
        arguments = parse(verb, argv[1:])
        from ..console import start_logging

        start_logging()
        verb.run(*arguments)
    except InputError as error:
        exit_with(error)
    if "torch" in sys.modules:
        from ..distributed import leave

        leave()
