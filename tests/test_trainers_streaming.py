"""Training on streamed rows: the same batches as promised, after any interruption, on any number of processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_distill.data import RowSet, StreamedRows, load_collection
from hf_distill.errors import InputError
from hf_distill.evaluation import RetrievalEvaluation
from hf_distill.models import DenseRetriever, student_from
from hf_distill.teachers import CachedScores
from hf_distill.trainers import DistillTrainer, DistillTrainingArguments, RetrievalTrainer, RetrievalTrainingArguments
from tests.test_trainers_training import arguments, assert_same, losses_of, weights


ROWS = 70


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    from tests.conftest import MICRO

    return load_collection(MICRO, cache_dir=tmp_path_factory.mktemp("collection"))


def make_rows(collection, seed: int = 0) -> RowSet:
    """Rows of 6 to 9 documents, some without a positive, some with two, with scores and sources."""
    generator = np.random.default_rng(seed)
    queries = generator.integers(0, len(collection.queries), ROWS)
    documents = [generator.permutation(len(collection.corpus))[: generator.integers(6, 10)] for _ in range(ROWS)]
    return RowSet.from_arrays(
        collection.queries,
        collection.corpus,
        queries,
        documents,
        np.arange(ROWS) % 3,
        scores=[generator.normal(size=len(one)) for one in documents],
        sources=[["a" if number % 2 else "b" for number in range(len(one))] for one in documents],
    )


def save_in_parts(rows: RowSet, folder: Path, sizes=(9, 20, 1, 25, 15)) -> Path:
    """The stored form of `rows` in several files of several row groups."""
    import pyarrow.parquet as pq

    whole = pq.read_table(next(rows.save(folder / "whole").glob("*.parquet")))
    (folder / "parts").mkdir()
    start = 0
    for number, size in enumerate(sizes):
        part = whole.slice(start, size)
        pq.write_table(part, folder / "parts" / f"train-{number:05d}-of-{len(sizes):05d}.parquet", row_group_size=8)
        start += size
    shutil.copy(folder / "whole" / "metadata.json", folder / "parts")
    return folder / "parts"


@pytest.fixture(scope="module")
def folder(collection, tmp_path_factory) -> Path:
    return save_in_parts(make_rows(collection), tmp_path_factory.mktemp("rows"))


@pytest.fixture()
def stream(collection, folder) -> StreamedRows:
    return StreamedRows.open(folder, collection.queries, collection.corpus)


class Watching(RetrievalTrainer):
    """Keeps the query ids of every batch."""

    def compute_loss(self, model, inputs, **kwargs):
        self.seen = [*getattr(self, "seen", []), inputs["query_ids"].tolist()]
        return super().compute_loss(model, inputs, **kwargs)


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def trainer(tiny_bert, rows, folder, kind=Watching, **settings):
    torch.manual_seed(0)
    settings = {"max_steps": 14, "shuffle_buffer": 20, "num_negatives": 2, **settings}
    return kind(DenseRetriever.from_pretrained(tiny_bert), arguments(folder, **settings), rows=rows)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_interrupted_twice(accumulation, tiny_bert, stream, tmp_path):
    """70 rows make 17 batches: 14 steps of two batches go far into the second epoch."""
    settings = {"gradient_accumulation_steps": accumulation, "save_total_limit": None}
    straight = trainer(tiny_bert, stream, tmp_path / "straight", **settings)
    straight.train()
    assert len(straight.seen) == 14 * accumulation - (accumulation == 2)  # the 17th batch is a step of its own
    seen = []
    for start, stop in ((0, 3), (3, 11), (11, 14)):
        one = trainer(tiny_bert, stream, tmp_path / "cut", save_strategy="steps", save_steps=1, **settings)
        one.add_callback(StopAt(stop))
        one.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{start}") if start else None)
        seen += one.seen
    assert seen == straight.seen
    assert_same(weights(straight.model), weights(one.model))
