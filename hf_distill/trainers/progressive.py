"""Progressive distillation: one student, teachers and data in phases, one run (PROD, Lin et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..console import get_logger
from ..data.rows import RowSet
from ..errors import InputError
from ..files import read_json, write_json
from ..models.backbones import is_adapted
from ..models.base import RetrievalModel
from ..models.student import load_model
from ..teachers.base import Teacher
from .arguments import DistillTrainingArguments
from .checkpoints import last_complete_checkpoint
from .distill import DistillTrainer


logger = get_logger(__name__)

PROGRESS = "progression.json"
_START = "start"
# What the whole run decides, not a phase.
_OF_THE_RUN = ("output_dir", "push_to_hub", "hub_model_id", "resume_from_checkpoint")

Prepared = tuple[RowSet, Sequence[Teacher]]


@dataclass
class Phase:
    """One teacher, or one set of data, of a progression.

    Args:
        name: For folders and logs.
        rows: The training rows. Give these and `teachers`, or `prepare`.
        teachers: As for [`DistillTrainer`].
        prepare: Called with the student at the start of the phase; returns rows and teachers, for rows that are mined
            with the student as it then is, and for teachers that need not be in memory before.
        settings: Fields of [`DistillTrainingArguments`] that this phase has of its own: `losses`, `learning_rate`,
            `max_steps`, `num_negatives`, ...
    """

    name: str
    rows: RowSet | None = None
    teachers: Sequence[Teacher] = ()
    prepare: Callable[[RetrievalModel], Prepared] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        where = f"phase {self.name!r}"
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise InputError("is no name for a folder", where=where, cure="Use letters, digits, '-' and '_'")
        if (self.prepare is None) == (self.rows is None):
            raise InputError("needs either rows or prepare", where=where, cure="Give one of the two")
        known = {one.name for one in fields(DistillTrainingArguments) if one.init} - set(_OF_THE_RUN)
        unknown = sorted(set(self.settings) - known)
        if unknown:
            raise InputError(
                f"sets {', '.join(unknown)}",
                where=where,
                cure="Give fields of DistillTrainingArguments, but not the output folder",
            )


class ProgressiveTrainer(DistillTrainer):
    """A [`DistillTrainer`] that runs a list of phases, each with its own teachers, data, losses and schedule.

    A phase is what a [`DistillTrainer`] of its own would be on the student that the phase before left: the same
    optimiser and random numbers, so the same weights. What a phase begins with is kept in its folder; there the anchor
    of learning without forgetting comes from, also after a resume.

    ```
    <output_dir>/progression.json    phases that are done, and the history of all, with steps counted through
    <output_dir>/01-NAME/start/      the student as the phase found it
    <output_dir>/01-NAME/            its checkpoints, and the student as the phase left it
    <output_dir>/                    the student after the last phase
    ```

    Args:
        model: The student. After `train` it has the weights of the last phase.
        args: What all phases have in common.
        phases: In their order, each name once.
        kwargs: `evaluation`, `callbacks`, see [`BaseTrainer`].
    """

    _name = "Progressive distillation"
    _card = "prod"
    _tags = ("hf_distill", "distillation", "progressive")
    _paper = {
        "title": "PROD: Progressive Distillation for Dense Retrieval",
        "authors": "Zhenghao Lin, Yeyun Gong, Xiao Liu, Hang Zhang, Chen Lin, Anlei Dong, Jian Jiao, Jingwen Lu, "
        "Daxin Jiang, Rangan Majumder, Nan Duan",
        "year": "2023",
        "arxiv": "2209.13335",
    }

    def __init__(self, model: RetrievalModel, args: DistillTrainingArguments, phases: Sequence[Phase], **kwargs: Any):
        names = [phase.name for phase in phases]
        if not names or len(set(names)) < len(names):
            raise InputError("give at least one phase, each with a name of its own", where="phases")
        if is_adapted(model.backbone):
            raise InputError(
                "the student carries adapters, which are merged at the end of a phase",
                where="phases",
                cure="Train them in one phase with DistillTrainer, or merge them first",
            )
        self.phases, self.student, self.common, self._kwargs = list(phases), model, args, kwargs
        self.folder = Path(args.output_dir)
        self.number = 0
        self.progress: dict[str, Any] = {"phases": [], "history": []}
        self._begin(self._resumed_number())
        if len(self.progress["phases"]) == len(self.phases):
            trained = load_model(self.phase_folder(self.number))
            self.whole_model().load_state_dict(trained.state_dict(), strict=False)

    # ---- phases ----
    def phase_folder(self, number: int) -> Path:
        """The folder of a phase, numbered from 0."""
        return self.folder / f"{number + 1:02d}-{self.phases[number].name}"

    @property
    def steps_before(self) -> int:
        """Optimiser steps of the phases before this one."""
        return sum(entry["steps"] for entry in self.progress["phases"][: self.number])

    def _resumed_number(self) -> int:
        """The phase to go on with, after reading which are done."""
        path = self.folder / PROGRESS
        if not path.is_file():
            return 0
        self.progress = read_json(path)
        done = [entry["name"] for entry in self.progress["phases"]]
        if done != [phase.name for phase in self.phases[: len(done)]]:
            raise InputError(
                f"holds another progression ({', '.join(done)})",
                where=str(self.folder),
                cure="Choose another output_dir, or keep the phases that are done in their order",
            )
        return min(len(done), len(self.phases) - 1)

    def _begin(self, number: int) -> None:
        """Makes this trainer the one of a phase."""
        self.number, phase, folder = number, self.phases[number], self.phase_folder(number)
        start = folder / _START
        if not (start / PROGRESS).is_file():
            # The marker is last: a copy that was cut off is written again.
            before = self.student if number == 0 else load_model(self.phase_folder(number - 1))
            before.save_pretrained(start, is_main_process=PartialState().is_main_process)
            if PartialState().is_main_process:
                write_json(start / PROGRESS, {"phase": phase.name})
            PartialState().wait_for_everyone()
        student = load_model(start)
        rows, teachers = (phase.rows, phase.teachers) if phase.prepare is None else phase.prepare(student)
        args = replace(self.common, **{"push_to_hub": False, **phase.settings}, output_dir=str(folder))
        # The whole construction again: optimiser, schedule, state and random numbers of a training of its own.
        super().__init__(student, args, teachers=teachers, rows=rows, **self._kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Runs the phases that are not done, the current one from its last complete checkpoint.

        Args:
            resume_from_checkpoint: Not needed: what lies in the output folder is gone on with.
            args, kwargs: As for [`~transformers.Trainer.train`].

        Returns:
            What the last phase's training returned; None if nothing was left to do.
        """
        result = None
        for number in range(len(self.progress["phases"]), len(self.phases)):
            if number != self.number:
                self._begin(number)
            logger.info("phase %d of %d: %s", number + 1, len(self.phases), self.phases[number].name)
            checkpoint = last_complete_checkpoint(self.args.output_dir)
            result = super().train(checkpoint, *args, **kwargs)
            self._end()
        final = self.whole_model()
        self.student.load_state_dict(final.state_dict(), strict=False)
        # From here on it speaks of the run, not of the last phase.
        self.args.output_dir = str(self.folder)
        return result

    def _end(self) -> None:
        """Keeps what the phase has made: the student, the history, and that it is done."""
        folder = self.phase_folder(self.number)
        self._save(str(folder))
        self.write_phase_history()
        if self.is_world_process_zero():
            steps = self.state.global_step
            entry = {"name": self.phases[self.number].name, "steps": steps, "folder": folder.name}
            self.progress = {
                "phases": [*self.progress["phases"], entry],
                "history": [*self.progress["history"], *self._told()],
            }
            write_json(self.folder / PROGRESS, self.progress)
        PartialState().wait_for_everyone()
        self.progress = read_json(self.folder / PROGRESS)

    def _told(self) -> list[dict[str, Any]]:
        """This phase's history with its name, steps counted from the start of the first phase."""
        before, name = self.steps_before, self.phases[self.number].name
        return [
            {**entry, "phase": name, "phase_step": entry["step"], "step": before + entry["step"]}
            for entry in self.state.log_history
            if "step" in entry
        ]

    def write_phase_history(self) -> None:
        """Writes the current phase's own history into its folder."""
        super().write_history(self.phase_folder(self.number))

    def write_history(self, folder: str | Path | None = None) -> None:
        """Writes the history of all phases as `history.json`."""
        if self.is_world_process_zero():
            write_json(Path(folder or self.folder) / "history.json", self.progress["history"])
