"""The base of all trainers: batches from ids, native checkpoints, retrieval evaluation, card and manifest."""

from __future__ import annotations

import copy
import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ..console import get_logger
from ..data.collators import RetrievalCollator
from ..data.masking import CorpusTexts, StreamedTexts, TextSampler
from ..data.negatives import EpochSampler, TrainingRows
from ..data.rows import RowSet
from ..data.streaming import StreamedRows, StreamedTrainingRows, StreamSampler
from ..distributed import (
    all_finite,
    check_engine,
    check_launch,
    is_sharded,
    scale_gradient,
    skeleton,
    sum_over_processes,
    whole_state,
    world_size,
)
from ..errors import InputError
from ..evaluation.in_loop import RetrievalEvaluation
from ..files import saying_full_disk, write_json, write_text
from ..losses.combine import LossTerm, parse_terms
from ..models.base import RetrievalModel
from ..models.dropout import set_dropout
from ..models.joint import student_of
from ..settings import parse_yaml
from .arguments import RetrievalTrainingArguments
from .callbacks import ForgettingCallback, StopAfter
from .publishing import PublishingTrainer
from .training_rows import SkipUnread, check_rows_state, make_dataset, make_sampler, write_rows_state


logger = get_logger(__name__)

STUDENT = "student"


def read_losses(losses: Any) -> dict[str, LossTerm]:
    """The option `losses` (JSON or YAML, or what such text stands for) as terms by their label in the log."""
    return parse_terms(parse_yaml(losses, "losses") if isinstance(losses, str) else losses)


def read_sources(args: RetrievalTrainingArguments) -> dict[str, float] | None:
    """The option `negative_sources` as weights by source."""
    if not args.negative_sources:
        return None
    try:
        weights = json.loads(args.negative_sources)
        return {str(name): float(weight) for name, weight in weights.items()}
    except (ValueError, TypeError, AttributeError):
        raise InputError(
            f"{args.negative_sources!r} is no JSON object of weights",
            where="negative_sources",
            cure='Write for example \'{"bm25": 1, "dense": 2}\'',
        ) from None


def check_batch(num_rows: int, args: RetrievalTrainingArguments) -> None:
    """Raises [`InputError`] if so many rows give no batch, or a batch no negatives."""
    if args.num_negatives < 0:
        raise InputError(f"{args.num_negatives} is not a number of negatives", where="num_negatives", cure="Use 0 up")
    batch = args.per_device_train_batch_size * max(args.world_size, 1)
    if args.dataloader_drop_last and num_rows < batch:
        raise InputError(
            f"{num_rows} training rows do not fill one batch of {batch} queries",
            where="rows",
            cure="Lower --per_device_train_batch_size, or bring more rows",
        )


def own_callbacks(args: RetrievalTrainingArguments, evaluation: RetrievalEvaluation | None) -> list[TrainerCallback]:
    """The callbacks that options ask for."""
    made: list[TrainerCallback] = [] if args.stop_after is None else [StopAfter(args.stop_after)]
    if getattr(args, "track_forgetting", False):  # pre-training measures nothing
        if evaluation is None or args.eval_strategy == "no":
            raise InputError(
                "nothing is evaluated during training",
                where="track_forgetting",
                cure="Set eval_strategy to steps or epoch, and bring development judgements",
            )
        made.append(ForgettingCallback(evaluation))
    return made


def say_if_all_warm_up(warmup: int, total: int, option: str) -> None:
    """Warns if a training of `total` steps has no other than the `warmup` ones that `option` stands for."""
    if warmup >= total:
        logger.warning(
            "The training has %d step%s, all of them warm-up, and the first has a learning rate of 0. Lower "
            "--per_device_train_batch_size or raise --num_train_epochs, or set --%s 0.",
            total, "s" if total > 1 else "", option,
        )  # fmt: skip


