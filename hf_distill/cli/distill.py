"""`hf-distill distill`: one command from a teacher to a student; what is missing on the way is made."""

from __future__ import annotations

from typing import Any

from .options import DataOptions, DistillHelp, IndexOptions, ModelOptions, RowOptions, StudentOptions
from .parsing import Verb, require


def _arguments() -> tuple[type, ...]:
    from .training_arguments import DistillArguments

    return (DataOptions, StudentOptions, RowOptions, ModelOptions, IndexOptions, DistillArguments)


def run(
    data_options: DataOptions,
    options: StudentOptions,
    row_options: RowOptions,
    model_options: ModelOptions,
    encode_options: IndexOptions,
    args: Any,
) -> None:
    """Distils, evaluates, and writes the native student with its card."""
    require(
        "distill",
        data=(data_options.data, "the collection, a folder or Hub id"),
        teacher=(options.teacher, "a Hub id or folder"),
        student=(options.student, "layers:3, or a Hub id or folder"),
        output_dir=(args.output_dir, "where the student goes"),
    )
    from .distillation import Distillation

    Distillation(data_options, options, row_options, model_options, encode_options, args).run()


VERB = Verb(
    "distill",
    "Train a small student from a strong teacher: mines, scores, trains and evaluates what is missing.",
    (DataOptions, StudentOptions, RowOptions, ModelOptions, IndexOptions, DistillHelp),
    run,
    _arguments,
    "hf-distill distill --teacher sentence-transformers/all-MiniLM-L6-v2 --student layers:3 --data BeIR/scifact "
    "--output_dir outputs/student",
)
