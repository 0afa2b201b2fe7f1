"""Student and teacher as one module, for training both at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from .backbones import freeze_unused, plain_model
from .base import RetrievalModel
from .processing import TextProcessor


TEACHER_FOLDER = "teacher"


@dataclass
class JointOutput(ModelOutput):
    """What both models give for a batch: the outputs of their own forwards."""

    student: Any = None
    teacher: Any = None


class JointModel(nn.Module):
    """A student and the teacher that learns along with it, in one forward of one wrapped module.

    Towards a trainer it is the student, whose checkpoints have the teacher's beside them in `teacher/`.

    Args:
        student: The model that is served afterwards.
        teacher: The model that it learns from.
    """

    def __init__(self, student: RetrievalModel, teacher: RetrievalModel):
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(True)
        for tower in teacher.towers.values():
            freeze_unused(plain_model(tower))

    def forward(self, student: Mapping[str, Any], teacher: Mapping[str, Any]) -> JointOutput:
        """Both models on their own tokens of one batch.

        Args:
            student: Keyword arguments of the student's forward.
            teacher: Keyword arguments of the teacher's.
        """
        return JointOutput(self.student(**student), self.teacher(**teacher))

    @property
    def config(self) -> Any:
        return self.student.config

    @property
    def representation(self) -> str:
        return self.student.representation

    @property
    def name_or_path(self) -> str:
        return self.student.name_or_path

    @property
    def device(self) -> torch.device:
        return self.student.device

    @property
    def towers(self) -> dict[str, nn.Module]:
        """The backbones of both."""
        both = (("student", self.student), ("teacher", self.teacher))
        return {f"{who}.{name}": tower for who, model in both for name, tower in model.towers.items()}

    @property
    def recompute(self) -> bool:
        """Whether both recompute activations in the backward pass, see [`RetrievalModel`]."""
        return self.student.recompute

    @recompute.setter
    def recompute(self, value: bool) -> None:
        self.student.recompute = self.teacher.recompute = value

    def processor(self) -> TextProcessor:
        """How the student reads text."""
        return self.student.processor()

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
        """Writes both as native folders: the student to the folder itself, the teacher to `teacher/` in it."""
        # The teacher first: a folder with a student in it is complete.
        self.teacher.save_pretrained(Path(save_directory) / TEACHER_FOLDER, is_main_process, **kwargs)
        self.student.save_pretrained(save_directory, is_main_process, **kwargs)

    def load_checkpoint(self, folder: str | os.PathLike) -> None:
        """Takes over the weights of both from a folder of `save_pretrained`, see [`RetrievalModel`]."""
        self.student.load_checkpoint(folder)
        self.teacher.load_checkpoint(Path(folder) / TEACHER_FOLDER)


def student_of(model: RetrievalModel | JointModel) -> RetrievalModel:
    """The model that is evaluated and served."""
    return model.student if isinstance(model, JointModel) else model