class BaseTrainer(PublishingTrainer, ABC):
    """A [`~transformers.Trainer`] whose rows are ids and whose checkpoints are native.

    Subclasses say which loss terms there are in `parse_losses`, and what a batch gives for them in `loss_parts`.

    Args:
        model: The model to train, a [`RetrievalModel`] in float32 weights.
        args: Its configuration.
        rows: The training rows, held or streamed. May be None for evaluation only.
        evaluation: What `evaluate` measures.
        encoders: Text processors of further models that see the batch, by name.
        stores: Cached embeddings of teachers, by name: one store of queries and one of passages.
        callbacks: Further [`~transformers.TrainerCallback`]s.
    """

    _name: ClassVar[str] = "Training"
    _paper: ClassVar[Mapping[str, str] | None] = None
    _tags: ClassVar[Sequence[str]] = ("hf_distill",)
    _card: ClassVar[str] = "student"

    _resumed = False
    # Our losses are means over the micro-batch, so the Trainer has to divide by the number of accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: RetrievalModel,
        args: RetrievalTrainingArguments,
        rows: RowSet | StreamedRows | None = None,
        evaluation: RetrievalEvaluation | None = None,
        encoders: Mapping[str, Any] | None = None,
        stores: Mapping[str, Any] | None = None,
        score_columns: Sequence[str] = (),
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        check_launch(args)
        self.rows = rows
        self.terms = self.parse_losses(args)
        if args.dropout is not None:
            set_dropout(model, args.dropout)
        if args.freeze_embeddings:
            for tower in model.towers.values():
                tower.get_input_embeddings().requires_grad_(False)
        dataset = collator = None
        if rows is not None:
            check_batch(len(rows), args)
            dataset = make_dataset(rows, args, read_sources(args), score_columns)
            collator = self._make_collator(model, dataset, args, encoders or {}, stores or {})
        # Taken before an engine puts its own classes and hooks into the model.
        self._skeleton = skeleton(model) if world_size() > 1 else None
        self._part_sums: dict[str, torch.Tensor] = {}
        self._part_steps = 0
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=dataset,
            eval_dataset=evaluation,
            processing_class=model.processor().tokenizer,
            callbacks=[*(callbacks or []), *own_callbacks(args, evaluation)],
            **kwargs,
        )

    # ---- Rows to batches ----
    def _make_collator(
        self,
        model: RetrievalModel,
        dataset: TrainingRows | StreamedTrainingRows,
        args: RetrievalTrainingArguments,
        encoders: Mapping[str, Any],
        stores: Mapping[str, Any],
    ) -> RetrievalCollator:
        queries = args.per_device_train_batch_size
        passages = queries * (1 + args.num_negatives)
        if args.gradient_cache_size:
            model.recompute = True
            query_chunks = math.ceil(queries / args.gradient_cache_size)
            passage_chunks = math.ceil(passages / args.gradient_cache_size)
        else:
            # Fixed numbers, so that every process calls the model equally often (sharded models need that).
            query_chunks = 1
            passage_chunks = args.passage_chunks or (4 if args.device.type == "cpu" else 1)
        return RetrievalCollator(
            self.rows.queries,
            self.rows.corpus,
            {STUDENT: model.processor(), **encoders},
            deduplicate=args.deduplicate,
            num_chunks={"query": query_chunks, "passage": passage_chunks, "pair": passage_chunks},
            even_chunks=bool(args.gradient_cache_size),
            max_positives=dataset.max_positives,
            stores=stores,
        )

    def _get_train_sampler(
        self, train_dataset: TrainingRows | StreamedTrainingRows | CorpusTexts | StreamedTexts | None = None
    ) -> EpochSampler | StreamSampler | TextSampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        sampler = make_sampler(dataset, self.args)
        if isinstance(sampler, (StreamSampler, TextSampler)):
            self.pop_callback(SkipUnread)
            self.add_callback(SkipUnread(sampler))
        # After a resume on several processes accelerate can no longer see our sampler, only the dataset: it then
        # tells the epoch to the dataset.
        dataset.set_epoch = sampler.set_epoch
        return sampler

    # ---- Loss ----
    @abstractmethod
    def parse_losses(self, args: RetrievalTrainingArguments) -> dict[str, LossTerm]:
        """The loss terms by their label in the log."""

    @abstractmethod
    def loss_parts(self, model: RetrievalModel, output: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The weighted loss terms of a batch, by name: scalars whose sum is the loss of this process.

        The mean over processes of a part is its value over the joint batch, and so is the mean of its gradients.
        """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = self.run_model(model, inputs)
        # Scores and softmax in float32 whatever the encoder runs in.
        with torch.autocast(self.args.device.type, enabled=False):
            parts = self.loss_parts(self.accelerator.unwrap_model(model), output, inputs)
        self.note(parts)
        self._part_steps += 1
        loss = torch.stack(list(parts.values())).sum()
        return (loss, output) if return_outputs else loss

    def run_model(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> Any:
        """The one forward of the wrapped module on a batch."""
        return model(**batch["tokens"][STUDENT])

    def note(self, values: Mapping[str, torch.Tensor]) -> None:
        """Scalars of this batch whose mean over processes and steps goes to the log."""
        for name, value in values.items():
            self._part_sums[name] = self._part_sums.get(name, 0.0) + value.detach()

    @staticmethod
    def reduce_counted(loss: torch.Tensor, counted: torch.Tensor, candidates: str) -> torch.Tensor:
        """Weighs a mean over this batch so that averaging processes gives the mean over the joint batch.

        Args:
            loss: Mean over the queries, pairs of candidates or tokens that count.
            counted: Boolean, of any shape: which of them count.
            candidates: With `"global"` every process has computed the joint mean already, and only the gradient,
                which flows through local rows alone, is multiplied by the number of processes.
        """
        if world_size() == 1:
            return loss
        if candidates == "global":
            return scale_gradient(loss, world_size())
        count = counted.sum()
        return loss * count * world_size() / sum_over_processes(count).clamp(min=1)

    @property
    def must_be_finite(self) -> Collection[str]:
        """The parts of the loss that have to be numbers for training to go on: those of masked-LM logits."""
        return ()

    def check_finite(self) -> None:
        """Looks at the steps since the last log, and at the weights.

        All processes must come here together.

        Raises:
            InputError: If one of the parts that must be is no number, or a weight.
        """
        self._check_parts({name: value for name, value in self._means().items() if name in self.must_be_finite})
        if not all_finite(self.accelerator.unwrap_model(self.model), self.args.device):
            raise self._not_finite("weights", "some of them")

    def _means(self) -> dict[str, float]:
        """The means of what was noted since the last log, over processes and steps."""
        steps = max(self._part_steps, 1)
        return {name: (sum_over_processes(one) / world_size() / steps).item() for name, one in self._part_sums.items()}

    def _check_parts(self, logs: Mapping[str, float]) -> None:
        broken = [name for name in self.must_be_finite if not math.isfinite(logs.get(name, 0.0))]
        if broken:
            raise self._not_finite("logits", ", ".join(broken))

    def _not_finite(self, what: str, which: str) -> InputError:
        return InputError(
            f"the model's {what} are not finite: {which} at step {self.state.global_step}",
            where="training",
            cure="Go back to the last checkpoint with a smaller learning rate, or train in float32 or bfloat16",
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The Trainer's summary at the end gets what came after the last log of a loss.
        if self._part_steps and {"loss", "train_loss"} & set(logs):
            logs |= self._means()
            self._part_sums, self._part_steps = {}, 0
        if self._resumed:
            # The Trainer divides the losses since the resume by all steps.
            logs.pop("train_loss", None)
        super().log(logs, start_time)
        self._check_parts(logs)

    def _prepare_input(self, data: Any) -> Any:
        # Not the Trainer's own: under DeepSpeed that rounds the teachers' scores to the training precision.
        return send_to_device(data, self.args.device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # Counted by the Trainer from one `input_ids`; ours are nested, and nothing reads the figure.
        return 0

    # ---- Training and evaluation ----
    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As [`~transformers.Trainer.create_scheduler`]; says if nothing but warm-up is left of a short training."""
        say_if_all_warm_up(self.args.get_warmup_steps(num_training_steps), num_training_steps, "warmup_steps")
        return super().create_scheduler(num_training_steps, optimizer)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As [`~transformers.Trainer.train`]; a checkpoint whose rows were others is refused.

        `resume_from_checkpoint` may also be a repository, `user/name` or `user/name@revision`.
        """
        folder = resume_from_checkpoint = self.fetch_checkpoint(resume_from_checkpoint)
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        self._resumed = bool(folder)
        if folder:
            check_engine(folder, self.args)
        if folder and self.rows is not None:
            check_rows_state(Path(folder), self.rows, self.args)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self.check_finite()
        return result

    def evaluate(
        self,
        eval_dataset: RetrievalEvaluation | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Retrieval measures of the current weights; every process encodes a part of the texts."""
        evaluation = eval_dataset if eval_dataset is not None else self.eval_dataset
        model = self.whole_model()
        training = model.training
        model.eval()
        # Training draws the same random numbers with evaluations and without, in one go and after a resume.
        with torch.random.fork_rng():
            measures = evaluation(student_of(model))
        model.train(training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- Checkpoints ----
    def whole_model(self) -> RetrievalModel:
        """The model that is trained, or a whole copy of it where an engine has divided its weights over processes.

        All processes must come here together.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not is_sharded(model):
            return model
        whole = copy.deepcopy(self._skeleton)
        whole.load_state_dict(whole_state(model), assign=True)
        return whole.to(self.args.device).eval()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        # Not the Trainer's own: that pickles the arguments, a token among them. Its `state_dict` is whole in the main
        # process alone, and only where the engine is told so.
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        self.whole_model().save_pretrained(folder, is_main_process=self.args.should_save)
        if self.args.should_save:
            write_text(folder / "training_args.json", self.args.to_json_string())
            if self.rows is not None:
                write_rows_state(folder, self.rows, self.args)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.check_finite()  # nobody could go on from a checkpoint that is not
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            with saying_full_disk(folder):
                super()._save_checkpoint(model, trial)
        except InputError:
            # It lacks its last files, so nobody can go on from it; the one before is still there.
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self.accelerator.unwrap_model(model if model is not None else self.model).load_checkpoint(
            resume_from_checkpoint
        )

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    # ---- What is written about a run ----
    def write_history(self, folder: str | Path | None = None) -> None:
        """Writes the logged losses and measures as `history.json`."""
        if self.is_world_process_zero():
            write_json(Path(folder or self.args.output_dir) / "history.json", self.state.log_history)
