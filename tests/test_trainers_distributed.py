"""Loss, gradient and trajectory are the same on one process, on two, with accumulation, with caching, and sharded."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from hf_distill.data import RowSet, load_collection

from .test_models_gradient_caching_golden import CHUNKS, GOLDEN


pytestmark = [pytest.mark.slow, pytest.mark.distributed]

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
STEPS = 2
# Losses by name. The first four are means over a query's own candidates, so that accumulation changes nothing.
OWN = {
    "contrastive": [{"name": "contrastive", "candidates": "own"}],
    "kl": [{"name": "kl", "teacher": "file"}],
    "margin_mse": [{"name": "margin_mse", "teacher": "ranker", "weight": 0.3}],
    "embedding_mse": [{"name": "embedding_mse", "teacher": "dense", "weight": 5}],
}
GLOBAL = {
    "contrastive_global": [{"name": "contrastive", "candidates": "global"}],
    "kl_global": [{"name": "kl", "teacher": "dense", "candidates": "global"}, {"name": "kl", "teacher": "file"}],
    "lexical": [{"name": "contrastive", "candidates": "global"}, {"name": "flops", "weight": 0.05}],
}
# Means over pairs of candidates, of which every process and every accumulated batch has another number.
PAIRS = {
    "rank_consistency": [{"name": "rank_consistency", "teacher": "file", "margin": 0.5, "min_teacher_gap": 0.7}],
    "pairwise_margin_mse": [{"name": "pairwise_margin_mse", "teacher": "file", "softmax": False}],
}
LOSSES = OWN | GLOBAL | PAIRS
ACCUMULATED = {"gradient_accumulation_steps": 4}
CACHED = {"gradient_cache_size": 2}
WAYS = {"plain": {}, "accumulated": ACCUMULATED, "cached": CACHED, "accumulated_cached": ACCUMULATED | CACHED}
MATRIX = [(loss, way) for loss in LOSSES for way in WAYS if loss in OWN or "accumulated" not in way]
# Under the sharding engines: every kind of loss, and every way once.
SHARDED = [
    ("contrastive_global", "cached"), ("kl", "accumulated"), ("margin_mse", "plain"), ("embedding_mse", "plain"),
]  # fmt: skip
has_deepspeed = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not has_deepspeed, reason="DeepSpeed is not installed")


def start(*words: str, check: bool = True) -> subprocess.CompletedProcess:
    """Runs a command of this environment's Python."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done


