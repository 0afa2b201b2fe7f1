"""An early stop that keeps the schedule, and forgetting between evaluations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from hf_distill.data import RowSet, load_collection
from hf_distill.errors import InputError
from hf_distill.evaluation import RetrievalEvaluation
from hf_distill.evaluation.forgetting import positive_ranks, read_ranks
from hf_distill.models import DenseRetriever
from hf_distill.retrieval import bm25_search, mine
from hf_distill.trainers import RetrievalTrainer, RetrievalTrainingArguments
from hf_distill.trainers.callbacks import ForgettingCallback, StopAfter

from .conftest import MICRO


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return load_collection(MICRO, cache_dir=tmp_path_factory.mktemp("collection"))


@pytest.fixture()
def rows(collection, tmp_path) -> RowSet:
    queries = collection.qrels["train"].query_positions()
    return mine(bm25_search(collection, queries, 20, cache_dir=tmp_path), collection, "train", cache_dir=tmp_path)


def train(folder, model, rows, resume=None, callbacks=(), evaluation=None, **settings):
    settings = {"max_steps": 12, "warmup_steps": 0.25, "save_strategy": "no", "eval_strategy": "no", **settings}
    args = RetrievalTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=4,
        num_negatives=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        **settings,
    )
    trainer = RetrievalTrainer(
        DenseRetriever.from_pretrained(model), args, rows=rows, evaluation=evaluation, callbacks=list(callbacks)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_an_early_stop_keeps_the_schedule(tiny_bert, rows, tmp_path):
    whole = train(tmp_path / "whole", tiny_bert, rows)
    stopped = train(tmp_path / "stopped", tiny_bert, rows, stop_after=5)
    assert stopped.state.global_step == 5
    entries = [
        [(one["loss"], one["learning_rate"]) for one in trainer.state.log_history if "loss" in one]
        for trainer in (whole, stopped)
    ]
    assert len(entries[0]) == 12 and entries[1] == entries[0][:5]
    with pytest.raises(InputError, match="stop_after"):
        StopAfter(0)


def test_published_learning_rates():
    golden = json.loads((Path(__file__).parent / "golden" / "tele_lr.json").read_text())
    for name, case in golden.items():
        if name == "note":
            continue
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=case["base_lr"])
        args = RetrievalTrainingArguments(output_dir="unused", use_cpu=True, warmup_steps=0.1)
        assert args.get_warmup_steps(case["total"]) == case["warmup"]
        schedule = get_linear_schedule_with_warmup(optimizer, case["warmup"], case["total"]).lr_lambdas[0]
        for step, rate in case["lr"].items():
            assert case["base_lr"] * schedule(int(step)) == pytest.approx(rate, rel=1e-6)


def test_forgetting_is_logged_and_survives_a_resume(collection, tiny_bert, rows, tmp_path):
    def run(folder, **settings):
        evaluation = RetrievalEvaluation(collection, "dev", depth=100)
        callbacks = [] if "track_forgetting" in settings else [ForgettingCallback(evaluation)]
        return evaluation, train(
            folder, tiny_bert, rows, callbacks=callbacks, evaluation=evaluation, eval_strategy="steps",
            eval_steps=3, save_strategy="steps", save_steps=3, save_total_limit=None, **settings,
        )  # fmt: skip

    evaluation, straight = run(tmp_path / "straight")
    ranks = read_ranks(tmp_path / "straight" / "ranks.parquet")
    assert list(ranks) == ["step_3", "step_6", "step_9", "step_12"]
    expected = positive_ranks(evaluation.run, evaluation.qrels, evaluation.queries)
    assert ranks["step_12"].tolist() == expected.tolist()
    last = [entry for entry in straight.state.log_history if "eval_forgetting" in entry]
    assert [entry["step"] for entry in last] == [6, 9, 12]
    before, after = (np.where(ranks[name] == 0, 10**6, ranks[name]) for name in ("step_9", "step_12"))
    assert last[-1]["eval_forgetting"] == pytest.approx((after > before).mean())
    assert last[-1]["eval_learning"] == pytest.approx((after < before).mean())
    run(tmp_path / "parts", stop_after=7, track_forgetting=True)
    _, again = run(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-6"))
    assert "train_loss" in straight.state.log_history[-1] and "train_loss" not in again.state.log_history[-1]
    resumed = read_ranks(tmp_path / "parts" / "ranks.parquet")
    assert {name: one.tolist() for name, one in resumed.items()} == {name: one.tolist() for name, one in ranks.items()}
    with pytest.raises(InputError, match="track_forgetting.*nothing is evaluated during training"):
        train(tmp_path / "blind", tiny_bert, rows, track_forgetting=True)
