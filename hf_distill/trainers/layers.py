"""Which layers of the student follow which layers of the teacher, step by step."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError
from ..losses.combine import LossTerm
from ..models.base import RetrievalModel
from ..models.student import layer_positions
from ..teachers.base import Teacher


if TYPE_CHECKING:
    from .retrieval import BatchScores

PAIRINGS = ("random", "last", "skip", "even")
# As many as the original trains on passages.
_USUAL_PAIRS = 5

Pairs = tuple[tuple[int, ...], tuple[int, ...]]
"""Layers of the student and of the teacher, as many of each, numbered from 1 and paired in order."""


class LayerPairing:
    """Pairs of layers, as a function of the optimiser step alone.

    Sun et al., "LEAD: Liberal Feature-based Distillation for Dense Retrieval" (2024, https://arxiv.org/abs/2212.05225):
    `random` draws K layers of each model without replacement and pairs them in ascending order, anew every so many
    steps; `last` takes each model's last K; `skip` the student's last K and the teacher's layers 1, 1 + s, 1 + 2s, …
    with s the ratio of the depths; `even` evenly spaced ones, the first and the last among them. `"2:4,6:12"` names
    pairs of a student's and a teacher's layer.

    The draws are those of the original: Python's generator, the student's layers first. It belongs to this object and
    is wound to the step's draw, so all processes agree, and so do a run and its continuation from a checkpoint, which
    holds the seed and the step.

    Args:
        pairing: One of the strategies, or explicit pairs.
        student_layers: How many layers the student has.
        teacher_layers: How many the teacher has.
        count: K; by default 5, or all layers of a smaller model.
        resample_every: Optimiser steps between two draws.
        seed: Of the draws.

    Raises:
        InputError: For layers that do not exist.
    """

    def __init__(
        self,
        pairing: str,
        student_layers: int,
        teacher_layers: int,
        count: int | None = None,
        resample_every: int = 10,
        seed: int = 0,
    ):
        self.depths, self.resample_every, self.seed = (student_layers, teacher_layers), resample_every, seed
        if resample_every < 1:
            raise InputError(
                f"layers cannot be drawn every {resample_every} steps",
                where="layer_resample_every",
                cure="Use 1 or more",
            )
        self.pairing = pairing
        self.fixed = self._explicit(pairing) if pairing not in PAIRINGS else None
        smaller = min(self.depths)
        self.count = count if count is not None else min(_USUAL_PAIRS, smaller)
        if self.fixed is None and not 1 <= self.count <= smaller:
            raise InputError(
                f"{self.count} pairs of layers, but the student has {student_layers} layers and the teacher "
                f"{teacher_layers}",
                where="num_layer_pairs",
                cure=f"Use 1 to {smaller}",
            )
        if self.fixed is not None and count not in (None, len(self.fixed[0])):
            raise InputError(
                f"{count} pairs are asked for, but {len(self.fixed[0])} are named",
                where="num_layer_pairs",
                cure="Leave it out",
            )
        self._generator = random.Random(seed)
        self._draws = 0
        self._current: Pairs = ((), ())

    def at(self, step: int) -> Pairs:
        """The pairs of the optimiser step `step`, counted from 0."""
        if self.fixed is not None:
            return self.fixed
        if self.pairing != "random":
            return self._spaced()
        wanted = step // self.resample_every + 1
        if wanted < self._draws:
            self._generator, self._draws = random.Random(self.seed), 0
        while self._draws < wanted:
            student, teacher = (sorted(self._generator.sample(range(depth), self.count)) for depth in self.depths)
            self._current = (_numbers(student), _numbers(teacher))
            self._draws += 1
        return self._current

    def _spaced(self) -> Pairs:
        count, (student, teacher) = self.count, self.depths
        if self.pairing == "even":
            return tuple(_numbers(layer_positions(count, depth, "even")) for depth in (student, teacher))
        last = range(student - count, student)
        if self.pairing == "last":
            return _numbers(last), _numbers(range(teacher - count, teacher))
        stride = max(1, teacher // student)
        return _numbers(last), _numbers(range(0, stride * count, stride))

    def _explicit(self, text: str) -> Pairs:
        try:
            pairs = [tuple(int(number) for number in pair.split(":")) for pair in text.split(",")]
            student, teacher = zip(*pairs, strict=True)
        except ValueError:
            raise InputError(
                f"{text!r} is no pairing of layers",
                where="layer_pairing",
                cure=f"Choose {', '.join(PAIRINGS)}, or pairs student:teacher such as 2:4,6:12",
            ) from None
        for who, numbers, depth in zip(("student", "teacher"), (student, teacher), self.depths):
            wrong = [number for number in numbers if not 1 <= number <= depth]
            if wrong:
                raise InputError(
                    f"the {who} has the layers 1 to {depth}, not {wrong[0]}",
                    where=f"layer_pairing {text!r}",
                    cure="Choose among these; layers are numbered from 1, and embeddings are no layer",
                )
        return student, teacher


def _numbers(positions: Any) -> tuple[int, ...]:
    """Positions from 0 as numbers from 1."""
    return tuple(position + 1 for position in positions)


class LayerTerms:
    """The loss terms that compare layers: which layers each step needs, and their values.

    Args:
        terms: All loss terms by label.
        teacher_of: The teacher of a term.
        model: The student.
        args: Of [`DistillOptions`]: `layer_pairing`, `num_layer_pairs`, `layer_resample_every`, and the seed.

    Raises:
        InputError: For layers that the student or a teacher does not have.
    """

    def __init__(
        self,
        terms: Mapping[str, LossTerm],
        teacher_of: Callable[[LossTerm], Teacher],
        model: RetrievalModel,
        args: Any,
    ):
        teachers = {teacher_of(term).name: teacher_of(term) for term in terms.values() if compares_layers(term)}
        for teacher in teachers.values():
            if teacher.num_layers is None:
                teacher.check_layers([1])  # says what would do
        self.pairings = {
            name: LayerPairing(
                args.layer_pairing,
                model.num_layers,
                teacher.num_layers,
                args.num_layer_pairs,
                args.layer_resample_every,
                args.seed,
            )
            for name, teacher in teachers.items()
        }
        self.pairs: dict[str, Pairs] = {}
        compared = [teacher_of(term) for term in terms.values() if term.loss.inputs == "layer_tokens"]
        self.needs_tokens = bool(compared)
        for teacher in compared:
            _check_same_tokens(model, teacher)
        for name, teacher in teachers.items():
            teacher.check_layers(self.ever_of_teacher(name))

    def _possible(self, name: str) -> list[Pairs]:
        """The pairs that may come up: all of a fixed pairing; of a random one, every layer."""
        pairing = self.pairings[name]
        if pairing.pairing != "random":
            return [pairing.at(0)]
        return [tuple(tuple(range(1, depth + 1)) for depth in pairing.depths)]

    def ever_of_teacher(self, name: str) -> tuple[int, ...]:
        """The layers of a teacher that some step may need, ascending."""
        return tuple(sorted({number for pairs in self._possible(name) for number in pairs[1]}))

    def begin_step(self, step: int) -> None:
        """Chooses the pairs of an optimiser step."""
        self.pairs = {name: pairing.at(step) for name, pairing in self.pairings.items()}

    @property
    def of_student(self) -> tuple[int, ...]:
        """The student's layers that this step needs, ascending."""
        return tuple(sorted({number for student, _ in self.pairs.values() for number in student}))

    def of_teacher(self, name: str) -> tuple[int, ...]:
        """The layers of a teacher that this step needs, ascending."""
        return self.pairs[name][1] if name in self.pairs else ()

    def scores(self, term: LossTerm, student: BatchScores, teacher: Teacher) -> tuple[torch.Tensor, torch.Tensor]:
        """The paired layers' scores of student and teacher, `[K, Q, C]` each."""
        mine, theirs = self.pairs[teacher.name]
        chosen = [self.of_student.index(number) for number in mine]
        ours = student.layer_scores(term.candidates)[chosen]
        return ours, teacher.layer_scores(student.batch, theirs, term.candidates)

    def maps(self, term: LossTerm, student: BatchScores, teacher: Teacher) -> tuple[torch.Tensor, torch.Tensor]:
        """The paired layers' interaction maps of student and teacher, `[K, Q, C, Lq, Ld]` each."""
        mine, theirs = self.pairs[teacher.name]
        ours = student.model.layer_tokens(student.output, student.batch)
        other = teacher.layer_tokens(student.batch)
        chosen = [self.of_student.index(number) for number in mine]
        return ours.maps(ours, term.candidates)[chosen], other.maps(ours, term.candidates)


def compares_layers(term: LossTerm) -> bool:
    """Whether a term needs single layers of student and teacher."""
    return term.loss.inputs in ("layer_scores", "layer_tokens")


# What two models must have in common so that their tokens can be compared one by one.
_READING = (
    "tokenizer",
    "padding_side",
    "query_prompt",
    "passage_prompt",
    "query_length",
    "passage_length",
    "template",
)


def _check_same_tokens(model: RetrievalModel, teacher: Teacher) -> None:
    if teacher.processor is None:
        raise InputError(
            f"the teacher {teacher.name!r} has no tokens to compare, only stored scores",
            where="losses",
            cure="Give the model as a live teacher (--teacher_mode live), or compare rankings (layer_alignment)",
        )
    ours, theirs = model.processor().settings(), teacher.processor.settings()
    if "cross" in (ours["kind"], theirs["kind"]):
        raise InputError(
            "a cross-encoder has no token vectors of queries and passages apart",
            where="losses",
            cure="Compare rankings of layers instead (layer_alignment), which needs no common tokens",
        )
    differing = [name for name in _READING if ours[name] != theirs[name]]
    if differing:
        raise InputError(
            f"student and the teacher {teacher.name!r} read different tokens ({', '.join(differing)} differ), which "
            "cannot be compared one by one",
            where="losses",
            cure="Compare rankings of layers instead (layer_alignment), or give both the same tokenizer and lengths",
        )
