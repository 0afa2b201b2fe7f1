"""`hf-distill progressive`: one student, teachers and data in phases, in one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..settings import option, parse_yaml
from .options import DataOptions, DistillHelp, IndexOptions, RowOptions, StudentOptions
from .parsing import Verb, parse_settings, require


if TYPE_CHECKING:
    from ..models.base import RetrievalModel
    from ..trainers import Phase


@dataclass
class ProgressiveOptions:
    """The student, and the phases of its training."""

    _argument_group_name = "student and phases"

    student: str | None = option(None, "A Hub id or folder.")
    student_revision: str | None = option(None, "Its branch, tag or commit.")
    phases: str | None = option(
        None,
        "The phases in their order, a list in YAML or JSON: each has a name, a teacher, and whatever it sets "
        "otherwise than the run, any field of distill: rows, mine_with, losses, max_steps, learning_rate ...",
    )


def _arguments() -> tuple[type, ...]:
    from .training_arguments import DistillArguments

    return (DataOptions, ProgressiveOptions, RowOptions, IndexOptions, DistillArguments)


def read_phases(text: str) -> list[dict[str, Any]]:
    """The option `phases`: mappings with `name`, `teacher`, and any further field of `distill`.

    Raises:
        InputError: If it is anything else.
    """
    phases = parse_yaml(text, "--phases")
    if not isinstance(phases, list) or not phases or not all(isinstance(phase, dict) for phase in phases):
        cure = "Write for example '[{name: dense, teacher: ID}, {name: ranker, teacher: ID2, losses: [kl, lwf]}]'"
        raise InputError("must be a list of phases", where="--phases", cure=cure)
    for number, phase in enumerate(phases, start=1):
        if not {"name", "teacher"} <= set(phase):
            raise InputError(
                "needs a name and a teacher", where=f"--phases, phase {number}", cure="Add what is missing"
            )
        unfit = sorted({"data", "student", "output_dir", "baseline", "plan_only"} & set(phase))
        if unfit:
            raise InputError(f"sets {', '.join(unfit)}", where=f"--phases, phase {number}", cure="That is the run's")
    return phases


class _PhaseOptions:
    """The options of one phase: the run's, and over them what the phase sets."""

    def __init__(self, phase: Mapping[str, Any], run: list[Any]):
        from .distill import VERB

        self.name = str(phase["name"])
        given = {name: value for name, value in phase.items() if name != "name"}
        # Arguments of a Trainer set up the processes anew when they are made: on the run's devices, not on others.
        parsed = parse_settings(VERB, {"use_cpu": run[-1].use_cpu, **given}, f"phase {self.name!r}")
        typed = {
            field.name: (type(one), getattr(one, field.name))
            for one in parsed
            for field in fields(one)
            if field.name in given
        }
        self.options = [
            replace(one, **{name: value for name, (kind, value) in typed.items() if kind is type(one)})
            for one in run[:-1]
        ]
        self.settings = {name: value for name, (kind, value) in typed.items() if kind is type(run[-1])}
        self.args = run[-1]

    def trainer_phase(self) -> Phase:
        """For the trainer: rows and teachers are made when the phase begins."""
        from ..trainers import Phase

        return Phase(self.name, prepare=self.prepare, settings=self.settings)

    def prepare(self, student: RetrievalModel) -> Any:
        """Rows and teachers, what is missing mined and scored."""
        from .distillation import Distillation

        data, options, *others = self.options
        args = replace(self.args, **self.settings)
        job = Distillation(data, replace(options, student=str(student.name_or_path)), *others, args)
        return job.prepare_teachers(job.rows())


def run(
    data_options: DataOptions,
    options: ProgressiveOptions,
    row_options: RowOptions,
    encode_options: IndexOptions,
    args: Any,
) -> None:
    """Runs the phases, measures the student after each, and writes the last one with its card."""
    require(
        "progressive",
        data=(data_options.data, "the collection, a folder or Hub id"),
        student=(options.student, "a Hub id or folder"),
        phases=(options.phases, "the teachers in their order"),
        output_dir=(args.output_dir, "where the student goes"),
    )
    from ..models import load_model
    from ..trainers import ProgressiveTrainer
    from . import folders, publishing, steps
    from .options import ModelOptions
    from .reporting import Report

    publishing.check_no_checkpoint(args, "phases")
    common = [data_options, StudentOptions(baseline=False), row_options, ModelOptions(), encode_options, args]
    phases = [_PhaseOptions(phase, common) for phase in read_phases(options.phases)]
    data = steps.Data.open(data_options)
    student = load_model(options.student, revision=options.student_revision)
    settings = folders.settings_of(
        data_options,
        options,
        row_options,
        encode_options,
        args,
        data_fingerprint=data.collection.fingerprints,
        student_weights=student.weights_fingerprint(),
    )
    folders.claim_output(args.output_dir, settings)
    publishing.check_push(args)
    encode = steps.encode_settings(encode_options, data_options)
    report = Report.of_training(data, encode, args, encode_options.index)
    report.bm25()
    report.model("student_before", student)
    evaluation = steps.evaluation_for(data, args, student)
    trainer = ProgressiveTrainer(student, args, [phase.trainer_phase() for phase in phases], evaluation=evaluation)
    trainer.train()
    trainer.save_model(_internal_call=True)
    trainer.write_history()
    for number, phase in enumerate(phases):
        report.model(phase.name, load_model(trainer.phase_folder(number)))
    report.model("student", student)
    teachers = [teacher for phase in phases for teacher in phase.options[1].teacher]
    report.finish(
        trainer,
        student,
        trainer.rows,
        system="student",
        summary=f"`{options.student}`, distilled from {', then '.join(f'`{name}`' for name in teachers)}.",
        settings=settings,
        base_models=[options.student],
        teachers=[{"model": name} for name in teachers if not Path(name).is_dir() and ":" not in name],
    )
    publishing.publish(trainer)


VERB = Verb(
    "progressive",
    "Train one student in phases, each with its own teacher, data, losses and schedule.",
    (DataOptions, ProgressiveOptions, RowOptions, IndexOptions, DistillHelp),
    run,
    _arguments,
    "hf-distill progressive --data D --student S --output_dir out "
    "--phases '[{name: dense, teacher: T1}, {name: ranker, teacher: T2, losses: [kl, lwf], max_steps: 500}]'",
)
