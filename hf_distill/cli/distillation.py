"""The steps of a distillation, from opening teachers and student to the table of figures."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import duration, get_logger, print_table
from ..errors import InputError
from . import folders, publishing, row_sets, steps
from .options import DataOptions, IndexOptions, ModelOptions, RowOptions, StudentOptions
from .reporting import Report
from .score import layer_column


if TYPE_CHECKING:
    from ..data import RowSet
    from ..models.base import RetrievalModel
    from ..teachers import Teacher
    from ..trainers import DistillTrainer
    from ..trainers.layers import LayerTerms

logger = get_logger(__name__)


@dataclass
class TeacherSpec:
    """A teacher as it was asked for: a model, or a column of the rows."""

    name: str
    origin: str
    model: RetrievalModel | None = None
    column: str | None = None
    mode: str = "cached"
    teaches_layers: bool = False
    needs_vectors: bool = False

    @property
    def is_ranker(self) -> bool:
        return self.model is not None and self.model.representation == "pair"

    @property
    def is_joint(self) -> bool:
        """Whether it is trained along."""
        return self.mode == "joint" and self.model is not None

    @property
    def in_rows(self) -> bool:
        """Whether its scores are columns of the row set; those of a bi-encoder are made from cached vectors else.

        Its layers' vectors take the room of as many embeddings, so they are cached only for what columns cannot give.
        """
        kinds = ("pair", "tokens")
        return self.model is None or (
            self.mode == "cached"
            and (self.model.representation in kinds or (self.teaches_layers and not self.needs_vectors))
        )

    @property
    def more_live(self) -> bool:
        """See [`Teacher`]."""
        return self.in_rows and not self.is_ranker

    @property
    def candidate_sets(self) -> tuple[str, ...]:
        """The candidates that it can score, see [`Teacher`]."""
        return ("own",) if self.in_rows else self.model.candidate_sets

    @property
    def embedding_size(self) -> int | None:
        """Width of its embeddings; None if it has none."""
        return None if self.model is None else self.model.embedding_size

    @property
    def num_layers(self) -> int | None:
        """How many layers it has; None where it is only a column."""
        return None if self.model is None else self.model.num_layers

    @property
    def processor(self) -> Any:
        """How it reads text while the student is trained; None if it does not then."""
        return None if self.mode == "cached" else self.model.processor()

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raises [`InputError`] for layers that the model does not have; a column is looked at later."""
        if self.model is not None:
            self.model.check_layers(layers)


