"""Distillation: a student follows the scores or embeddings of one teacher or several."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..console import get_logger
from ..distributed import sum_over_processes
from ..errors import InputError
from ..losses import calibrate, check_teacher_scores, fit_temperature
from ..losses.combine import ANCHOR, LossTerm
from ..models.base import RetrievalModel
from ..models.candidates import arrange, candidate_layout
from ..models.joint import student_of
from ..teachers.base import Teacher
from ..teachers.live import Anchor, model_inputs
from .arguments import DistillTrainingArguments
from .base import STUDENT
from .joint import JointTraining
from .layers import LayerTerms, compares_layers
from .methods import method_losses
from .retrieval import BatchScores, RetrievalTrainer
from .sparsity import check_vocabulary


logger = get_logger(__name__)

# Cited where layers teach, or where a teacher's order does.
LEAD = {
    "title": "LEAD: Liberal Feature-based Distillation for Dense Retrieval",
    "authors": "Hao Sun, Xiao Liu, Yeyun Gong, Anlei Dong, Jingwen Lu, Yan Zhang, Linjun Yang, Rangan Majumder, "
    "Nan Duan",
    "year": "2024",
    "arxiv": "2212.05225",
}
LED = {
    "title": "LED: Lexicon-Enlightened Dense Retriever for Large-Scale Retrieval",
    "authors": "Kai Zhang, Chongyang Tao, Tao Shen, Can Xu, Xiubo Geng, Binxing Jiao, Daxin Jiang",
    "year": "2023",
    "arxiv": "2208.13661",
}


class DistillTrainer(JointTraining, RetrievalTrainer):
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
        self.joint = next((teacher for teacher in teachers if teacher.is_joint), None)
        self.check_joint(args)
        self.layers: LayerTerms | None = None
        self._layer_options = args
        super().__init__(
            model,
            args,
            encoders={name: teacher.processor for name, teacher in self.teachers.items() if teacher.processor},
            stores={name: both for teacher in teachers for name, both in teacher.stores.items()},
            score_columns=[
                column for teacher in teachers for column in (teacher.score_column, teacher.layer_column) if column
            ],
            **kwargs,
        )
        if any(term.name == "layer_alignment" for term in self.terms.values()):
            self._paper, self._tags, self._card = LEAD, (*self._tags, "lead"), "lead"
        elif self._card == "student" and any(term.name == "rank_consistency" for term in self.terms.values()):
            self._paper, self._tags, self._card = LED, (*self._tags, "led"), "led"
        for teacher in self.teachers.values():
            teacher.to(self.args.device)
        if self.rows is not None:
            self._look_at_scores()

    def default_losses(self) -> list[dict[str, Any]]:
        candidates = "own" if self.ranks_pairs else self.primary.candidate_sets[-1]
        method = self._layer_options.method or ("lead" if self.joint is not None else "response")
        scale = self._layer_options.layer_calibration
        terms = method_losses(method, candidates, joint=self.joint is not None, layer_calibration=scale)
        return [*terms, *self.regulariser()]

    def teachers_of(self, term: LossTerm) -> list[Teacher]:
        """The teachers that a term follows."""
        if not term.needs_teacher:
            return []
        return [self.primary if name is None else self.teachers[name] for name in term.teachers]

    def prepare_model(self, model: RetrievalModel, terms: Mapping[str, LossTerm], seed: int) -> None:
        if ANCHOR not in self.teachers and any(ANCHOR in term.teachers for term in terms.values()):
            # Before the first step, and before a checkpoint is read: the student as it was given.
            self.teachers[ANCHOR] = Anchor(model)
        self.layers = LayerTerms(terms, lambda term: self.teachers_of(term)[0], model, self._layer_options)
        # Inside the trained module, so that optimiser, checkpoints and sharding see it; left out of the export.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for term in terms.values():
                if term.loss.inputs != "embeddings":
                    continue
                (teacher,) = self.teachers_of(term)
                if self.is_lexical:
                    check_vocabulary(model, teacher)
                if teacher.embedding_size != model.embedding_size:
                    model.add_projection(teacher.name, teacher.embedding_size)

    def _look_at_scores(self) -> None:
        """Warns of teachers that say nothing, and fits the temperatures that were left open."""
        examples = self.train_dataset.first_examples(self.args.calibration_rows)
        for label, term in self.terms.items():
            teachers = self.teachers_of(term)
            columns = [teacher.score_column for teacher in teachers]
            scores = {
                column: torch.stack([torch.from_numpy(example.scores[column]) for example in examples])
                for column in columns
                if column is not None
            }
            if term.calibration == "temperature" and term.calibration_temperature == 1.0:
                if len(columns) > 1 or not scores:
                    raise InputError(
                        "a temperature can only be fitted to the scores of one teacher that stand in the row set",
                        where=f"loss {label!r}",
                        cure="Set calibration_temperature, or score the rows first (hf-distill score)",
                    )
                target = torch.tensor([example.target for example in examples])
                temperature = fit_temperature(scores[columns[0]], target)
                logger.info("loss %s: fitted temperature %.4g", label, temperature)
                self.terms[label] = term = replace(term, calibration_temperature=float(temperature))
            softmax = inspect.signature(term.loss.function).parameters.get("temperature")
            if softmax is None:
                continue  # the warnings are about scores that go through a softmax
            temperature = term.options.get("temperature", softmax.default)
            for teacher in teachers:
                if teacher.score_column is None:
                    continue
                calibrated = calibrate(
                    scores[teacher.score_column], term.calibration, temperature=term.calibration_temperature
                )
                for warning in check_teacher_scores(calibrated, temperature=temperature):
                    logger.warning("%s: %s", teacher.name, warning)

    def loss_parts(self, model: RetrievalModel, output: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        for teacher in self.teachers.values():
            teacher.begin_batch(self.layers.of_teacher(teacher.name), self.layers.needs_tokens)
        if self.joint is not None:
            self.joint.receive(output.teacher)
            output = output.student
        return super().loss_parts(student_of(model), output, batch)

    def run_model(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> Any:
        self.layers.begin_step(self.state.global_step)
        student = model_inputs(batch, STUDENT, self.layers.of_student, self.layers.needs_tokens)
        if self.joint is None:
            return model(**student)
        name = self.joint.name
        wanted = (self.layers.of_teacher(name), self.layers.needs_tokens)
        return model(student=student, teacher=model_inputs(batch, name, *wanted))

    def term_value(self, term: LossTerm, student: BatchScores) -> torch.Tensor:
        if term.loss.inputs == "embeddings":
            return self._embedding_value(term, student)
        if compares_layers(term):
            return self._layer_value(term, student)
        return super().term_value(term, student)

    def _layer_value(self, term: LossTerm, student: BatchScores) -> torch.Tensor:
        (teacher,) = self.teachers_of(term)
        if term.loss.inputs == "layer_tokens":
            value = term.loss.function(*self.layers.maps(term, student, teacher))
            every = torch.ones_like(student.batch["target"], dtype=torch.bool)
            return self.reduce_counted(value, every, term.candidates)
        ours, theirs = self.layers.scores(term, student, teacher)
        target, keep = candidate_layout(student.batch, term.candidates, term.mask_false_negatives)
        # Global candidates are the joint batch in every process already.
        given = {} if term.candidates == "global" else {"reduce": sum_over_processes}
        value = term(ours, theirs, target, keep, **given)
        return self.reduce_counted(value, term.counted(ours, theirs, target, keep), term.candidates)

    def teacher_scores(self, term: LossTerm, student: BatchScores) -> list[torch.Tensor] | None:
        if not term.needs_teacher:
            return None
        return [teacher.scores(student.batch, term.candidates) for teacher in self.teachers_of(term)]

    def _embedding_value(self, term: LossTerm, student: BatchScores) -> torch.Tensor:
        (teacher,) = self.teachers_of(term)
        output = student.output
        vectors = (output.projected or {}).get(teacher.name, (output.query, output.passage))
        ours = arrange(*vectors, student.batch)
        theirs = teacher.embeddings(student.batch)
        # Row by row, not text by text: every process then brings as many rows, and the mean of means is the mean.
        flat = [torch.cat([query, passage.flatten(0, 1)]) for query, passage in (ours, theirs)]
        return term.loss.function(*flat, **term.options)
