"""Distillation steps: a teacher whose scores were computed once against one that reads every batch."""

from __future__ import annotations

import statistics
import time
from typing import Any

from .common import (
    MAX_LENGTH,
    MODEL,
    Report,
    alternate,
    arguments,
    data_name,
    dense_model,
    open_collection,
    ratios,
    say,
    scratch_folder,
    spread,
)
from .steps import BATCH, common_arguments, largest_difference, run_trainer, training_rows


LOSSES = '[{"name": "kl", "candidates": "own"}]'
CACHED, LIVE = "cached scores", "live teacher"


def open_teacher(kind: str) -> Any:
    """The teacher: the dense model itself, or a cross-encoder of its size (with a random head: speed is all)."""
    if kind == "dense":
        # Cached scores are without temperature.
        return dense_model(temperature=1.0)
    import torch

    from hf_distill.models import CrossEncoderRanker

    torch.manual_seed(0)
    return CrossEncoderRanker.from_pretrained(MODEL, max_length=MAX_LENGTH)


def main() -> None:
    args = arguments(
        __doc__,
        steps=(1, "steps of a round"),
        rounds=(5, "rounds of the sides in turn"),
        dtype=("bfloat16", "precision of student and teacher"),
        batch=(BATCH, "queries of a batch"),
        negatives=(3, "negatives of a query"),
        student=("layers:3", "the student"),
    )
    import copy

    import torch

    from hf_distill.models import student_from
    from hf_distill.retrieval import score_rows
    from hf_distill.teachers import CachedScores, LiveTeacher
    from hf_distill.trainers import DistillTrainer, DistillTrainingArguments

    collection = open_collection("medquad", args.data)
    rows = training_rows(collection, max(args.steps, 2) * args.batch, args.negatives)
    student = student_from(args.student, dense_model())
    report = Report(args, "Distillation with cached scores", ["teacher", "how", "examples/s"])
    with scratch_folder("distillation") as folder:
        for kind in ("dense", "cross-encoder"):
            say(f"distillation, {kind} teacher")
            judge = open_teacher(kind)
            teacher = copy.deepcopy(judge).to(getattr(torch, args.dtype))
            start = time.perf_counter()
            scored = score_rows(judge, rows, dtype=args.dtype, cache_dir=folder / kind)
            once = (time.perf_counter() - start) / len(rows)
            losses: dict[str, list[float]] = {}

            def run(name: str, steps: int, scored=scored, losses=losses, teacher=teacher) -> float:
                arguments = DistillTrainingArguments(
                    **common_arguments(folder, steps, args.dtype, args.batch),
                    num_negatives=args.negatives,
                    dropout=0.0,
                    losses=LOSSES,
                )
                voice = CachedScores("teacher") if name == CACHED else LiveTeacher("teacher", teacher)
                trainer = DistillTrainer(copy.deepcopy(student), arguments, teachers=[voice], rows=scored)
                seconds, losses[name] = run_trainer(trainer)
                return seconds

            for name in (CACHED, LIVE):
                run(name, 1)
            seconds = alternate(
                {name: lambda name=name: run(name, args.steps) for name in (CACHED, LIVE)}, args.rounds
            )
            for name in (CACHED, LIVE):
                rate = [args.steps * args.batch / one for one in seconds[name]]
                report.row(kind, name, spread(rate, "{:.1f}"))
            report.claim(f"{kind} teacher, {args.dtype}", ratios(seconds[CACHED], seconds[LIVE]))
            shown = ", ".join(f"{a:.5f} and {b:.5f}" for a, b in zip(losses[CACHED], losses[LIVE]))
            most = 1e-3 if args.dtype == "float32" else 0.1
            report.check(
                largest_difference(losses[CACHED], losses[LIVE]) <= most,
                f"{kind} teacher: losses of the steps, cached and live: {shown}",
            )
            extra = statistics.median(b - a for a, b in zip(seconds[CACHED], seconds[LIVE]))
            report.note(
                f"{kind} teacher: scoring costs {1000 * once:.0f} ms a row, once; a live teacher "
                f"{1000 * extra / (args.steps * args.batch):.0f} ms a row in every epoch"
            )
    report.finish(
        f"`DistillTrainer` on batches of {args.batch} × (query, relevant passage, {args.negatives} "
        f"others) of {data_name(collection)}, KL divergence over the own candidates, {args.dtype} autocast, no "
        f"dropout; student: `{args.student}` of the teacher. The live teacher reads every batch in {args.dtype}."
    )


if __name__ == "__main__":
    main()
