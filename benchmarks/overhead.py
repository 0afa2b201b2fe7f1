"""What the trainer adds to the forwards, backwards and updates of a training, against a bare loop of the same."""

from __future__ import annotations

import copy
import time
from typing import Any

from .common import (
    DTYPES,
    Report,
    alternate,
    arguments,
    data_name,
    dense_model,
    open_collection,
    quartiles,
    ratios,
    say,
    scratch_folder,
    spread,
)
from .steps import BATCH, TEMPERATURE, common_arguments, largest_difference, run_trainer, training_rows


# At most 5 % more than the loop.
TARGET = 1 / 1.05
TRAINER, LOOP, READY = "`RetrievalTrainer`", "bare loop", "bare loop, batches made before"


def make_trainer(model: Any, rows: Any, folder: Any, *, steps: int, dtype: str, batch: int) -> Any:
    """Our trainer with the contrastive loss over the passages of the batch."""
    from hf_distill.trainers import RetrievalTrainer, RetrievalTrainingArguments

    settings = {**common_arguments(folder, steps, dtype, batch), "logging_steps": steps}
    args = RetrievalTrainingArguments(**settings, num_negatives=int(rows.lengths[0]) - 1, dropout=0.0)
    return RetrievalTrainer(copy.deepcopy(model), args, rows=rows)


def bare_loop(trainer: Any, steps: int, batches: list[Any] | None) -> tuple[float, list[float]]:
    """The same steps by hand: torch alone, no logs, no callbacks; returns seconds and losses.

    Args:
        trainer: Gives model, optimiser and the order of the batches; its loop is not used.
        steps: How many.
        batches: The batches, where making them should not be timed.
    """
    import torch

    model = trainer.model.train()
    optimizer = trainer.create_optimizer()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    bfloat16 = trainer.args.bf16
    losses = []
    start = time.perf_counter()
    for _, batch in zip(range(steps), trainer.get_train_dataloader() if batches is None else batches):
        with torch.autocast(trainer.args.device.type, torch.bfloat16, enabled=bfloat16):
            output = model(**batch["tokens"]["student"])
        query = torch.nn.functional.normalize(output.query.float(), dim=-1)[batch["query_index"]]
        passage = torch.nn.functional.normalize(output.passage.float(), dim=-1)[batch["passage_index"]]
        loss = torch.nn.functional.cross_entropy(query @ passage.T / TEMPERATURE, _positives(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    seconds = time.perf_counter() - start
    return seconds, [float(loss) for loss in losses]


def _positives(batch: Any) -> Any:
    rows, width = batch["passage_ids"].shape
    return batch["target"].new_tensor(range(0, rows * width, width))


def main() -> None:
    args = arguments(
        __doc__,
        steps=(4, "steps of a round"),
        rounds=(7, "rounds of the sides in turn"),
        dtypes=(",".join(DTYPES), "precisions"),
        batch=(BATCH, "queries of a batch"),
    )

    collection = open_collection("medquad", args.data)
    rows = training_rows(collection, args.steps * args.batch, negatives=1)
    model = dense_model(temperature=TEMPERATURE)
    report = Report(args, "Overhead of the trainer", ["precision", "loop", "ms a step"])
    with scratch_folder("overhead") as folder:
        for dtype in args.dtypes.split(","):
            say(f"overhead, {dtype}")
            settings = {"steps": args.steps, "dtype": dtype, "batch": args.batch}
            losses: dict[str, list[float]] = {}

            def run(name: str, settings=settings, losses=losses) -> float:
                trainer = make_trainer(model, rows, folder, **settings)
                if name == TRAINER:
                    seconds, logged = run_trainer(trainer)
                    # One log, of the mean over all steps.
                    losses[name] = logged
                    return seconds
                batches = list(trainer.get_train_dataloader()) if name == READY else None
                seconds, each = bare_loop(trainer, args.steps, batches)
                losses[name] = [sum(each) / len(each)]
                return seconds

            names = (TRAINER, LOOP, READY)
            for name in names:  # the first calls of all kernels are not timed
                run(name)
            seconds = alternate({name: lambda name=name: run(name) for name in names}, args.rounds)
            for name in names:
                report.row(dtype, name, spread([1000 * one / args.steps for one in seconds[name]], "{:.0f}"))
            for name in (LOOP, READY):
                report.claim(f"{dtype}, {name}", ratios(seconds[TRAINER], seconds[name]), TARGET, "{:.3f}×")
            added = [a - b for a, b in zip(seconds[TRAINER], seconds[LOOP])]
            low, middle, high = (1000 * one / args.steps for one in quartiles(added))
            report.note(
                f"{dtype}: a step takes {middle:.1f} ms more than in the loop (quartiles {low:.1f} – {high:.1f})"
            )
            difference = largest_difference(losses[TRAINER], losses[LOOP])
            shown = f"{losses[TRAINER][0]:.5f} and {losses[LOOP][0]:.5f}"
            # bfloat16 rounds a step's gradients differently wherever the order of operations differs.
            most = 1e-4 if dtype == "float32" else 0.03
            report.check(difference <= most, f"{dtype}: mean losses, the trainer's and the loop's: {shown}")
    report.finish(
        f"Batches of {args.batch} × (query, relevant passage, one other passage) of "
        f"{data_name(collection)}, at most 128 tokens, contrastive loss, AdamW, gradients clipped, no dropout. "
        "The bare loop has torch's calls alone; in its second form the batches are looked up and tokenised "
        "before the clock starts. 0.952× is 5 % more than the loop."
    )


if __name__ == "__main__":
    main()
