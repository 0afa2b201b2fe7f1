"""Training of retrievers and rankers on labelled rows, without a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import InputError
from ..losses.combine import LossTerm
from ..models.base import RetrievalModel
from ..models.candidates import arrange, candidate_layout, candidate_scores
from ..models.cross_encoder import CrossEncoderRanker
from .arguments import RetrievalTrainingArguments
from .base import BaseTrainer


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

    def scores(self, candidates: str) -> torch.Tensor:
        """The scores `[Q, C]` of a set of candidates, float32."""
        if candidates not in self._scores:
            if isinstance(self.model, CrossEncoderRanker):
                scores = self.output.view(self.batch["passage_ids"].shape)
            else:
                query, passage = arrange(self.output.query, self.output.passage, self.batch)
                scores = candidate_scores(self.model, query, passage, candidates)
            self._scores[candidates] = scores
        return self._scores[candidates]


class RetrievalTrainer(BaseTrainer):
    """Contrastive training of a [`DenseRetriever`] or a [`CrossEncoderRanker`]; also a teacher's warm-up.

    A retriever is trained on the passages of all processes by default, a ranker on the row's own candidates (a
    cross-encoder would have to read every pair).
    """

    _name = "Contrastive training"
    _tags = ("hf_distill", "contrastive")

    def __init__(self, model: RetrievalModel, args: RetrievalTrainingArguments, **kwargs: Any):
        self.ranks_pairs = isinstance(model, CrossEncoderRanker)
        for label, term in self.parse_losses(args).items():
            self.check_term(label, term)
        super().__init__(model, args, **kwargs)

    def default_losses(self) -> list[dict[str, Any]]:
        return [{"name": "contrastive", "candidates": "own" if self.ranks_pairs else "global"}]

    def check_term(self, label: str, term: LossTerm) -> None:
        """Raises [`InputError`] for a term that this training cannot compute."""
        if self.ranks_pairs and term.candidates != "own":
            raise InputError(
                f"{label} compares {term.candidates} candidates, but a cross-encoder scores pairs",
                where="losses",
                cure="Set candidates: own",
            )
        if term.loss.teacher:
            raise InputError(
                f"{label} needs a teacher, but this training has none",
                where="losses",
                cure="Use the verb distill, or take the term out",
            )

    def loss_parts(self, model: RetrievalModel, output: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        student = BatchScores(model, output, batch)
        return {label: self.term_value(term, student) * term.weight for label, term in self.terms.items()}

    def teacher_scores(self, term: LossTerm, student: BatchScores) -> torch.Tensor | None:
        """What the term's teacher says about its candidates; None for a term without a teacher."""
        return None

    def term_value(self, term: LossTerm, student: BatchScores) -> torch.Tensor:
        """The unweighted value of one term; see [`reduce_rows`] for its meaning on several processes."""
        target, keep = candidate_layout(student.batch, term.candidates, term.mask_false_negatives)
        value = term(student.scores(term.candidates), self.teacher_scores(term, student), target, keep)
        counted = target >= 0 if term.loss.target else torch.ones_like(target, dtype=torch.bool)
        return self.reduce_rows(value, counted, term.candidates)