class Distillation:
    """The steps of one distillation, in the order in which `run` takes them."""

    def __init__(
        self,
        data_options: DataOptions,
        options: StudentOptions,
        row_options: RowOptions,
        model_options: ModelOptions,
        encode_options: IndexOptions,
        args: Any,
    ):
        self.options, self.row_options, self.encode_options, self.args = options, row_options, encode_options, args
        self.data = steps.Data.open(data_options)
        self.encode = steps.encode_settings(encode_options, data_options)
        self.teachers = [self._open_teacher(number, origin) for number, origin in enumerate(options.teacher)]
        if any(spec.is_joint for spec in self.teachers):
            self._check_joint()
        self.student = self._open_student(steps.model_overrides(model_options))
        self._check_layers()
        steps.check_training(
            self.data,
            row_options,
            args,
            self.student,
            index=encode_options.index,
            teachers={spec.name: spec for spec in self.teachers},
        )
        if row_options.streaming and options.teacher_mode == "cached":
            self._check_streamed_teachers()
        settings = folders.settings_of(
            data_options,
            options,
            row_options,
            model_options,
            encode_options,
            args,
            data_fingerprint=self.data.collection.fingerprints,
            rows_fingerprint=row_sets.rows_fingerprint(self.data, row_options),
            student_weights=self.student.weights_fingerprint(),
            teacher_weights=[spec.model.weights_fingerprint() if spec.model else None for spec in self.teachers],
        )
        self.settings = settings
        self.row_source = self._row_source()
        self.folder = Path(args.output_dir)
        self.report = Report.of_training(self.data, self.encode, args, encode_options.index)

    # ---- Opening ----
    def _open_teacher(self, number: int, origin: str) -> TeacherSpec:
        from ..models import load_model

        name = "teacher" if number == 0 else f"teacher_{number + 1}"
        if origin.startswith("column:"):
            return TeacherSpec(name, origin, column=origin.removeprefix("column:"))
        revision = self.options.teacher_revision if number == 0 else None
        return TeacherSpec(name, origin, load_model(origin, revision=revision), mode=self.options.teacher_mode)

    def _check_joint(self) -> None:
        """Raises [`InputError`] for wishes that a teacher that is trained along cannot meet."""
        from ..trainers.joint import joint_schedules

        if self.options.teacher_dtype != "auto":
            raise InputError(
                f"the teacher is to run in {self.options.teacher_dtype}, but it is trained along with the student, in "
                "one precision",
                where="--teacher_dtype",
                cure="Leave it out (--bf16 true trains both in bfloat16 arithmetic), or freeze the teacher with "
                "--teacher_mode live or cached",
            )
        joint_schedules(self.args, 1)

    def _check_layers(self) -> None:
        """Notes the teachers whose layers teach; refuses layers that are not there before anything is begun."""
        from ..losses.combine import parse_terms
        from ..trainers.base import read_losses
        from ..trainers.layers import compares_layers
        from ..trainers.methods import method_losses

        args, primary = self.args, self.teachers[0]
        if args.losses is not None:
            terms = read_losses(args.losses)
        else:
            terms = parse_terms(method_losses(args.method or ("lead" if primary.is_joint else "response"), "own"))
        by_name = {None: primary, **{spec.name: spec for spec in self.teachers}}
        self.layer_terms = {
            label: term for label, term in terms.items() if compares_layers(term) and term.teacher in by_name
        }
        for term in self.layer_terms.values():
            by_name[term.teacher].teaches_layers = True
        for term in terms.values():
            if term.needs_teacher and (term.candidates != "own" or term.loss.inputs == "embeddings"):
                for name in set(term.teachers) & set(by_name):
                    by_name[name].needs_vectors = True
        self.pairs = self._check_pairs([spec for spec in self.teachers if spec.model is not None])

    def _check_pairs(self, teachers: Sequence[TeacherSpec | Teacher]) -> LayerTerms:
        """What layers are compared; raises [`InputError`] for those that a model does not have."""
        from ..trainers.layers import LayerTerms

        by_name = {teacher.name: teacher for teacher in teachers}
        first = self.teachers[0].name
        terms = {label: term for label, term in self.layer_terms.items() if (term.teacher or first) in by_name}
        return LayerTerms(terms, lambda term: by_name[term.teacher or first], self.student, self.args)

    def _check_streamed_teachers(self) -> None:
        for spec in self.teachers:
            if spec.model is not None and spec.in_rows:
                raise InputError(
                    f"the scores of {spec.origin} cannot be added to rows that are streamed",
                    where="--streaming",
                    cure="Score the row set first (hf-distill score) and give --teacher column:scores, or let the "
                    "teacher read every batch with --teacher_mode live",
                )

    def _open_student(self, overrides: dict[str, Any]) -> RetrievalModel:
        from transformers import set_seed

        from ..models import student_from

        set_seed(self.args.seed)  # of a new projection, which has to be the same when the run goes on later
        retriever = next((spec.model for spec in self.teachers if spec.model and not spec.is_ranker), None)
        if self.options.student.startswith("layers:") and retriever is None:
            raise InputError(
                f"{self.options.student!r} takes the layers of a bi-encoder teacher, and there is none",
                where="--student",
                cure="Name a bi-encoder as student (its Hub id or folder)",
            )
        if not self.options.student.startswith("layers:"):
            student = student_from(self.options.student, revision=self.options.student_revision, **overrides)
            if student.representation == "pair":
                raise InputError(
                    f"{self.options.student} is a cross-encoder, which cannot search",
                    where="--student",
                    cure="Name a bi-encoder; a cross-encoder learns from a teacher with DistillTrainer in Python",
                )
            return student
        origin = next(spec.origin for spec in self.teachers if spec.model is retriever)
        revision = self.options.teacher_revision if retriever is self.teachers[0].model else None
        return student_from(self.options.student, origin, revision=revision, **overrides)

    def _row_source(self) -> Any:
        """Who mines the training rows: None (they are there), `"bm25"`, or a bi-encoder."""
        from ..models import load_model

        if self.row_options.rows is not None:
            return None
        retriever = next((spec.model for spec in self.teachers if spec.model and not spec.is_ranker), None)
        choice = self.row_options.mine_with
        if choice == "auto":
            return retriever if retriever is not None else "bm25"
        if choice == "teacher":
            if retriever is None:
                raise InputError(
                    "no teacher is a bi-encoder, so none can mine",
                    where="--mine_with",
                    cure="Choose bm25, student or a model id",
                )
            return retriever
        if choice == "student":
            return copy.deepcopy(self.student)
        return "bm25" if choice == "bm25" else load_model(choice)

    # ---- Plan ----
    def plan(self) -> list[tuple[str, float]]:
        """What will be done, and about how many seconds each step takes on this machine."""
        from ..retrieval import estimate_seconds

        collection, args = self.data.collection, self.args
        passages, queries = len(collection.corpus), len(collection.queries)
        if self.row_options.rows is not None:
            rows = len(row_sets.wanted_rows(self.data, self.row_options, self.args.seed))
        else:
            rows = len(collection.qrels[self.data.train].query_positions())
        rows = min(rows, self.row_options.max_queries or rows)
        tests = len(collection.qrels[self.data.test].query_positions()) if self.data.test else 0
        lines: list[tuple[str, float]] = []

        def seconds(model: Any, count: int, **how: Any) -> float:
            return estimate_seconds(model, collection, count, **how, **self.encode)

        for spec in self.teachers:
            if spec.model is not None and not spec.is_ranker:
                lines.append(
                    (
                        f"encode {passages:,} passages and {queries:,} queries with {spec.name}",
                        seconds(spec.model, passages),
                    )
                )
                if spec.teaches_layers and not spec.in_rows and spec.mode == "cached":
                    number = len(self.pairs.ever_of_teacher(spec.name))
                    size = {"float16": 2, "float32": 4}[self.encode["storage"]]
                    size *= (passages + queries) * number * spec.model.config.hidden_size
                    lines.append(
                        (
                            f"encode them again, {number} layers of {spec.name} ({size / 2**30:.1f} GiB)",
                            seconds(spec.model, passages, anew=True),
                        )
                    )
        if self.row_source == "bm25":
            lines.append((f"mine negatives of {rows:,} queries with BM25", 2 + rows * 1e-3))
        elif self.row_source is not None:
            encoded = any(self.row_source is spec.model for spec in self.teachers)
            name = "the teacher's embeddings" if encoded else self.row_source.name_or_path
            lines.append(
                (
                    f"mine negatives of {rows:,} queries with {name}",
                    0 if encoded else seconds(self.row_source, passages),
                )
            )
        per_row = 1 + self.row_options.mine_negatives
        for spec in self.teachers:
            if spec.is_ranker and self.options.teacher_mode == "cached":
                pairs = rows * per_row
                lines.append((f"score {pairs:,} pairs with {spec.name}", seconds(spec.model, pairs, pairs=True)))
            if spec.is_ranker and tests:
                pairs = tests * args.eval_depth
                lines.append(
                    (f"re-rank {pairs:,} test pairs with {spec.name}", seconds(spec.model, pairs, pairs=True))
                )
        before = seconds(self.student, passages)
        steps = int(args.max_steps if args.max_steps > 0 else rows // (self._batch()) * args.num_train_epochs)
        # Forward and backward, and the lower speed of training against inference; queries are short.
        texts = self._batch() * (1.2 + args.num_negatives)
        step = 4 * texts * seconds(self.student, passages, anew=True) / max(passages, 1)
        if tests:
            lines.append(("measure the student before training", before))
        lines.append((f"train the student: {steps:,} steps of {self._batch()} queries", steps * step))
        for spec in self.teachers:
            if spec.model is not None and self.options.teacher_mode in ("live", "joint"):
                joint = self.options.teacher_mode == "joint"
                pairs = (1 + args.num_negatives) * self._batch()
                count = steps * (pairs if spec.is_ranker else int(texts))
                reading = seconds(spec.model, count, pairs=spec.is_ranker, anew=True)
                what = f"train {spec.name} along" if joint else f"read the same batches with {spec.name}"
                lines.append((what, reading * (4 if joint else 1)))
        if self.options.baseline:
            lines.append((f"train it without a teacher: {steps:,} steps", steps * step))
        if tests:
            lines.append(("measure the trained students", before * (1 + self.options.baseline)))
        return lines

    def _batch(self) -> int:
        return self.args.per_device_train_batch_size * max(self.args.world_size, 1)

    def show_plan(self) -> None:
        """Prints the plan; work that is cached from an earlier run takes no time again."""
        lines = self.plan()
        total = sum(seconds for _, seconds in lines)
        rows = [(text, duration(seconds)) for text, seconds in lines]
        print_table(
            f"Plan: {', '.join(spec.origin for spec in self.teachers)} teaches {self.options.student} "
            f"on {self.data.collection.name}",
            ["step", "about"],
            [*rows, ("in all (what an earlier run has cached is skipped)", duration(total))],
        )

    # ---- Work ----
    def rows(self) -> RowSet:
        """The training rows, mined if need be, with the cached scores of cross-encoder teachers."""
        if self.row_source is None:
            rows = row_sets.wanted_rows(self.data, self.row_options, self.args.seed)
        else:
            rows = row_sets.mined_rows(
                self.row_source,
                self.data,
                self.row_options,
                self.encode,
                index=self.encode_options.index,
                seed=self.args.seed,
            )
        return rows

    def prepare_teachers(self, rows: RowSet) -> tuple[RowSet, list[Teacher]]:
        """Caches what the teachers have to say about the rows, and wraps them for the trainer."""
        from ..retrieval import choose_dtype, encode_table, score_layers, score_rows
        from ..retrieval.inference import DTYPES
        from ..teachers import CachedEmbeddings, CachedScores, JointTeacher, LiveTeacher, check_column

        encode = {**self.encode, "dtype": self.options.teacher_dtype}
        for spec in self.teachers:
            if spec.column is not None:
                check_column(rows, spec.column)  # before another teacher begins to encode
        teachers: list[Teacher] = []
        for number, spec in enumerate(self.teachers):
            column = "scores" if number == 0 else f"scores_{spec.name}"
            of_layers = layer_column(spec.column or column) if spec.teaches_layers else None
            if spec.column is not None:
                teachers.append(CachedScores.from_rows(spec.name, rows, spec.column, of_layers))
            elif spec.is_joint:
                teachers.append(JointTeacher(spec.name, spec.model))
            elif self.options.teacher_mode == "live":
                dtype = DTYPES[choose_dtype(self.options.teacher_dtype, self.args.device)]
                teachers.append(LiveTeacher(spec.name, spec.model, dtype))
            elif spec.in_rows:
                settings = {name: value for name, value in encode.items() if name != "storage"}
                rows = score_rows(spec.model, rows, column=column, **settings)
                if of_layers is not None:
                    rows = score_layers(spec.model, rows, column=of_layers, **settings)
                teachers.append(CachedScores.from_rows(spec.name, rows, column, of_layers, model=spec.model))
            else:
                tables = ((rows.queries, "query"), (rows.corpus, "passage"))
                stores = [encode_table(spec.model, *both, **encode) for both in tables]
                layer_stores = None
                if spec.teaches_layers:
                    layers = self.pairs.ever_of_teacher(spec.name)
                    layer_stores = tuple(encode_table(spec.model, *both, layers=layers, **encode) for both in tables)
                config = spec.model.config
                similarity = "dot" if config.normalize else config.similarity
                teachers.append(
                    CachedEmbeddings(
                        spec.name,
                        *stores,
                        similarity=similarity,
                        temperature=config.temperature,
                        origin={
                            "model": spec.origin,
                            "weights": spec.model.weights_fingerprint(),
                            "num_layers": spec.num_layers,
                        },
                        layer_stores=layer_stores,
                    )
                )
        self._check_pairs(teachers)
        return rows, teachers

    def check_teacher(self) -> str | None:
        """Lets the teacher re-rank the student's dev candidates; says loudly if it is no better.

        Returns:
            A sentence for the card when the teacher is too weak, else None.
        """
        from ..evaluation import evaluate_run
        from ..retrieval import rerank, search

        spec = self.teachers[0]
        split = self.data.eval or self.data.test
        if spec.model is None or split is None:
            return None
        collection, depth, measure = self.data.collection, min(self.args.eval_depth, 30), "nDCG@10"
        queries = collection.qrels[split].query_positions()[:300]
        qrels = collection.qrels[split].subset(queries).as_dict(collection.queries, collection.corpus)
        candidates = search(self.student, collection, queries, depth, **self.encode)
        settings = {name: value for name, value in self.encode.items() if name != "storage"}
        reranked = rerank(spec.model, candidates, collection, **settings)
        values = [
            evaluate_run(qrels, run.as_dict(collection.queries, collection.corpus), [measure]).means[measure]
            for run in (candidates, reranked)
        ]
        logger.info(
            "check: on the student's own candidates (%s, %d queries, depth %d) %s is %.4f in the student's order and "
            "%.4f in the teacher's.", split, len(queries), depth, measure, *values,
        )  # fmt: skip
        if values[1] > values[0]:
            return None
        sentence = (
            f"Teacher too weak: re-ranking the student's candidates on {split}, the teacher reaches {measure} "
            f"{values[1]:.4f}, the untrained student's own order {values[0]:.4f}. "
            "What follows is no evidence about the method."
        )
        logger.warning("%s", sentence)
        return sentence

    def train(self, rows: RowSet, teachers: list[Teacher]) -> DistillTrainer:
        """Trains the student."""
        from ..trainers import About, DistillTrainer

        trainer = DistillTrainer(
            self.student,
            self.args,
            teachers=teachers,
            rows=rows,
            evaluation=steps.evaluation_for(self.data, self.args, self.student),
        )
        origins = [spec.origin for spec in self.teachers if spec.model is not None]
        trainer.about = About(self._summary(), [self._start(), *origins], [self.data.collection.source])
        self.student = steps.finish_training(trainer)
        return trainer

    def train_without_teacher(self, rows: RowSet, start: RetrievalModel) -> RetrievalModel:
        """What the same start, rows and steps give with the contrastive loss alone."""
        from ..trainers import RetrievalTrainer

        args = replace(
            self.args,
            output_dir=str(self.folder / "no_teacher"),
            losses=None,
            push_to_hub=False,
            resume_from_checkpoint=None,
        )
        trainer = RetrievalTrainer(start, args, rows=rows, evaluation=steps.evaluation_for(self.data, args, start))
        return steps.finish_training(trainer)

    def run(self) -> None:
        """Takes all steps; each leaves its result on disk, so that a second call goes on where the first was cut."""
        self.show_plan()
        if self.options.plan_only:
            return
        folders.claim_output(self.folder, self.settings)
        publishing.check_push(self.args)
        rows, teachers = self.prepare_teachers(self.rows())
        weak = self.check_teacher()
        self.report.bm25()
        for spec in self.teachers:
            if spec.model is not None:
                self.report.model(spec.name, spec.model)
        self.report.model("student_before", self.student)
        start = copy.deepcopy(self.student) if self.options.baseline else None
        trainer = self.train(rows, teachers)
        if start is not None and rows.has_positives:
            self.report.model("student_no_teacher", self.train_without_teacher(rows, start))
        self.report.model("student", self.student)
        self.report.finish(
            trainer,
            self.student,
            rows,
            system="student",
            summary=self._summary(),
            settings=self.settings,
            base_models=[self._start()],
            teachers=[teacher.describe() for teacher in teachers],
            reading=weak or self._reading(),
        )
        publishing.publish(trainer)

    def _start(self) -> str:
        """What the student started from."""
        return self.teachers[0].origin if self.options.student.startswith("layers:") else self.options.student

    def _summary(self) -> str:
        teachers = " and ".join(f"`{spec.origin}`" for spec in self.teachers)
        return (
            f"A small retriever (`{self.options.student}`) distilled from {teachers} on *{self.data.collection.name}*."
        )

    def _reading(self) -> str:
        results, measure = self.report.results, self.report.measures[0]
        if not {"student", "student_no_teacher"} <= set(results):
            return ""
        gain = results["student"][measure] - results["student_no_teacher"][measure]
        return (
            f"`student_no_teacher` had the same start, rows and steps, and no teacher: what distillation brought is "
            f"the difference to it, {gain:+.4f} {measure} in this run (one seed)."
        )
