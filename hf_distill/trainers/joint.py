"""Training of student and teacher at once: one module, one optimiser with the rate, schedule and clipping of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from ..distributed import engine_of
from ..errors import InputError
from ..models.base import RetrievalModel
from ..models.joint import JointModel
from ..teachers.live import JointTeacher
from .base import say_if_all_warm_up


class JointTraining:
    """What a trainer does differently where one of its teachers learns along (`joint`); else nothing.

    The wrapped module is a [`JointModel`]. AdamW has parameter groups of the student and of the teacher, each with its
    own learning rate and schedule, and each model's gradients are clipped by themselves. All of this stands in the
    checkpoint: the teacher's weights in `teacher/`, moments and schedules where the Trainer keeps them.
    """

    joint: JointTeacher | None = None

    def check_joint(self, args: Any) -> None:
        """Raises [`InputError`] where joint training is not possible."""
        teachers = [teacher for teacher in self.teachers.values() if teacher.is_joint]
        if not teachers:
            return
        if len(teachers) > 1:
            raise InputError(
                f"{len(teachers)} teachers are to be trained along",
                where="teachers",
                cure="Train one; freeze the others",
            )
        engine = engine_of(args)
        if engine is not None:
            raise InputError(
                f"student and teacher cannot be trained together under {'FSDP' if engine == 'fsdp' else 'DeepSpeed'}",
                where="teachers",
                cure="Use plain data parallelism (hf-distill --launch multi_gpu, accelerate launch --multi_gpu), or "
                "freeze the teacher (--teacher_mode live or cached)",
            )
        joint_schedules(args, 1)  # their number of steps is not known yet, only whether they are possible

    def trained_module(self, model: RetrievalModel) -> torch.nn.Module:
        return model if self.joint is None else JointModel(model, self.joint.model)

    # ---- Optimiser and schedules ----
    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.joint is None or self.optimizer is not None:
            return super().create_optimizer(model) if model is not None else super().create_optimizer()
        module = self.model if model is None else model
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, module)
        decayed = set(self.get_decay_parameter_names(module))
        groups = []
        for who, rate in (("student", self.args.learning_rate), ("teacher", _teacher_rate(self.args))):
            trained = [(name, one) for name, one in getattr(module, who).named_parameters() if one.requires_grad]
            for decay in (True, False):
                parameters = [one for name, one in trained if (f"{who}.{name}" in decayed) == decay]
                weight_decay = self.args.weight_decay if decay else 0.0
                groups.append({"params": parameters, "weight_decay": weight_decay, "lr": rate, "model": who})
        self.optimizer = optimizer_class([group for group in groups if group["params"]], **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        if self.joint is not None and self.lr_scheduler is None:
            schedules = joint_schedules(self.args, num_training_steps)
            both = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = LambdaLR(both, [schedules[group["model"]] for group in both.param_groups])
            if self.args.teacher_warmup_steps is not None:
                warmup = _steps(self.args.teacher_warmup_steps, num_training_steps)
                say_if_all_warm_up(warmup, num_training_steps, "teacher_warmup_steps")
        return super().create_scheduler(num_training_steps, optimizer)

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        if self.joint is None:
            return super()._clip_grad_norm(model)
        both, most = self.accelerator.unwrap_model(model), self.args.max_grad_norm
        # accelerate takes the loss scale of float16 out of the gradients of both, which can be done only once a step.
        student_norm = self.accelerator.clip_grad_norm_(both.student.parameters(), most)
        self._teacher_norm = torch.nn.utils.clip_grad_norm_(both.teacher.parameters(), most)
        return student_norm

    def _get_learning_rate(self) -> float:
        # Asked for between a step and the next rate; the Trainer logs the first group's, which is the student's.
        if self.joint is not None:
            groups = zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True)
            self._teacher_rate_used = {group["model"]: rate for group, rate in groups}["teacher"]
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.joint is not None and "learning_rate" in logs:
            logs["teacher_learning_rate"] = self._teacher_rate_used
            if getattr(self, "_teacher_norm", None) is not None:
                logs["teacher_grad_norm"] = float(self._teacher_norm)
        super().log(logs, start_time)


def joint_schedules(args: Any, total: int) -> dict[str, Callable[[int], float]]:
    """What the learning rates of `"student"` and `"teacher"` are multiplied by at each step.

    Args:
        args: With the options of [`DistillOptions`] about the teacher's schedule. `lr_scheduler_kwargs` are those of
            `lr_scheduler_type`, so a teacher with a schedule of another kind has that one's defaults.
        total: Optimiser steps of the training.

    Raises:
        InputError: If a schedule is unknown, depends on more than the step, or does not fit its arguments.
    """
    kind, warmup = args.teacher_lr_scheduler_type, args.teacher_warmup_steps
    given = args.lr_scheduler_kwargs
    return {
        "student": _factor(args.lr_scheduler_type, given, args.learning_rate, args.warmup_steps, total),
        "teacher": _factor(
            args.lr_scheduler_type if kind is None else kind,
            given if kind in (None, args.lr_scheduler_type) else None,
            _teacher_rate(args),
            args.warmup_steps if warmup is None else warmup,
            total,
            "lr_scheduler_type" if kind is None else "teacher_lr_scheduler_type",
        ),
    }


def _teacher_rate(args: Any) -> float:
    return args.learning_rate if args.teacher_learning_rate is None else args.teacher_learning_rate


def _steps(warmup: float, total: int) -> int:
    """A number of steps, or a share of all below 1, as the Trainer counts its own warm-up."""
    return int(warmup) if warmup >= 1 else math.ceil(warmup * total)


def _factor(
    kind: Any,
    given: Mapping[str, Any] | None,
    rate: float,
    warmup: float,
    total: int,
    option: str = "lr_scheduler_type",
) -> Callable[[int], float]:
    """What the learning rate is multiplied by at each step of a schedule of transformers."""
    # Some schedules end at a rate, not at a share of the first one: they read the optimiser's.
    nobody = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    name = getattr(kind, "value", kind)
    try:
        schedule = get_scheduler(kind, nobody, _steps(warmup, total), total, dict(given or {}))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"the schedule {name!r} with {f'the arguments {dict(given)}' if given else 'no arguments'} is impossible "
            f"({error})",
            where=option,
            cure="Choose another one, or set what it needs as JSON in lr_scheduler_kwargs, which are for "
            "lr_scheduler_type (and the teacher, if it has the same)",
        ) from None
    if not isinstance(schedule, LambdaLR):
        raise InputError(
            f"the schedule {name!r} depends on more than the step",
            where=option,
            cure="Use linear, cosine, constant or constant_with_warmup for joint training",
        )
    return schedule.lr_lambdas[0]
