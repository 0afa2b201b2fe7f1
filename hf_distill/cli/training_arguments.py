"""The trainers' arguments with the defaults of the command line: evaluate, keep the best, save often."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..trainers.arguments import (
    DistillTrainingArguments,
    LexMAETrainingArguments,
    RetrievalTrainingArguments,
    TeleTrainingArguments,
)


@dataclass
class _CommandLineDefaults:
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training rows."})
    eval_strategy: str = field(
        default="steps", metadata={"help": "Evaluate during training: steps, epoch, or no (also without a dev split)."}
    )
    eval_steps: float | None = field(default=0.25, metadata={"help": "How often: steps, or below 1 a share of all."})
    save_strategy: str = field(default="steps", metadata={"help": "Save checkpoints: steps, epoch, best or no."})
    save_steps: float = field(default=0.25, metadata={"help": "How often: steps, or below 1 a share of all."})
    load_best_model_at_end: bool | None = field(
        default=None, metadata={"help": "End with the best checkpoint on dev. Default: true with evaluation."}
    )
    eval_corpus_size: int | None = field(
        default=5000, metadata={"help": "Passages searched in an evaluation during training; 0 means all."}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "The peak learning rate."})

    def __post_init__(self) -> None:
        for name in ("eval_strategy", "save_strategy"):
            if str(getattr(self, name)).lower() == "false":
                setattr(self, name, "no")  # What a bare `no` is in YAML.
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = self.eval_strategy != "no"
        super().__post_init__()


@dataclass
class TrainArguments(_CommandLineDefaults, RetrievalTrainingArguments):
    """What `hf-distill train` parses."""


@dataclass
class TeleArguments(_CommandLineDefaults, TeleTrainingArguments):
    """What `hf-distill tele` parses."""


@dataclass
class DistillArguments(_CommandLineDefaults, DistillTrainingArguments):
    """What `hf-distill distill` parses."""


@dataclass
class PretrainArguments(LexMAETrainingArguments):
    """What `hf-distill pretrain` parses."""

    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the texts."})
    save_strategy: str = field(default="steps", metadata={"help": "Save checkpoints: steps, epoch or no."})
    save_steps: float = field(default=0.25, metadata={"help": "How often: steps, or below 1 a share of all."})

    def __post_init__(self) -> None:
        if str(self.save_strategy).lower() == "false":
            self.save_strategy = "no"  # What a bare `no` is in YAML.
        super().__post_init__()
