"""Both sides' real trainers on the same rows in the same order, with a clock on their steps."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback


BATCH = 32
SEED = 7
# The contrastive loss of both sides: cosine times 20.
TEMPERATURE = 0.05


class StepClock(TrainerCallback):
    """Seconds from the first batch to the end of the last step: data loading included, setting up not."""

    def __init__(self) -> None:
        self.start = self.end = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.end = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.end - self.start


def training_rows(collection: Any, count: int, negatives: int, seed: int = 0) -> Any:
    """Rows of one query, its relevant passage and seeded random others, no text twice in all rows.

    Without repeated texts no side can save work by leaving copies out, nor has a passage to be masked.
    """
    from hf_distill.data import RowSet

    generator = np.random.default_rng(seed)
    qrels = collection.qrels["train"]
    order = generator.permutation(len(qrels.query))
    queries, positives, seen = [], [], set()
    for query, document in zip(qrels.query[order].tolist(), qrels.document[order].tolist()):
        texts = {collection.queries.texts([query])[0], collection.corpus.texts([document])[0]}
        if len(queries) < count and not texts & seen:
            seen |= texts
            queries.append(query)
            positives.append(document)
    others: list[int] = []
    for document in generator.permutation(len(collection.corpus)).tolist():
        if len(others) == len(queries) * negatives:
            break
        text = collection.corpus.texts([document])[0]
        if text not in seen:
            seen.add(text)
            others.append(document)
    if len(queries) < count or len(others) < count * negatives:
        raise SystemExit(f"{collection.name} is too small for {count} rows with {negatives} negatives")
    documents = np.column_stack([positives, np.reshape(others, (count, negatives))])
    return RowSet.from_arrays(collection.queries, collection.corpus, queries, documents, np.ones(count, np.int64))


def common_arguments(folder: Path, steps: int, dtype: str, batch: int) -> dict[str, Any]:
    """What both sides' TrainingArguments get."""
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": 2e-5,
        "warmup_steps": 0,
        "bf16": dtype == "bfloat16",
        "use_cpu": not _has_gpu(),
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": SEED,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_drop_last": True,
        "dataloader_num_workers": 0,
    }


def run_ours(
    model: Any, rows: Any, folder: Path, *, steps: int, dtype: str, dropout: float, batch: int = BATCH, **settings: Any
) -> tuple[float, list[float]]:
    """Trains a copy of `model` with [`RetrievalTrainer`]; returns the seconds and the loss of every step."""
    from hf_distill.trainers import RetrievalTrainer, RetrievalTrainingArguments

    arguments = RetrievalTrainingArguments(
        **common_arguments(folder, steps, dtype, batch),
        num_negatives=int(rows.lengths[0]) - 1,
        dropout=dropout,
        **settings,
    )
    trainer = RetrievalTrainer(copy.deepcopy(model), arguments, rows=rows)
    return run_trainer(trainer)


def run_peer(
    model: Any,
    columns: Any,
    folder: Path,
    *,
    steps: int,
    dtype: str,
    dropout: float,
    batch: int = BATCH,
    loss: Callable[[Any], Any] | None = None,
) -> tuple[float, list[float]]:
    """The same with `SentenceTransformerTrainer`; `loss` makes the loss from the model."""
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from hf_distill.models import set_dropout

    model = copy.deepcopy(model)
    set_dropout(model, dropout)
    arguments = SentenceTransformerTrainingArguments(
        **common_arguments(folder, steps, dtype, batch), batch_sampler=_in_order
    )
    make = loss or (lambda model: MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE))
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=columns, loss=make(model))
    return run_trainer(trainer)


def run_trainer(trainer: Any) -> tuple[float, list[float]]:
    """Trains; returns the seconds of the steps and their losses."""
    from transformers import PrinterCallback

    clock = StepClock()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    seconds = clock.seconds
    del trainer
    gc.collect()
    return seconds, losses


def peer_columns(rows: Any) -> Any:
    """`rows` as text columns, in the order in which our trainer will see them in its first epoch."""
    from datasets import Dataset

    from hf_distill.data import EpochSampler

    order = [row for row, _ in EpochSampler(len(rows), seed=SEED)]
    documents = np.stack([rows.documents_at(row) for row in order])
    columns = {"anchor": rows.queries.texts(rows.query[order])}
    for place in range(documents.shape[1]):
        name = "positive" if place == 0 else f"negative_{place}"
        columns[name] = rows.corpus.texts(documents[:, place])
    return Dataset.from_dict(columns)


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest difference of two curves of losses, as a share of the largest loss: late ones may be near zero."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / max(map(abs, theirs))


def _in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> Any:
    from torch.utils.data import BatchSampler, SequentialSampler

    return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
