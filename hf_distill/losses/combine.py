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

from hf_distill.errors import InputError
from hf_distill.losses.calibration import CALIBRATIONS, calibrate
from hf_distill.losses.contrastive import contrastive_loss
from hf_distill.losses.dkd import dkd_loss
from hf_distill.losses.embedding_mse import embedding_mse_loss
from hf_distill.losses.flops import flops_loss
from hf_distill.losses.kl import kl_loss
from hf_distill.losses.layer_alignment import layer_alignment_loss
from hf_distill.losses.margin_mse import margin_mse_loss
from hf_distill.losses.rank_consistency import rank_consistency_loss


CANDIDATES = ("own", "in_batch", "global")
_GIVEN = {"scores", "student_scores", "teacher_scores", "student", "teacher", "representations"}
_GIVEN |= {"target", "mask", "reduce"}


@dataclass(frozen=True)
class Loss:
    """An entry of the registry.

    Args:
        function: The loss.
        inputs: What it compares: `scores` [Q, C], `layer_scores` [K, Q, C], `embeddings` [T, D] or
            `representations` [R, V].
        teacher: Whether it needs a teacher.
        target: Whether it is empty for queries without a known positive.
        candidates: The candidate sets that it can take, its default first.
        fewest: Queries with fewer candidates left by the mask are not part of its mean.
    """

    function: Callable[..., Tensor]
    inputs: str = "scores"
    teacher: bool = True
    target: bool = False
    candidates: tuple[str, ...] = CANDIDATES
    fewest: int = 1

    @property
    def options(self) -> list[str]:
        """Names of the arguments that a configuration may set."""
        return [name for name in inspect.signature(self.function).parameters if name not in _GIVEN]


LOSSES: dict[str, Loss] = {
    "contrastive": Loss(contrastive_loss, teacher=False, target=True, candidates=("global", "in_batch", "own")),
    "kl": Loss(kl_loss),
    "margin_mse": Loss(margin_mse_loss, fewest=2),
    "embedding_mse": Loss(embedding_mse_loss, inputs="embeddings", candidates=("own",)),
    "dkd": Loss(dkd_loss, target=True),
    "rank_consistency": Loss(rank_consistency_loss, candidates=("own",)),
    "layer_alignment": Loss(layer_alignment_loss, inputs="layer_scores"),
    "flops": Loss(flops_loss, inputs="representations", teacher=False, candidates=("own",)),
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
        calibration: How the teacher's scores are scaled first, see [`calibrate`].
        calibration_temperature: The divisor of the calibration `temperature`.
        calibrate_student: Scale the student's scores in the same way.
        mask_false_negatives: Leave known positives and repeated passages out of the candidates.
        options: Further arguments of the loss, such as `temperature`.

    Raises:
        InputError: For anything unknown or out of range, naming what can be chosen.
    """

    name: str
    weight: float = 1.0
    candidates: str | None = None
    teacher: str | None = None
    calibration: str = "none"
    calibration_temperature: float = 1.0
    calibrate_student: bool = False
    mask_false_negatives: bool = True
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
        if not self.loss.teacher and (self.teacher is not None or self.calibration != "none"):
            raise InputError("has no teacher to name or to calibrate", where=where, cure="Remove these settings")
        if self.calibration != "none" and "scores" not in self.loss.inputs:
            raise InputError(f"compares {self.loss.inputs}, which are not calibrated", where=where)
        for option in ("calibration_temperature", "temperature", "layer_temperature"):
            value = self.options.get(option, 1.0) if option != "calibration_temperature" else getattr(self, option)
            if not _is_number(value) or value <= 0:
                raise InputError(f"{option} is {value!r}", where=where, cure="Give a positive number")
        unknown = [option for option in self.options if option not in self.loss.options]
        if unknown:
            known = ", ".join(self.loss.options) or "none"
            raise InputError(f"unknown option {', '.join(unknown)}", where=where, cure=f"Its options are: {known}")

    @property
    def loss(self) -> Loss:
        """The registry's entry."""
        return LOSSES[self.name]

    def __call__(
        self, student_scores: Tensor, teacher_scores: Tensor | None, target: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The unweighted loss on score matrices.

        Args:
            student_scores: Float[Q, C] (`layer_alignment`: [K, Q, C]).
            teacher_scores: Of the same shape, before calibration; None for losses without a teacher.
            target: Long[Q], the positive's column or -1.
            mask: Bool[Q, C], True keeps a candidate.

        Raises:
            InputError: If the loss does not compare scores, or its teacher is missing.
        """
        if "scores" not in self.loss.inputs:
            raise InputError(f"compares {self.loss.inputs}, not scores", where=f"loss {self.name!r}")
        if self.calibrate_student:
            student_scores = calibrate(
                student_scores, self.calibration, mask, temperature=self.calibration_temperature
            )
        arguments: dict[str, Any] = dict(self.options, mask=mask)
        if "target" in inspect.signature(self.loss.function).parameters:
            arguments["target"] = target
        if not self.loss.teacher:
            return self.loss.function(student_scores, **arguments)
        if teacher_scores is None:
            raise InputError("needs a teacher's scores", where=f"loss {self.name!r}", cure="Name a teacher")
        teacher_scores = calibrate(teacher_scores, self.calibration, mask, temperature=self.calibration_temperature)
        return self.loss.function(student_scores, teacher_scores, **arguments)


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
    names = [term.name for term in parsed]
    labelled: dict[str, LossTerm] = {}
    for term in parsed:
        label = term.name
        if names.count(term.name) > 1 and term.teacher is not None:
            label = f"{term.name}_{term.teacher}"
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
