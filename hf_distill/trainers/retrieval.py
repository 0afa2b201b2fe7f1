"""Training of retrievers and rankers on labelled rows, without a teacher."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch

from ..data.rows import RowSet
from ..data.streaming import StreamedRows
from ..errors import InputError
from ..losses.combine import ANCHOR, LOSSES, LossTerm, parse_terms
from ..models.base import RetrievalModel
from ..models.candidates import candidate_layout
from .arguments import RetrievalTrainingArguments
from .base import BaseTrainer, read_losses
from .sparsity import active_terms, check_apart, look_at_sparsity, sparsity


class BatchScores:
    """The student's scores of one batch, computed once for each set of candidates.

    Args:
        model: The student.
        output: What its forward returned for the batch.
        batch: The collator's batch.
    """

    def __init__(self, model: RetrievalModel, output: Any, batch: Mapping[str, Any]):
        self.model, self.output, self.batch = model, output, batch
        self._scores: dict[str, torch.Tensor] = {}
        self._layer_scores: dict[str, torch.Tensor] = {}

    def scores(self, candidates: str) -> torch.Tensor:
        """The scores `[Q, C]` of a set of candidates, float32."""
        if candidates not in self._scores:
            self._scores[candidates] = self.model.batch_scores(self.output, self.batch, candidates)
        return self._scores[candidates]

    def layer_scores(self, candidates: str) -> torch.Tensor:
        """What the layers that the forward was asked for say about a set of candidates, float32 `[K, Q, C]`."""
        if candidates not in self._layer_scores:
            self._layer_scores[candidates] = self.model.layer_scores(self.output, self.batch, candidates)
        return self._layer_scores[candidates]


def check_terms(terms: Mapping[str, LossTerm], *, representation: str, teachers: Mapping[str, Any]) -> None:
    """Looks whether loss terms can be computed, before anything is read or trained.

    Args:
        terms: By their label.
        representation: What the student makes of texts, see [`RetrievalModel`].
        teachers: Each with `candidate_sets`, `more_live`, `embedding_size` and `is_joint`, see [`Teacher`]; the
            primary one first.

    Raises:
        InputError: For the first that cannot, with what would do.
    """
    ranks_pairs = representation == "pair"
    possible = {"scores", *({"representations"} if representation == "sparse" else {"layer_scores", "layer_tokens"})}
    if representation != "tokens":
        possible.add("embeddings")
    for label, term in terms.items():
        if term.loss.inputs not in possible:
            known = [name for name, loss in LOSSES.items() if loss.inputs in possible]
            raise InputError(
                f"{label} compares {term.loss.inputs}, which these students do not give",
                where="losses",
                cure=f"Choose among {', '.join(known)}",
            )
        if ranks_pairs and term.loss.inputs == "embeddings":
            raise InputError(
                f"{label} compares embeddings, but a cross-encoder has none",
                where="losses",
                cure="Use a loss on scores (kl, margin_mse), or train a bi-encoder",
            )
        if ranks_pairs and term.candidates != "own":
            raise InputError(
                f"{label} compares {term.candidates} candidates, but a cross-encoder scores pairs",
                where="losses",
                cure="Set candidates: own",
            )
        if term.needs_teacher:
            _check_teacher(label, term, teachers)


def check_positives(terms: Mapping[str, LossTerm], rows: RowSet | StreamedRows) -> None:
    """Raises [`InputError`] if no row has a positive and no term can do without."""
    learning = {label: term for label, term in terms.items() if term.loss.inputs != "representations"}
    if rows.has_positives or not all(term.loss.target for term in learning.values()):
        return
    raise InputError(
        f"no row has a positive, so there is nothing to learn from with {' and '.join(learning)}",
        where="rows",
        cure="Give rows with num_positives above 0, or train on a teacher's scores (kl, margin_mse)",
    )


def _check_teacher(label: str, term: LossTerm, teachers: Mapping[str, Any]) -> None:
    if not teachers:
        raise InputError(
            f"{label} needs a teacher, but this training has none",
            where="losses",
            cure="Use the verb distill, or take the term out",
        )
    for name in term.teachers:
        if name != ANCHOR or name in teachers:
            _check_one(label, term, next(iter(teachers)) if name is None else name, teachers)


def _check_one(label: str, term: LossTerm, name: str, teachers: Mapping[str, Any]) -> None:
    if name not in teachers:
        raise InputError(
            f"the loss {term.name!r} names the teacher {name!r}",
            where="losses",
            cure=f"The teachers are: {', '.join(teachers)}",
        )
    if term.loss.inputs == "embeddings" and teachers[name].embedding_size is None:
        raise InputError(
            f"the teacher {name!r} has scores but no embeddings",
            where="losses",
            cure="Use a loss on scores (kl, margin_mse), or give a bi-encoder as teacher",
        )
    if term.learner == "teacher" and not term.loss.teacher and not teachers[name].is_joint:
        raise InputError(
            f"{label} trains the teacher {name!r}, which is frozen",
            where="losses",
            cure="Train it along (--teacher_mode joint, JointTeacher), or take the term out",
        )
    if "scores" in term.loss.inputs and term.candidates not in teachers[name].candidate_sets:
        raise InputError(
            f"the teacher {name!r} cannot score {term.candidates} candidates for {label}",
            where="losses",
            cure=f"Set candidates to one of: {', '.join(teachers[name].candidate_sets)}"
            + ("; or let the model read every batch (--teacher_mode live)" if teachers[name].more_live else ""),
        )


class RetrievalTrainer(BaseTrainer):
    """Contrastive training of any model; also a teacher's warm-up.

    A retriever is trained on the passages of all processes by default, a ranker on the row's own candidates (a
    cross-encoder would have to read every pair).
    """

    _name = "Contrastive training"
    _tags = ("hf_distill", "contrastive")
    teachers: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, model: RetrievalModel, args: RetrievalTrainingArguments, **kwargs: Any):
        self.ranks_pairs = model.representation == "pair"
        self.is_lexical = model.representation == "sparse"
        terms = self.parse_losses(args)
        check_terms(terms, representation=model.representation, teachers=self.teachers)
        check_apart(terms, args.num_negatives)
        if kwargs.get("rows") is not None:
            check_positives(terms, kwargs["rows"])
        self.prepare_model(model, terms, args.seed)
        super().__init__(self.trained_module(model), args, **kwargs)
        if self.is_lexical and self._card == "student":
            self._card, self._tags = "lexical", (*self._tags, "sparse")

    def parse_losses(self, args: RetrievalTrainingArguments) -> dict[str, LossTerm]:
        return parse_terms(self.default_losses()) if args.losses is None else read_losses(args.losses)

    def default_losses(self) -> list[dict[str, Any]]:
        """The terms when `args.losses` names none."""
        contrastive = {"name": "contrastive", "candidates": "own" if self.ranks_pairs else "global"}
        return [contrastive, *self.regulariser()]

    def regulariser(self) -> list[dict[str, Any]]:
        """Of a lexical model, which could not be served if nothing kept it sparse; weighted as LED's is."""
        return [{"name": "flops", "weight": 8e-4}] if self.is_lexical else []

    def prepare_model(self, model: RetrievalModel, terms: Mapping[str, LossTerm], seed: int) -> None:
        """Adds to the model what the terms need beside it; nothing here."""

    def trained_module(self, model: RetrievalModel) -> torch.nn.Module:
        """What is trained: the model, perhaps with another one beside it."""
        return model

    def loss_parts(self, model: RetrievalModel, output: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        student = BatchScores(model, output, batch)
        if self.is_lexical:
            self.note(active_terms(output, batch))
        step, total = self.state.global_step, self.state.max_steps
        return {
            label: self.term_value(term, student) * term.weight_at(step, total) for label, term in self.terms.items()
        }

    @property
    def must_be_finite(self) -> Collection[str]:
        return self.terms if self.is_lexical else ()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "active_terms_query" in logs:
            look_at_sparsity(logs, self.state.global_step)

    def teacher_scores(self, term: LossTerm, student: BatchScores) -> list[torch.Tensor] | None:
        """What the term's teachers say about its candidates; None for a term without a teacher."""
        return None

    def term_value(self, term: LossTerm, student: BatchScores) -> torch.Tensor:
        """The unweighted value of one term; see [`reduce_counted`] for its meaning on several processes."""
        if term.loss.inputs == "representations":
            return sparsity(term, student.output, student.batch)
        target, keep = candidate_layout(student.batch, term.candidates, term.mask_false_negatives)
        scores = student.scores(term.candidates), self.teacher_scores(term, student), target, keep
        return self.reduce_counted(term(*scores), term.counted(*scores), term.candidates)
