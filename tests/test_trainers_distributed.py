"""Loss and gradients on two processes equal one process on the joint batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_distill.data import RowSet, load_collection


LOSSES = {
    "contrastive_global": [{"name": "contrastive", "candidates": "global"}],
    "contrastive_own": [{"name": "contrastive", "candidates": "own"}],
    "kl_global": [{"name": "kl", "teacher": "dense", "candidates": "global"}],
    "own_scores": [{"name": "kl", "teacher": "file"}, {"name": "margin_mse", "teacher": "ranker", "weight": 0.3}],
    "embeddings": [{"name": "embedding_mse", "teacher": "dense", "weight": 5}],
}


def start(processes: int, script: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess:
    """Runs a script in one process, or in several under `accelerate launch` on the CPU."""
    command = [sys.executable, str(script), *words]
    if processes > 1:
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
            "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
            str(script), *words,
        ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, micro):
    """Rows on disk: two positives for some queries, so that false negatives are masked; some rows unlabelled."""
    collection = load_collection(micro, cache_dir=tmp_path_factory.mktemp("collection"))
    positives = collection.qrels["train"].positives()
    queries = collection.qrels["train"].query_positions()[:16]
    generator = np.random.default_rng(5)
    documents, counts, scores = [], [], []
    for number, query in enumerate(queries):
        relevant = positives.of(query)
        # Few candidates for all queries, so that a query's positive is often another query's negative.
        others = np.setdiff1d(np.arange(20), relevant)
        pool = generator.choice(others, 5, replace=False)
        labelled = number % 5 != 4
        documents.append(np.concatenate([relevant, pool]) if labelled else pool)
        counts.append(len(relevant) if labelled else 0)
        scores.append(generator.normal(size=len(documents[-1])))
    rows = RowSet.from_arrays(collection.queries, collection.corpus, queries, documents, counts, scores=scores)
    return rows.save(tmp_path_factory.mktemp("rows") / "rows")


def settings_of(folder: Path, processes: int, name: str, models: dict[str, str], **overrides) -> dict:
    """A run of 4 steps of 8 queries in all."""
    return {
        **models,
        "result": str(folder / f"{name}.json"),
        "arguments": {
            "output_dir": str(folder / name),
            "use_cpu": True,
            "per_device_train_batch_size": 8 // processes,
            "num_negatives": 2,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "dropout": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "losses": json.dumps(LOSSES[name.removesuffix("_cached")]),
            **overrides,
        },
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory, micro, prepared, tiny_bert_source, tiny_ranker_source):
    """What every run saw: `{processes: {name: ...}}`; one launch each, since starting costs more than training."""
    models = {
        "collection": str(micro),
        "rows": str(prepared),
        "teacher": str(tiny_bert_source),
        "ranker": str(tiny_ranker_source),
    }
    found: dict[int, dict[str, dict]] = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"processes-{processes}")
        settings = [settings_of(folder, processes, name, models) for name in LOSSES]
        settings.append(settings_of(folder, processes, "contrastive_global_cached", models, gradient_cache_size=2))
        path = folder / "settings.json"
        path.write_text(json.dumps(settings))
        start(processes, Path(__file__).with_name("distributed_run.py"), str(path))
        found[processes] = {Path(one["result"]).stem: json.loads(Path(one["result"]).read_text()) for one in settings}
    return found


def assert_same_training(one: dict, other: dict) -> None:
    assert len(one["history"]) == len(other["history"]) == 4
    for step, (ours, theirs) in enumerate(zip(one["history"], other["history"])):
        for part in set(ours) - {"epoch", "step", "learning_rate"}:
            assert theirs[part] == pytest.approx(ours[part], rel=2e-4, abs=1e-6), (step, part)
    for weight, total in one["weights"].items():
        assert other["weights"][weight] == pytest.approx(total, rel=1e-4, abs=2e-3), weight


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_equal_one(name, runs):
    one, two = runs[1][name], runs[2][name]
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert two["engine"] == "DistributedDataParallel"
    assert_same_training(one, two)


@pytest.mark.slow
@pytest.mark.distributed
def test_gradient_caching_changes_nothing_on_one_or_two_processes(runs):
    assert_same_training(runs[1]["contrastive_global"], runs[1]["contrastive_global_cached"])
    assert_same_training(runs[1]["contrastive_global"], runs[2]["contrastive_global_cached"])


@pytest.mark.slow
@pytest.mark.distributed
def test_the_whole_command_on_two_processes(tmp_path, micro, tiny_bert):
    """Mining, encoding, training and evaluation shared by two processes give the figures of one."""
    script = Path(__file__).parents[1] / "run_scripts" / "run_distill.py"
    figures = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        flags = {
            "data": micro,
            "teacher": tiny_bert,
            "student": "layers:2",
            "output_dir": folder,
            "cache_dir": tmp_path / f"cache-{processes}",
            "max_steps": 6,
            "per_device_train_batch_size": 8 // processes,
            "num_negatives": 2,
            "mine_depth": 20,
            "dropout": 0.0,
            "dtype": "float32",
            "teacher_dtype": "float32",
            "learning_rate": 1e-3,
            "use_cpu": "true",
            "baseline": "false",
        }
        start(processes, script, *(f"--{name}={value}" for name, value in flags.items()))
        manifest = json.loads((folder / "run_manifest.json").read_text())
        assert manifest["world_size"] == processes
        figures[processes] = json.loads((folder / "metrics.json").read_text())["micro/test"]
    for system in ("bm25", "teacher", "student_before", "student"):
        assert figures[2][system]["nDCG@10"] == pytest.approx(figures[1][system]["nDCG@10"], abs=1e-3), system


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_that_would_train_alone_are_refused(tmp_path, micro, tiny_bert):
    script = Path(__file__).parents[1] / "run_scripts" / "run_distill.py"
    flags = ["--data", micro, "--teacher", tiny_bert, "--student", "layers:2", "--output_dir", tmp_path / "out"]
    done = start(2, script, *map(str, flags), "--per_device_train_batch_size", "4", check=False)
    assert done.returncode != 0
    assert "Add --use_cpu true" in done.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()
