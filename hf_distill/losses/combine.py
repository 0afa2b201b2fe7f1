"""Several losses, each with its weight, teacher and candidates, and their sum."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .calibration import CALIBRATIONS, calibrate
from .contrastive import contrastive_loss
from .dkd import dkd_loss
from .embedding_mse import embedding_mse_loss
from .flops import sparsity_loss
from .forgetting import lwf_loss
from .interaction_maps import interaction_map_loss
from .kl import kl_loss
from .layer_alignment import layer_alignment_loss
from .listwise import candidate_pairs, listnet_loss, pairwise_margin_mse_loss
from .logit_mse import logit_mse_loss
from .margin_mse import margin_mse_loss
from .probability import probability_loss
from .rank_consistency import ordered_pairs, rank_consistency_loss
from .several_teachers import mean_teacher


CANDIDATES = ("own", "in_batch", "global")
# The teacher of losses that hold the student near what it was when its training began.
ANCHOR = "anchor"
_GIVEN = {"scores", "student_scores", "teacher_scores", "anchor_scores", "student", "teacher", "representations"}
_GIVEN |= {"student_maps", "teacher_maps", "target", "mask", "reduce"}
_GIVEN |= {"query", "passage", "query_counts", "passage_counts", "negative_counts"}


@dataclass(frozen=True)
class Loss:
    """An entry of the registry.

    Args:
        function: The loss.
        inputs: What it compares: `scores` [Q, C], `layer_scores` [K, Q, C],
            `layer_tokens` [T, K, L, H], `embeddings` [T, D] or the
            `representations` [R, V] of lexical models.
        teacher: Whether it needs a teacher.
        target: Whether it is empty for queries without a known positive.
        candidates: The candidate sets that it can take, its default first.
        fewest: Queries with fewer candidates left by the mask are not part of its mean.
        anchor: Whether its teacher is always the student as it was at the start.
        pairs: For a mean over pairs of candidates instead of queries: which pairs count, Bool[Q, P], from the loss's
            own arguments.
    """

    function: Callable[..., Tensor]
    inputs: str = "scores"
    teacher: bool = True
    target: bool = False
    candidates: tuple[str, ...] = CANDIDATES
    fewest: int = 1
    anchor: bool = False
    pairs: Callable[..., Tensor] | None = None

    @property
    def options(self) -> list[str]:
        """Names of the arguments that a configuration may set."""
        return [name for name in inspect.signature(self.function).parameters if name not in _GIVEN]


LOSSES: dict[str, Loss] = {
    "contrastive": Loss(contrastive_loss, teacher=False, target=True, candidates=("global", "in_batch", "own")),
    "kl": Loss(kl_loss),
    "lwf": Loss(lwf_loss, anchor=True),
    "logit_mse": Loss(logit_mse_loss),
    "probability": Loss(probability_loss),
    "margin_mse": Loss(margin_mse_loss, fewest=2),
    "listnet": Loss(listnet_loss),
    "pairwise_margin_mse": Loss(pairwise_margin_mse_loss, candidates=("own",), pairs=candidate_pairs),
    "embedding_mse": Loss(embedding_mse_loss, inputs="embeddings", candidates=("own",)),
    "dkd": Loss(dkd_loss, target=True),
    "rank_consistency": Loss(rank_consistency_loss, candidates=("own",), pairs=ordered_pairs),
    "layer_alignment": Loss(layer_alignment_loss, inputs="layer_scores"),
    "interaction_maps": Loss(interaction_map_loss, inputs="layer_tokens", candidates=("in_batch", "own")),
    "flops": Loss(sparsity_loss, inputs="representations", teacher=False, candidates=("own",)),
}


@dataclass
class LossTerm:
    """One loss of a training objective.

    Args:
        name: A key of `LOSSES`.
        weight: Its factor in the sum.
        candidates: `own` (the row's passages), `in_batch` (all passages of the process) or `global` (of all
            processes); by default the usual set of the loss.
        teacher: Which teacher it follows: a column of scores or the name of a live teacher; None is the primary one.
            Several names mean the mean of these teachers, see [`mean_teacher`].
        learner: `student`, or `teacher` for the other way round: the contrastive loss of a teacher that is trained
            along, or the divergence of the teacher from the student's ranking (KL(student || teacher)).
        calibration: How the teacher's scores are scaled first, see [`calibrate`].
        calibration_temperature: The divisor of the calibration `temperature`.
        calibrate_student: Scale the student's scores in the same way.
        mask_false_negatives: Leave known positives and repeated passages out of the candidates.
        ramp_steps: The weight grows with the square of the step from 0 to its full size at this step (below 1: at
            this share of all steps), as SPLADE's regulariser does; 0 for a constant weight.
        options: Further arguments of the loss, such as `temperature`.

    Raises:
        InputError: For anything unknown or out of range, naming what can be chosen.
    """

    name: str
    weight: float = 1.0
    candidates: str | None = None
    teacher: str | list[str] | None = None
    learner: str = "student"
    calibration: str = "none"
    calibration_temperature: float = 1.0
    calibrate_student: bool = False
    mask_false_negatives: bool = True
    ramp_steps: float = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        where = f"loss {self.name!r}"
        if self.name not in LOSSES:
            raise InputError(f"unknown loss {self.name!r}", cure=f"Choose one of {', '.join(LOSSES)}")
        if not _is_number(self.weight) or self.weight < 0:
            raise InputError(f"the weight {self.weight!r} is not a number of at least 0", where=where)
        if self.candidates is None:
            self.candidates = self.loss.candidates[0]
        if self.candidates not in self.loss.candidates:
            raise InputError(
                f"cannot take the candidates {self.candidates!r}",
                where=where,
                cure=f"Choose one of {', '.join(self.loss.candidates)}",
            )
        if self.calibration not in CALIBRATIONS:
            raise InputError(
                f"unknown calibration {self.calibration!r}",
                where=where,
                cure=f"Choose one of {', '.join(CALIBRATIONS)}",
            )
        if self.loss.anchor:
            if self.teacher not in (None, ANCHOR):
                raise InputError("has the student's own start as its teacher", where=where, cure="Name no teacher")
            self.teacher = ANCHOR
        if isinstance(self.teacher, (list, tuple)):
            self.teacher = list(self.teacher)
            if not self.teacher or self.loss.inputs != "scores":
                cure = "Name one teacher or more; several only for a loss on scores"
                raise InputError(f"cannot follow the teachers {self.teacher!r}", where=where, cure=cure)
        if self.learner not in ("student", "teacher"):
            raise InputError(f"learner is {self.learner!r}", where=where, cure="Choose student or teacher")
        if self.learner == "teacher" and (self.loss.inputs != "scores" or len(self.teachers) > 1):
            cure = "Give one teacher, and a loss on scores"
            raise InputError("cannot be turned round for a learning teacher", where=where, cure=cure)
        if not self.needs_teacher and (self.teacher is not None or self.calibration != "none"):
            raise InputError("has no teacher to name or to calibrate", where=where, cure="Remove these settings")
        if self.calibration != "none" and "scores" not in self.loss.inputs:
            raise InputError(f"compares {self.loss.inputs}, which are not calibrated", where=where)
        for option in ("calibration_temperature", "temperature", "layer_temperature"):
            value = self.options.get(option, 1.0) if option != "calibration_temperature" else getattr(self, option)
            if not _is_number(value) or value <= 0:
                raise InputError(f"{option} is {value!r}", where=where, cure="Give a positive number")
        if not _is_number(self.ramp_steps) or self.ramp_steps < 0:
            raise InputError(f"ramp_steps is {self.ramp_steps!r}", where=where, cure="Give a number of at least 0")
        if self.options.get("of", "both") not in ("both", "passage", "query"):
            raise InputError(f"of is {self.options['of']!r}", where=where, cure="Choose both, passage or query")
        unknown = [option for option in self.options if option not in self.loss.options]
        if unknown:
            known = ", ".join(self.loss.options) or "none"
            raise InputError(f"unknown option {', '.join(unknown)}", where=where, cure=f"Its options are: {known}")

    @property
    def loss(self) -> Loss:
        """The registry's entry."""
        return LOSSES[self.name]

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher's scores enter it."""
        return self.loss.teacher or self.learner == "teacher"

    @property
    def teachers(self) -> list[str | None]:
        """The teachers that it follows; None stands for the primary one."""
        return self.teacher if isinstance(self.teacher, list) else [self.teacher]

    def weight_at(self, step: int, total: int) -> float:
        """The weight at an optimiser step, counted from 0, of a training of `total` steps."""
        ramp = self.ramp_steps * total if self.ramp_steps < 1 else self.ramp_steps
        return self.weight * min(1.0, step / ramp) ** 2 if ramp else self.weight

    def __call__(
        self,
        student_scores: Tensor,
        teacher_scores: Tensor | Sequence[Tensor] | None,
        target: Tensor,
        mask: Tensor | None = None,
        **given: Any,
    ) -> Tensor:
        """The unweighted loss on score matrices.

        Args:
            student_scores: Float[Q, C] (`layer_alignment`: [K, Q, C]).
            teacher_scores: Of the same shape, before calibration; several for the mean of several teachers; None for
                losses without a teacher.
            target: Long[Q], the positive's column or -1.
            mask: Bool[Q, C], True keeps a candidate.
            given: Further arguments of the loss that are no options, such as `reduce`.

        Raises:
            InputError: If the loss does not compare scores, or its teacher is missing.
        """
        if "scores" not in self.loss.inputs:
            raise InputError(f"compares {self.loss.inputs}, not scores", where=f"loss {self.name!r}")
        if self.needs_teacher and teacher_scores is None:
            raise InputError("needs a teacher's scores", where=f"loss {self.name!r}", cure="Name a teacher")
        compared = self._compared(student_scores, teacher_scores, mask)
        return self.loss.function(*compared, **self._arguments(target, mask), **given)

    def counted(
        self,
        student_scores: Tensor,
        teacher_scores: Tensor | Sequence[Tensor] | None,
        target: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What the mean over a batch is a mean of: Bool[Q], the queries that count, or Bool[Q, P], the pairs.

        Where batches have different numbers of these, the loss of all of them together is the mean weighted by them.

        Args:
            student_scores: As for the loss itself, and so the others.
            teacher_scores: See there.
            target: See there.
            mask: See there.
        """
        if self.loss.pairs is not None:
            compared = self._compared(student_scores, teacher_scores, mask)
            return self.loss.pairs(*compared, **self._arguments(target, mask))
        rows = target >= 0 if self.loss.target else torch.ones_like(target, dtype=torch.bool)
        return rows if mask is None else rows & (mask.sum(1) >= self.loss.fewest)

    def _arguments(self, target: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """What the loss is given beside scores."""
        takes_target = "target" in inspect.signature(self.loss.function).parameters
        return dict(self.options, mask=mask, **({"target": target} if takes_target else {}))

    def _compared(
        self, student_scores: Tensor, teacher_scores: Tensor | Sequence[Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The scores that the loss is given: turned round for a learning teacher, and calibrated."""
        if self.learner == "teacher":
            (taught,) = [teacher_scores] if isinstance(teacher_scores, Tensor) else teacher_scores
            student_scores, teacher_scores = taught, student_scores
        if self.calibrate_student:
            student_scores = calibrate(
                student_scores, self.calibration, mask, temperature=self.calibration_temperature
            )
        if not self.loss.teacher:
            return (student_scores,)
        several = [teacher_scores] if isinstance(teacher_scores, Tensor) else teacher_scores
        several = [calibrate(one, self.calibration, mask, temperature=self.calibration_temperature) for one in several]
        if len(several) > 1:
            default = inspect.signature(self.loss.function).parameters.get("temperature")
            temperature = self.options.get("temperature", default.default) if default is not None else None
            several = [mean_teacher(several, temperature, mask)]
        return student_scores, several[0]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def parse_terms(terms: Iterable[str | Mapping[str, Any] | LossTerm]) -> dict[str, LossTerm]:
    """Loss terms from a configuration.

    Args:
        terms: Each a name (`"kl"`), a name with its weight (`"kl:0.5"`), a JSON object as text, or a mapping with the
            fields of [`LossTerm`], in which options of the loss may stand beside them
            (`{"name": "kl", "weight": 0.9, "temperature": 4}`).

    Returns:
        Terms by a label for logs: the name, followed by the teacher or a number where a name occurs more than once.

    Raises:
        InputError: For malformed, unknown or repeated terms, or if there is none.
    """
    if isinstance(terms, (str, Mapping)):
        terms = [terms]
    parsed = [_parse(term, position) for position, term in enumerate(terms, start=1)]
    if not parsed:
        raise InputError("no loss is given", cure=f"Name at least one of {', '.join(LOSSES)}")
    names = [term.name if term.learner == "student" else f"teacher_{term.name}" for term in parsed]
    labelled: dict[str, LossTerm] = {}
    for name, term in zip(names, parsed):
        label = name
        if names.count(name) > 1 and term.teacher is not None:
            label = f"{name}_{'_'.join(term.teachers)}"
        number = 2
        while label in labelled:
            label = f"{label.rsplit('#', 1)[0]}#{number}"
            number += 1
        labelled[label] = term
    return labelled


def _parse(term: str | Mapping[str, Any] | LossTerm, position: int) -> LossTerm:
    where = f"loss {position}"
    if isinstance(term, LossTerm):
        return term
    if isinstance(term, str) and term.lstrip().startswith("{"):
        try:
            term = json.loads(term)
        except json.JSONDecodeError as error:
            raise InputError(f"{term!r} is not JSON ({error})", where=where) from error
    if isinstance(term, str):
        name, colon, weight = term.partition(":")
        try:
            term = {"name": name.strip(), "weight": float(weight) if colon else 1.0}
        except ValueError as error:
            raise InputError(
                f"{weight!r} in {term!r} is not a weight", where=where, cure="Write for example 'kl:0.5'"
            ) from error
    if not isinstance(term, Mapping) or "name" not in term:
        raise InputError(
            f"{term!r} names no loss", where=where, cure="Write for example 'kl' or {name: kl, weight: 1}"
        )
    known = {entry.name for entry in fields(LossTerm)}
    settings = {key: value for key, value in term.items() if key in known}
    settings["options"] = {**(term.get("options") or {}), **{k: v for k, v in term.items() if k not in known}}
    return LossTerm(**settings)


def combine(parts: Mapping[str, Tensor], weights: Mapping[str, float] | Sequence[float] | None = None) -> Tensor:
    """The weighted sum of scalar losses.

    Args:
        parts: Unweighted losses by label.
        weights: By the same labels, or in the same order; all 1 by default. Parts of weight 0 are left out, so that
            they may be undefined.

    Returns:
        A scalar.

    Raises:
        InputError: If the labels differ.
    """
    if weights is None:
        weights = dict.fromkeys(parts, 1.0)
    elif not isinstance(weights, Mapping):
        weights = dict(zip(parts, weights, strict=True))
    if set(parts) != set(weights):
        raise InputError(f"weights for {sorted(weights)} do not fit the losses {sorted(parts)}")
    used = [parts[label] * weights[label] for label in parts if weights[label] != 0]
    if not used:
        raise InputError("every loss has weight 0", cure="Give at least one a positive weight")
    return torch.stack(used).sum()
