"""What the training verbs parse: the trainers' arguments with the defaults of the command line."""

from __future__ import annotations

from dataclasses import dataclass

from ..trainers.arguments import (
    DistillTrainingArguments,
    LexMAETrainingArguments,
    RetrievalTrainingArguments,
    TeleTrainingArguments,
)
from .options import PretrainFlags, TrainingFlags


class _FromCommandLine:
    """Reads what YAML makes of a bare `no`, and leaves a folder that nobody named unnamed."""

    def __post_init__(self) -> None:
        for name in ("eval_strategy", "save_strategy"):
            if str(getattr(self, name)).lower() == "false":
                setattr(self, name, "no")
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = self.eval_strategy != "no"
        unnamed = self.output_dir is None
        super().__post_init__()
        if unnamed:
            self.output_dir = None  # transformers has chosen one


@dataclass
class TrainArguments(_FromCommandLine, TrainingFlags, RetrievalTrainingArguments):
    """What `hf-distill train` parses."""


@dataclass
class TeleArguments(_FromCommandLine, TrainingFlags, TeleTrainingArguments):
    """What `hf-distill tele` parses."""


@dataclass
class DistillArguments(_FromCommandLine, TrainingFlags, DistillTrainingArguments):
    """What `hf-distill distill` parses."""


@dataclass
class PretrainArguments(_FromCommandLine, PretrainFlags, LexMAETrainingArguments):
    """What `hf-distill pretrain` parses."""
