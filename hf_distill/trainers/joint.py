"""Training of student and teacher at once: one module, one optimiser with the rate, schedule and clipping of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from ..distributed import engine_of
from ..errors import InputError
from ..models.base import RetrievalModel
from ..models.joint import JointModel
from ..teachers.live import JointTeacher


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
        for who, rate in (("student", self.args.learning_rate), ("teacher", self._teacher_rate())):
            trained = [(name, one) for name, one in getattr(module, who).named_parameters() if one.requires_grad]
            for decay in (True, False):
                parameters = [one for name, one in trained if (f"{who}.{name}" in decayed) == decay]
                weight_decay = self.args.weight_decay if decay else 0.0
                groups.append({"params": parameters, "weight_decay": weight_decay, "lr": rate, "model": who})
        self.optimizer = optimizer_class([group for group in groups if group["params"]], **options)
        return self.optimizer

    def _teacher_rate(self) -> float:
        rate = self.args.teacher_learning_rate
        return self.args.learning_rate if rate is None else rate

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        if self.joint is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        args, optimizer = self.args, self.optimizer if optimizer is None else optimizer
        kind, warmup = args.teacher_lr_scheduler_type, args.teacher_warmup_steps
        schedules = {
            "student": _factor(args.lr_scheduler_type, args.warmup_steps, num_training_steps),
            "teacher": _factor(
                args.lr_scheduler_type if kind is None else kind,
                args.warmup_steps if warmup is None else warmup,
                num_training_steps,
            ),
        }
        self.lr_scheduler = LambdaLR(optimizer, [schedules[group["model"]] for group in optimizer.param_groups])
        return self.lr_scheduler

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        if self.joint is None:
            return super()._clip_grad_norm(model)
        both, most = self.accelerator.unwrap_model(model), self.args.max_grad_norm
        # accelerate takes the loss scale of float16 out of the gradients of both, which can be done only once a step.
        student_norm = self.accelerator.clip_grad_norm_(both.student.parameters(), most)
        self._teacher_norm = torch.nn.utils.clip_grad_norm_(both.teacher.parameters(), most)
        return student_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.joint is not None and "learning_rate" in logs:
            # The Trainer logs the first group's, which is the student's.
            rates = {group["model"]: group["lr"] for group in self.optimizer.param_groups}
            logs["teacher_learning_rate"] = rates["teacher"]
            if getattr(self, "_teacher_norm", None) is not None:
                logs["teacher_grad_norm"] = float(self._teacher_norm)
        super().log(logs, start_time)


def _factor(kind: Any, warmup: float, total: int) -> Callable[[int], float]:
    """What the learning rate is multiplied by at each step of a schedule of transformers."""
    steps = int(warmup) if warmup >= 1 else math.ceil(warmup * total)
    nobody = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(kind, nobody, num_warmup_steps=steps, num_training_steps=total)
    if not isinstance(schedule, LambdaLR):
        raise InputError(
            f"the schedule {getattr(kind, 'value', kind)!r} depends on more than the step",
            where="lr_scheduler_type",
            cure="Use linear, cosine, constant or constant_with_warmup for joint training",
        )
    return schedule.lr_lambdas[0]
