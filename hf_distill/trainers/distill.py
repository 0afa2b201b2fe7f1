"""Distillation: a student follows the scores or embeddings of one teacher or several."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..console import get_logger
from ..errors import InputError
from ..losses import calibrate, check_teacher_scores, fit_temperature
from ..losses.combine import LossTerm
from ..models.base import RetrievalModel
from ..models.candidates import arrange
from ..teachers.base import Teacher
from .arguments import DistillTrainingArguments
from .retrieval import BatchScores, RetrievalTrainer


logger = get_logger(__name__)


class DistillTrainer(RetrievalTrainer):
    """Trains a student on what its teachers say about the candidates.

    Args:
        model: The student.
        args: Its configuration; `args.losses` names terms and teachers.
        teachers: In any number; the first is the primary one, meant where a term names none.
        rows, evaluation, callbacks: See [`BaseTrainer`].

    Raises:
        InputError: If a term names a teacher that is not there, asks it for candidates that it cannot score, or
            follows embeddings that it does not have.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015).
    """

    _name = "Distillation"
    _tags = ("hf_distill", "distillation")
    _paper = {
        "title": "Distilling the Knowledge in a Neural Network",
        "authors": "Geoffrey Hinton, Oriol Vinyals, Jeff Dean",
        "year": "2015",
        "arxiv": "1503.02531",
    }

    def __init__(
        self, model: RetrievalModel, args: DistillTrainingArguments, teachers: Sequence[Teacher], **kwargs: Any
    ):
        self.teachers = {teacher.name: teacher for teacher in teachers}
        if not self.teachers or len(self.teachers) < len(teachers):
            raise InputError("give at least one teacher, each with a name of its own", where="teachers")
        self.primary = teachers[0]
        super().__init__(
            model,
            args,
            encoders={name: teacher.processor for name, teacher in self.teachers.items() if teacher.processor},
            stores={name: teacher.stores for name, teacher in self.teachers.items() if teacher.stores},
            score_columns=[teacher.score_column for teacher in teachers if teacher.score_column],
            **kwargs,
        )
        for teacher in teachers:
            teacher.to(self.args.device)
        if self.rows is not None:
            self._look_at_scores()

    def default_losses(self) -> list[dict[str, Any]]:
        candidates = "own" if self.ranks_pairs else self.primary.candidate_sets[-1]
        return [{"name": "kl", "candidates": candidates}, *self.regulariser()]

    def teacher_of(self, term: LossTerm) -> Teacher:
        """The teacher that a term follows."""
        return self.primary if term.teacher is None else self.teachers[term.teacher]

    def prepare_model(self, model: RetrievalModel, terms: Mapping[str, LossTerm], seed: int) -> None:
        # Inside the trained module, so that optimiser, checkpoints and sharding see it; left out of the export.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for term in terms.values():
                if term.loss.inputs != "embeddings":
                    continue
                teacher = self.teacher_of(term)
                if teacher.embedding_size != model.embedding_size:
                    model.add_projection(teacher.name, teacher.embedding_size)

    def _look_at_scores(self) -> None:
        """Warns of teachers that say nothing, and fits the temperatures that were left open."""
        examples = self.train_dataset.first_examples(self.args.calibration_rows)
        for label, term in self.terms.items():
            column = self.teacher_of(term).score_column if term.loss.teacher else None
            open_temperature = term.calibration == "temperature" and term.calibration_temperature == 1.0
            if column is None:
                if open_temperature:
                    raise InputError(
                        "a temperature can only be fitted to scores that stand in the row set",
                        where=f"loss {label!r}",
                        cure="Set calibration_temperature, or score the rows first (hf-distill score)",
                    )
                continue
            scores = torch.stack([torch.from_numpy(example.scores[column]) for example in examples])
            if open_temperature:
                target = torch.tensor([example.target for example in examples])
                temperature = fit_temperature(scores, target)
                logger.info("loss %s: fitted temperature %.4g", label, temperature)
                self.terms[label] = term = replace(term, calibration_temperature=float(temperature))
            softmax = inspect.signature(term.loss.function).parameters.get("temperature")
            if softmax is None:
                continue  # the warnings are about scores that go through a softmax
            calibrated = calibrate(scores, term.calibration, temperature=term.calibration_temperature)
            temperature = term.options.get("temperature", softmax.default)
            for warning in check_teacher_scores(calibrated, temperature=temperature):
                logger.warning("teacher %s: %s", self.teacher_of(term).name, warning)

    def loss_parts(self, model: RetrievalModel, output: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        for teacher in self.teachers.values():
            teacher.begin_batch()
        return super().loss_parts(model, output, batch)

    def term_value(self, term: LossTerm, student: BatchScores) -> torch.Tensor:
        if term.loss.inputs == "embeddings":
            return self._embedding_value(term, student)
        return super().term_value(term, student)

    def teacher_scores(self, term: LossTerm, student: BatchScores) -> torch.Tensor | None:
        if not term.loss.teacher:
            return None
        return self.teacher_of(term).scores(student.batch, term.candidates)

    def _embedding_value(self, term: LossTerm, student: BatchScores) -> torch.Tensor:
        teacher = self.teacher_of(term)
        output = student.output
        vectors = (output.projected or {}).get(teacher.name, (output.query, output.passage))
        ours = arrange(*vectors, student.batch)
        theirs = teacher.embeddings(student.batch)
        # Row by row, not text by text: every process then brings as many rows, and the mean of means is the mean.
        flat = [torch.cat([query, passage.flatten(0, 1)]) for query, passage in (ours, theirs)]
        return term.loss.function(*flat, **term.options)