def accelerate(config: str, script: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess:
    """Runs a script in two processes under `accelerate launch` with one of our configurations."""
    path = ROOT / "hf_distill" / "configs" / f"{config}.yaml"
    options = ["--config_file", path, "--num_processes", "2", "--main_process_port", "0"]
    return start("-m", "accelerate.commands.launch", *options, script, *words, check=check)


@pytest.fixture(scope="module")
def models(tmp_path_factory, micro, tiny_bert_source, tiny_ranker_source) -> dict[str, str]:
    """What every job opens. Its rows have two positives for some queries, so that false negatives are masked."""
    collection = load_collection(micro, cache_dir=tmp_path_factory.mktemp("collection"))
    positives = collection.qrels["train"].positives()
    queries = collection.qrels["train"].query_positions()[:16]
    folder = tmp_path_factory.mktemp("rows")
    for name in ("rows", "labelled", "repeated"):
        generator = np.random.default_rng(5)
        documents, counts, scores = [], [], []
        for number, query in enumerate(queries):
            relevant = positives.of(query)
            # Few candidates for all queries, so that a query's positive is often another query's negative.
            others = np.setdiff1d(np.arange(20), relevant)
            # A single negative is given twice to its query.
            pool = generator.choice(others, 1 if name == "repeated" and number % 3 == 0 else 5, replace=False)
            labelled = name == "labelled" or number % 5 != 4
            documents.append(np.concatenate([relevant, pool]) if labelled else pool)
            counts.append(len(relevant) if labelled else 0)
            scores.append(generator.normal(size=len(documents[-1])))
        rows = RowSet.from_arrays(collection.queries, collection.corpus, queries, documents, counts, scores=scores)
        rows.save(folder / name)
    return {
        "collection": str(micro),
        "rows": str(folder / "rows"),
        "labelled": str(folder / "labelled"),
        "repeated": str(folder / "repeated"),
        "teacher": str(tiny_bert_source),
        "ranker": str(tiny_ranker_source),
    }


def job(models: dict[str, str], folder: Path, processes: int, loss: str, way: str = "plain", **more: Any) -> dict:
    """A training of a few steps of 8 queries in all, whatever the number of processes and of accumulated batches."""
    changed = WAYS[way] | more.pop("arguments", {})
    name = more.pop("name", f"{loss}-{way}")
    batch = 8 // processes // changed.get("gradient_accumulation_steps", 1)
    return {
        **models,
        # The mean over labelled queries is the mean of means only if every part of a batch has as many of them.
        "rows": models["labelled" if loss == "contrastive" else "repeated" if loss in PAIRS else "rows"],
        "result": str(folder / f"{name}.json"),
        "arguments": {
            "output_dir": str(folder / name),
            "use_cpu": True,
            "per_device_train_batch_size": batch,
            "num_negatives": 2,
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "dropout": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "losses": json.dumps(LOSSES[loss]),
            **changed,
        },
        "lexical": loss == "lexical",
        **more,
    }


def two_towers(models: dict[str, str], folder: Path, processes: int) -> list[dict]:
    """Trainings of a query tower and a passage tower on the passages of all processes, in both precisions."""
    return [
        job(models, folder, processes, "contrastive_global", way, name=f"towers-{precision}-{way}", untied=True,
            arguments={"bf16": precision == "bf16"} | WAYS[way])
        for precision in ("float32", "bf16")
        for way in ("plain", "cached")
    ]  # fmt: skip


def other_students(models: dict[str, str], folder: Path, processes: int, prefix: str = "", **more: Any) -> list[dict]:
    """Trainings of two towers, and of adapters (LoRA) on frozen weights, that end with an export."""
    more |= {"export": True}
    return [
        job(models, folder, processes, "contrastive_global", name=f"{prefix}{name}", **{name: True}, **more)
        for name in ("untied", "adapters")
    ]


def life(models: dict[str, str], folder: Path, processes: int) -> list[dict]:
    """A training with evaluations and a checkpoint, and one that goes on from the checkpoint.

    A projection is trained along that is not part of the exported model.
    """
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    begun = job(models, folder, processes, "embedding_mse", name="life", arguments=often, projection=True, export=True)
    resumed = job(models, folder, processes, "embedding_mse", name="resumed", arguments=often, projection=True)
    return [begun, {**resumed, "resume": str(folder / "life" / "checkpoint-2")}]


def pretraining(models: dict[str, str], folder: Path, processes: int) -> list[dict]:
    """Pre-trainings of a few steps of 8 texts in all: a corpus, and a stream, which loader workers tokenise."""
    jobs = []
    for name, workers in (("pretraining", 0), ("streamed_pretraining", processes - 1)):
        more = {"arguments": {"dataloader_num_workers": workers}, "streamed": name != "pretraining"}
        one = job(models, folder, processes, "lexical", name=name, **more) | {"kind": "pretrain"}
        for unknown in ("num_negatives", "losses", "dropout"):
            del one["arguments"][unknown]
        jobs.append(one)
    return jobs


def common_folder(tmp_path_factory, name: str) -> Path:
    """A folder that all workers of pytest-xdist have in common."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"distributed-{name}"
    folder.mkdir(exist_ok=True)
    return folder


def once(folder: Path, work: Callable[[], Any]) -> None:
    """Does work in one worker of pytest-xdist; the others wait for it and read what it left in the folder."""
    with FileLock(folder / ".lock"):
        if not (folder / ".done").exists():
            work()
            (folder / ".done").touch()


def run_jobs(jobs: list[dict], folder: Path, config: str | None) -> dict[str, dict]:
    """All jobs in one launch, since starting costs more than training; what each saw, by its name."""
    path, script = folder / "settings.json", Path(__file__).with_name("distributed_run.py")

    def work() -> None:
        path.write_text(json.dumps(jobs))
        start(script, path) if config is None else accelerate(config, script, path)

    once(folder, work)
    results = [Path(one["result"]) for one in jobs if "result" in one]
    return {path.stem: json.loads(path.read_text()) for path in results}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, models):
    folder = common_folder(tmp_path_factory, "one")
    jobs = [job(models, folder, 1, loss, way) for loss, way in MATRIX]
    jobs += [*two_towers(models, folder, 1), *other_students(models, folder, 1), *life(models, folder, 1)]
    jobs += pretraining(models, folder, 1)
    return {"folder": folder, **run_jobs(jobs, folder, None)}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, models):
    folder = common_folder(tmp_path_factory, "two")
    jobs = [job(models, folder, 2, loss, way) for loss, way in MATRIX]
    for name, way in (("divided", "plain"), ("divided_cached", "cached")):
        jobs.append(job(models, folder, 2, "kl_global", way, name=name, fully_shard=True, export=True))
    jobs.append(job(models, folder, 2, "kl_global", name="whole", export=True))
    jobs += [*two_towers(models, folder, 2), *other_students(models, folder, 2, "divided_", fully_shard=True)]
    jobs += pretraining(models, folder, 2)
    jobs.append({"kind": "golden", "result": str(folder / "golden.json")})
    return {"folder": folder, **run_jobs(jobs, folder, "multi_cpu")}


@pytest.fixture(scope="module", params=["zero2", "zero3"])
def deepspeed(request, tmp_path_factory, models, command):
    """What two processes under DeepSpeed saw; the last job is the whole command of the fixture `command`."""
    folder = common_folder(tmp_path_factory, request.param)
    jobs = [job(models, folder, 2, loss, way) for loss, way in SHARDED]
    jobs += [*other_students(models, folder, 2), *life(models, folder, 2)]
    if request.param == "zero3":
        jobs.append({"command": command["words"](folder / "command", 2)})
    seen = run_jobs(jobs, folder, request.param)
    return {"stage": request.param, "folder": folder, **seen}


def assert_same_training(one: dict, other: dict, steps: int = STEPS) -> None:
    assert len(one["history"]) == len(other["history"]) == steps
    for step, (ours, theirs) in enumerate(zip(one["history"], other["history"])):
        assert ours["grad_norm"] > 0
        for part in set(ours) - {"epoch", "step", "learning_rate"}:
            assert theirs[part] == pytest.approx(ours[part], rel=2e-4, abs=1e-6), (step, part)
    assert_same_weights(one, other)


def assert_same_weights(one: dict, other: dict) -> None:
    assert set(one["weights"]) == set(other["weights"])
    for weight, total in one["weights"].items():
        assert other["weights"][weight] == pytest.approx(total, rel=1e-4, abs=2e-3), weight


def exported(folder: Path, file: str | Path = "model.safetensors") -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / file)


@pytest.mark.parametrize(("loss", "way"), MATRIX)
def test_processes_accumulation_and_caching_change_nothing(loss, way, one_process, two_processes):
    reference = one_process[f"{loss}-plain"]
    two = two_processes[f"{loss}-{way}"]
    assert (reference["world_size"], two["world_size"]) == (1, 2)
    assert two["engine"] == "DistributedDataParallel"
    assert_same_training(reference, one_process[f"{loss}-{way}"])
    assert_same_training(reference, two)


@pytest.mark.parametrize("name", ["pretraining", "streamed_pretraining"])
def test_pretraining_is_the_same_on_two_processes(name, one_process, two_processes):
    """Means over the tokens of the joint batch, though one process has more of them than the other."""
    reference, two = one_process[name], two_processes[name]
    assert (reference["world_size"], two["world_size"]) == (1, 2)
    assert {"encoder_loss", "decoder_loss"} <= set(reference["history"][0])
    assert_same_training(reference, two)


def test_the_golden_steps_of_gradient_caching_shared_by_two_processes(two_processes):
    seen = two_processes["golden"]
    assert seen.pop("world_size") == 2 and len(seen) == 2 * len(CHUNKS)
    golden = np.load(GOLDEN)
    for name, found in seen.items():
        tag = name.partition("-")[0]
        assert found["loss"] == pytest.approx(float(golden[f"{tag}.loss"]), abs=1e-5), name
        assert 2 * found["loss"] == pytest.approx(float(golden[f"{tag}.ddp2.raw_loss_rank0"]), abs=2e-5), name
        assert 2 * found["loss"] == pytest.approx(float(golden[f"{tag}.ddp2_gc.raw_loss_rank0"]), abs=2e-5), name
        np.testing.assert_allclose(found["scores"], golden[f"{tag}.scores"], atol=1e-5, err_msg=name)
        prefix = f"{tag}.grad."
        stored = {key.removeprefix(prefix): golden[key] for key in golden.files if key.startswith(prefix)}
        assert set(found["gradients"]) == set(stored)
        for weight, gradient in stored.items():
            np.testing.assert_allclose(found["gradients"][weight], gradient, atol=2e-6, err_msg=f"{name} {weight}")


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_two_towers_cached_on_two_processes(precision, one_process, two_processes):
    """Untied towers, gradient caching and the passages of all processes together, the scores in float32."""
    reference = one_process[f"towers-{precision}-plain"]
    assert any(name.startswith("passage") for name in reference["weights"])
    for seen in (one_process[f"towers-{precision}-cached"], two_processes[f"towers-{precision}-cached"]):
        assert seen["score_dtypes"] == reference["score_dtypes"] == ["torch.float32"]
        if precision == "float32":
            assert_same_training(reference, seen)
            continue
        # Rounding in bf16 depends on the shapes of batches; Adam makes as much of a small gradient as of a large one.
        for ours, theirs in zip(reference["history"], seen["history"], strict=True):
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-3)
            assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-2)


@needs_deepspeed
@pytest.mark.parametrize(("loss", "way"), SHARDED)
def test_deepspeed_trains_as_one_process_does(loss, way, one_process, deepspeed):
    seen = deepspeed[f"{loss}-{way}"]
    assert (seen["world_size"], seen["engine"]) == (2, "DeepSpeedEngine")
    assert seen["sharded"] == (deepspeed["stage"] == "zero3")
    assert seen["teachers_are_plain"]
    assert_same_training(one_process[f"{loss}-plain"], seen)


@needs_deepspeed
def test_deepspeed_evaluates_exports_and_resumes(one_process, deepspeed):
    reference, seen, resumed = one_process["life"], deepspeed["life"], deepspeed["resumed"]
    assert_same_training(reference, seen, steps=4)
    assert seen["measures"] == pytest.approx(reference["measures"], abs=1e-6) and len(seen["measures"]) == 2
    # The history of a resumed training begins with what its checkpoint remembers.
    assert_same_training(seen, resumed, steps=4)
    folder = deepspeed["folder"] / "life"
    files = {**exported(folder), **exported(folder, "training_modules.safetensors")}
    assert all(name.removeprefix("backbone.") in files for name in seen["weights"])
    for name, total in seen["weights"].items():
        assert files[name.removeprefix("backbone.")].double().sum().item() == pytest.approx(total, abs=1e-4), name


def assert_same_export(one: Path, other: Path) -> None:
    import torch

    names = {path.relative_to(one) for path in one.rglob("*.safetensors")}
    assert names == {path.relative_to(other) for path in other.rglob("*.safetensors")} != set()
    for name in names:
        ours, theirs = exported(one, name), exported(other, name)
        assert ours.keys() == theirs.keys()
        assert name.name == "training_modules.safetensors" or not any("lora" in weight for weight in ours), "merged"
        for weight, tensor in ours.items():
            torch.testing.assert_close(theirs[weight], tensor, rtol=1e-4, atol=1e-5)


@needs_deepspeed
@pytest.mark.parametrize("student", ["untied", "adapters"])
def test_two_towers_and_adapters_under_deepspeed(student, one_process, deepspeed):
    assert_same_training(one_process[student], deepspeed[student])
    assert_same_export(one_process["folder"] / student, deepspeed["folder"] / student)


@pytest.mark.parametrize("student", ["untied", "adapters"])
def test_two_towers_and_adapters_divided_by_fully_shard(student, one_process, two_processes):
    seen = two_processes[f"divided_{student}"]
    assert seen["sharded"]
    assert_same_training(one_process[student], seen)
    assert_same_export(one_process["folder"] / student, two_processes["folder"] / f"divided_{student}")


def test_resuming_is_exact_in_one_process(one_process):
    assert_same_training(one_process["life"], one_process["resumed"], steps=4)


@pytest.mark.parametrize("name", ["divided", "divided_cached"])
def test_weights_divided_by_fully_shard_train_and_export_as_whole_ones(name, one_process, two_processes):
    import torch

    seen, folder = two_processes[name], two_processes["folder"]
    assert (seen["engine"], seen["sharded"]) == ("FSDPDenseRetriever", True)
    assert two_processes["whole"]["sharded"] is False
    assert_same_training(one_process["kl_global-plain"], seen)
    divided, whole = exported(folder / name), exported(folder / "whole")
    assert divided.keys() == whole.keys()
    for weight, tensor in whole.items():
        torch.testing.assert_close(divided[weight], tensor, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def command(tmp_path_factory, micro, tiny_bert_source):
    """The whole command in one process, by its script; its figures, and how to type it for another launch."""

    def words(folder: Path, processes: int, **more: Any) -> list[str]:
        flags = {
            "data": micro,
            "teacher": tiny_bert_source,
            "student": "layers:2",
            "output_dir": folder,
            "cache_dir": folder.parent / "cache",
            "max_steps": 3,
            "per_device_train_batch_size": 8 // processes,
            "num_negatives": 2,
            "mine_depth": 20,
            "dropout": 0.0,
            "dtype": "float32",
            "teacher_dtype": "float32",
            "learning_rate": 1e-3,
            "use_cpu": "true",
            **more,
        }
        return ["distill", *(f"--{name}={value}" for name, value in flags.items())]

    folder = common_folder(tmp_path_factory, "command")
    once(folder, lambda: start(ROOT / "run_scripts" / "run_distill.py", *words(folder / "one", 1)[1:]))
    return {"words": words, "folder": folder / "one"}


def assert_same_command(one: Path, other: Path) -> None:
    assert json.loads((other / "run_manifest.json").read_text())["world_size"] == 2
    ours, theirs = (json.loads((folder / "metrics.json").read_text())["micro/test"] for folder in (one, other))
    for system in ("bm25", "teacher", "student_before", "student_no_teacher", "student"):
        assert theirs[system]["nDCG@10"] == pytest.approx(ours[system]["nDCG@10"], abs=1e-3), system


def test_the_whole_command_on_two_processes(command, tmp_path):
    """Mining, encoding, training and evaluation shared by two processes give the figures of one."""
    words = command["words"](tmp_path / "two", 2)
    start("-m", "hf_distill", "--launch", "cpu:2", *[word for word in words if word != "--use_cpu=true"])
    assert_same_command(command["folder"], tmp_path / "two")


@needs_deepspeed
@pytest.mark.parametrize("deepspeed", ["zero3"], indirect=True)
def test_the_whole_command_under_zero3(command, deepspeed):
    folder = deepspeed["folder"] / "command"
    assert_same_command(command["folder"], folder)
    assert exported(folder).keys() == exported(command["folder"]).keys()
    student = json.loads((folder / "run_manifest.json").read_text())["models"]["student"]
    assert student["parameters"] == sum(tensor.numel() for tensor in exported(folder).values())


def test_processes_that_would_train_alone_are_refused(tmp_path, micro, tiny_bert):
    script = ROOT / "run_scripts" / "run_distill.py"
    flags = ["--data", micro, "--teacher", tiny_bert, "--student", "layers:2", "--output_dir", tmp_path / "out"]
    done = accelerate("multi_cpu", script, *flags, "--per_device_train_batch_size", "4", check=False)
    assert done.returncode != 0
    assert done.stderr.count("Add --use_cpu true") == 1
    assert not (tmp_path / "out" / "model.safetensors").exists()
