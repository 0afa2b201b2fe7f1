"""The configuration of each trainer: its own options on top of [`~transformers.TrainingArguments`]."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..errors import InputError
from .options import DistillOptions, LexMAEOptions, RetrievalOptions, TeleOptions


@dataclass
class RetrievalTrainingArguments(TrainingArguments, RetrievalOptions):
    """Arguments of [`RetrievalTrainer`].

    Defaults that differ from [`~transformers.TrainingArguments`]: `remove_unused_columns=False` (a batch is made from
    ids), `dataloader_drop_last=True` (in-batch negatives need whole batches), `ddp_find_unused_parameters=False`,
    `warmup_steps=0.1` (a tenth of all steps), `per_device_train_batch_size=32`, `metric_for_best_model="nDCG@10"` and
    `logging_steps=10`.
    """

    _argument_group_name = "the Hugging Face Trainer"

    per_device_train_batch_size: int = field(default=32, metadata={"help": "Queries of a batch on each device."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: a batch is made from ids."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Drop the last, incomplete batch."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether DDP looks for parameters without gradient; there are none."}
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Linear warm-up: a number of steps, or below 1 a share of all steps."}
    )
    metric_for_best_model: str | None = field(
        default="nDCG@10", metadata={"help": "Measure that chooses the best checkpoint, one of eval_measures."}
    )
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether a larger measure is better."})
    logging_steps: float = field(default=10, metadata={"help": "Log the loss and its parts every so many steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep, the best one included."})


@dataclass
class DistillTrainingArguments(RetrievalTrainingArguments, DistillOptions):
    """Arguments of [`DistillTrainer`]: those of [`RetrievalTrainingArguments`] and [`DistillOptions`]."""


@dataclass
class TeleTrainingArguments(RetrievalTrainingArguments, TeleOptions):
    """Arguments of [`TeleTrainer`]: those of [`RetrievalTrainingArguments`] and [`TeleOptions`].

    `stop_after` ends every episode but the last; the learning rates are those of the whole run.
    """

    negative_sampling: str = field(
        default="window", metadata={"help": "How negatives are drawn from the pool: window, random or hardest."}
    )
    positive_sampling: str = field(
        default="rotate", metadata={"help": "Which positive of a row is used in an epoch: rotate, first or random."}
    )


@dataclass
class LexMAETrainingArguments(TrainingArguments, LexMAEOptions):
    """Arguments of [`LexMAEPretrainer`], those of [`LexMAEOptions`] among them.

    Defaults that differ from [`~transformers.TrainingArguments`]: `remove_unused_columns=False`,
    `dataloader_drop_last=True`, `ddp_find_unused_parameters=False`, `warmup_steps=0.05`, `learning_rate=3e-4`,
    `weight_decay=0.01`, `max_grad_norm=0` (the paper clips nothing) and `logging_steps=10`.

    Raises:
        InputError: If something is to be measured during training.
    """

    _argument_group_name = "the Hugging Face Trainer"

    per_device_train_batch_size: int = field(default=32, metadata={"help": "Texts of a batch on each device."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: a batch is made of texts."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Drop the last, incomplete batch."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether DDP looks for parameters without gradient; there are none."}
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "The peak learning rate."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Linear warm-up: a number of steps, or below 1 a share of all steps."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay, of all weights but norms and biases."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip gradients to this norm; 0 clips nothing."})
    logging_steps: float = field(default=10, metadata={"help": "Log the losses every so many steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})

    def __post_init__(self) -> None:
        wishes = {
            "eval_strategy": self.eval_strategy != "no",
            "eval_on_start": self.eval_on_start,
            "load_best_model_at_end": self.load_best_model_at_end,
            "save_strategy": self.save_strategy == "best",
        }
        for name, wished in wishes.items():
            if wished:
                raise InputError("pre-training measures nothing", where=name, cure="Leave it out")
        super().__post_init__()
