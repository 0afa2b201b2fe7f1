"""What can be added to any trainer: an early stop, and the learning and forgetting between evaluations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import InputError
from ..evaluation.forgetting import DEPTH, changes, positive_ranks, read_ranks, write_ranks
from ..evaluation.in_loop import RetrievalEvaluation


class StopAfter(TrainerCallback):
    """Ends training after some steps, with the learning rates that the whole run would have had until then.

    `max_steps` would squeeze warm-up and decay into these steps. (ANCE-Tele stops its first two episodes like this,
    near the peak of the learning rate.)

    Args:
        steps: Optimizer steps.
    """

    def __init__(self, steps: int):
        if steps < 1:
            raise InputError(f"{steps} steps", where="stop_after", cure="Train for one step at least")
        self.steps = steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= self.steps:
            control.should_training_stop = True


class ForgettingCallback(TrainerCallback):
    """Follows the rank of every evaluated query's best positive (see [`hf_distill.evaluation.forgetting`]).

    Each evaluation's entry in the log gets `eval_forgetting` and `eval_learning`, the shares of queries that rank
    lower or higher than at the evaluation before, and `eval_lost`, the share that was first once and no longer is. All
    ranks stand in `<output_dir>/ranks.parquet`, one column `step_<n>` for each evaluation; a resumed training goes on
    with them.

    Args:
        evaluation: The trainer's evaluation.
        depth: Results that are looked at; an evaluation that retrieves less sees less.
        path: The Parquet file, instead of the one in the output folder.
    """

    def __init__(self, evaluation: RetrievalEvaluation, depth: int = DEPTH, path: str | os.PathLike | None = None):
        self.evaluation, self.depth, self.path = evaluation, depth, path
        self._ranks: dict[str, np.ndarray] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        path = self._file(args)
        if state.global_step and path.is_file():
            # Of an interrupted training: what came after the checkpoint is measured again.
            kept = read_ranks(path)
            self._ranks = {name: ranks for name, ranks in kept.items() if _step(name) <= state.global_step}

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        evaluation = self.evaluation
        if evaluation.run is None:
            return
        ranks = positive_ranks(evaluation.run, evaluation.qrels, evaluation.queries, self.depth)
        self._ranks[f"step_{state.global_step}"] = ranks
        change = changes(list(self._ranks), np.stack(list(self._ranks.values())))[-1]
        if len(self._ranks) > 1 and state.log_history:
            state.log_history[-1] |= {
                "eval_forgetting": change.forgetting,
                "eval_learning": change.learning,
                "eval_lost": change.lost,
            }
        if state.is_world_process_zero:
            ids = evaluation.collection.queries.ids_at(evaluation.queries)
            write_ranks(self._file(args), ids, list(self._ranks), np.stack(list(self._ranks.values())))

    def _file(self, args: TrainingArguments) -> Path:
        return Path(self.path or Path(args.output_dir) / "ranks.parquet")


def _step(name: str) -> int:
    return int(name.removeprefix("step_"))
