"""Trainers on [`~transformers.Trainer`], each with its configuration beside it."""

from __future__ import annotations

from ..lazy import attach


__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "arguments": [
            "DistillTrainingArguments",
            "LexMAETrainingArguments",
            "RetrievalTrainingArguments",
            "TeleTrainingArguments",
        ],
        "base": ["BaseTrainer"],
        "publishing": ["About"],
        "callbacks": ["ForgettingCallback", "StopAfter"],
        "distill": ["DistillTrainer"],
        "lexmae": ["LexMAEPretrainer"],
        "progressive": ["Phase", "ProgressiveTrainer"],
        "retrieval": ["RetrievalTrainer"],
        "tele": ["TeleTrainer"],
    },
)
