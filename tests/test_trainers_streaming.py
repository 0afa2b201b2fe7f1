"""Training on streamed rows: the same batches as promised, after any interruption, on any number of processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import hf_distill
from hf_distill.cli.main import main
from hf_distill.data import RowSet, StreamedRows, load_collection
from hf_distill.errors import InputError
from hf_distill.evaluation import RetrievalEvaluation
from hf_distill.models import DenseRetriever, student_from
from hf_distill.teachers import CachedScores
from hf_distill.trainers import DistillTrainer, DistillTrainingArguments, RetrievalTrainer
from tests.test_trainers_training import arguments, assert_same, losses_of, weights


ROWS = 70
CONFIGS = Path(hf_distill.__file__).parent / "configs"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


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
    """Saves a checkpoint after a step and stops, as an interruption would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step >= self.step


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
        one = trainer(tiny_bert, stream, tmp_path / "cut", **settings)
        one.add_callback(StopAt(stop))
        one.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{start}") if start else None)
        seen += one.seen
    assert seen == straight.seen
    assert_same(weights(straight.model), weights(one.model))


def test_going_on_reads_no_batch_again(tiny_bert, stream, tmp_path, monkeypatch):
    first = trainer(tiny_bert, stream, tmp_path / "out")
    first.add_callback(StopAt(10))
    first.train()
    tokenised = []
    second = trainer(tiny_bert, stream, tmp_path / "out")
    collate = second.data_collator
    second.data_collator = lambda examples: tokenised.append(len(examples)) or collate(examples)
    second.train(resume_from_checkpoint=True)
    assert len(tokenised) == 4 + 1  # and the one that the loader reads ahead


def test_loader_workers_change_nothing(tiny_bert, collection, stream, tmp_path):
    runs = []
    for workers in (0, 2):
        one = trainer(
            tiny_bert,
            stream,
            tmp_path / str(workers),
            max_steps=-1,
            num_train_epochs=1,
            dataloader_num_workers=workers,
        )
        one.train()
        assert one.state.global_step == 17 and one.state.epoch == 1.0
        runs.append(one)
    assert runs[0].seen == runs[1].seen
    assert_same(weights(runs[0].model), weights(runs[1].model))
    seen, held = np.concatenate(runs[0].seen), make_rows(collection).query
    assert len(seen) == 68
    for query, number in zip(*np.unique(seen, return_counts=True)):
        assert number <= (held == query).sum()


def test_teacher_scores_sources_unlabelled_rows_and_evaluation(tiny_bert, collection, stream, tmp_path):
    args = arguments(
        tmp_path / "out",
        DistillTrainingArguments,
        num_negatives=3,
        num_train_epochs=2,
        max_steps=-1,
        losses='[{"name": "kl", "calibration": "temperature"}, {"name": "contrastive", "weight": 0.5}]',
        negative_sources='{"a": 1, "b": 3}',
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
    )
    one = DistillTrainer(
        student_from("layers:2", tiny_bert),
        args,
        teachers=[CachedScores("file")],
        rows=stream,
        evaluation=RetrievalEvaluation(collection, "dev", measures=["nDCG@10"]),
    )
    assert one.terms["kl"].calibration_temperature != 1.0  # fitted to the first rows of the stream
    one.train()
    assert one.state.global_step == 34 and len(losses_of(one)) == 34
    assert [entry["epoch"] for entry in one.state.log_history if "eval_nDCG@10" in entry] == [1.0, 2.0]
    with pytest.raises(InputError, match="no column 'scores_other'.*'scores', 'sources'"):
        DistillTrainer(one.model, args, teachers=[CachedScores("file", "scores_other")], rows=stream)


def test_a_stream_that_changed_is_refused(tiny_bert, collection, stream, tmp_path):
    one = trainer(tiny_bert, stream, tmp_path / "out", max_steps=2)
    one.add_callback(StopAt(2))
    one.train()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    other = save_in_parts(make_rows(collection, seed=1), tmp_path)
    changed = StreamedRows.open(other, collection.queries, collection.corpus)
    with pytest.raises(InputError, match="checkpoint-2.*on other data: the training rows changed"):
        trainer(tiny_bert, changed, tmp_path / "out").train(resume_from_checkpoint=checkpoint)
    with pytest.raises(InputError, match="shuffle_buffer was 20 and is 30"):
        trainer(tiny_bert, stream, tmp_path / "out", shuffle_buffer=30).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(InputError, match="queries in a batch of all processes was 4 and is 8"):
        again = trainer(tiny_bert, stream, tmp_path / "out", per_device_train_batch_size=8)
        again.train(resume_from_checkpoint=checkpoint)


def test_too_few_streamed_rows_for_a_batch(tiny_bert, stream, tmp_path):
    with pytest.raises(InputError, match="70 training rows do not fill one batch of 71"):
        trainer(tiny_bert, stream, tmp_path / "out", per_device_train_batch_size=71)


@pytest.mark.parametrize("name", ["dispatch_batches", "split_batches"])
def test_accelerate_may_not_divide_the_batches(name, tiny_bert, stream, tmp_path):
    one = trainer(tiny_bert, stream, tmp_path / "out", accelerator_config={name: True})
    with pytest.raises(InputError, match=f"{name}: every process reads its own part of a stream. Leave it out"):
        one.train()


# ---- Other processes ----
def run_settings(folder, micro, rows, model, **settings) -> dict:
    return {
        "collection": str(micro),
        "rows": str(rows),
        "model": str(model),
        "arguments": {
            "output_dir": str(folder),
            "use_cpu": True,
            "per_device_train_batch_size": 8,
            "num_negatives": 2,
            "shuffle_buffer": 20,
            "max_steps": 24,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "save_strategy": "no",
            "report_to": "none",
            "seed": 3,
            **settings,
        },
    }


def command(settings: list[dict], processes: int, folder: Path) -> list[str]:
    path = folder / f"settings-{processes}.json"
    path.write_text(json.dumps(settings))
    script = [str(Path(__file__).with_name("streaming_run.py")), str(path)]
    if processes == 1:
        return [sys.executable, *script]
    launch = ["--config_file", str(CONFIGS / "multi_cpu.yaml"), "--num_processes", str(processes)]
    return [sys.executable, "-m", "accelerate.commands.launch", *launch, "--main_process_port", "0", *script]


def run(*arguments) -> None:
    done = subprocess.run(command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def kill_after(arguments, checkpoint: Path) -> None:
    """Starts a run and kills all its processes at once when it has written a checkpoint."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = subprocess.Popen(command(*arguments), env=ENVIRONMENT, **quiet)
    try:
        deadline = time.monotonic() + 120
        while not (checkpoint / "trainer_state.json").is_file():
            assert running.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert running.poll() is None
    finally:
        # The launcher's workers have sessions of their own and would outlive it.
        started = psutil.Process(running.pid).children(recursive=True)
        for process in (running, *started):
            process.kill()
        running.wait()
        psutil.wait_procs(started)


def result(folder: Path, processes: int) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    """The global batches and the weights of a run."""
    parts = [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(processes)]
    assert {part["world_size"] for part in parts} == {processes}
    batches = [sum(batch, []) for batch in zip(*(part["batches"] for part in parts), strict=True)]
    return batches, load_file(folder / "weights")


@pytest.fixture(scope="module")
def runs(micro, tiny_bert_source, folder, tmp_path_factory):
    """`runs(processes)` is a folder with the run `cut`, killed in its second epoch of three and started again, the
    same one `straight`, and one with accumulated gradients; each made once."""
    found: dict[int, Path] = {}

    def make(processes: int) -> Path:
        if processes not in found:
            out = found[processes] = tmp_path_factory.mktemp(f"processes-{processes}")
            common = {"per_device_train_batch_size": 8 // processes}
            settings = {
                "cut": {"save_strategy": "steps", "save_steps": 1},
                "straight": {},
                "accumulated": {"gradient_accumulation_steps": 3, "dropout": 0.0, "max_steps": 6},
            }
            cut, *others = (
                run_settings(out / name, micro, folder, tiny_bert_source, **common, **more)
                for name, more in settings.items()
            )
            kill_after(([cut], processes, out), out / "cut" / "checkpoint-10")
            assert not (out / "cut" / "weights").exists()
            run([cut, *others], processes, out)
        return found[processes]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_killed_and_started_again(processes, runs):
    """After `kill -9` the same command ends with the weights of a straight run."""
    expected, resumed = (result(runs(processes) / name, processes) for name in ("straight", "cut"))
    assert len(expected[0]) == 24 and 0 < len(resumed[0]) <= 14
    assert resumed[0] == expected[0][-len(resumed[0]) :]
    assert_same(expected[1], resumed[1])


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_on_the_batches_of_one(runs):
    """The same rows in every global batch, in the same order, over the ends of epochs; and so the same training."""
    one, two = (
        {name: result(runs(processes) / name, processes) for name in ("straight", "accumulated")}
        for processes in (1, 2)
    )
    assert one["straight"][0] == two["straight"][0]
    assert one["accumulated"][0] == two["accumulated"][0] == one["straight"][0][:16]
    for name, tensor in one["accumulated"][1].items():
        torch.testing.assert_close(two["accumulated"][1][name], tensor, rtol=1e-3, atol=2e-4, msg=name)


# ---- The command line ----
def train_flags(micro, folder, model, out, *more) -> list[str]:
    flags = {
        "data": micro,
        "rows": folder,
        "streaming": "true",
        "output_dir": out,
        "use_cpu": "true",
        "per_device_train_batch_size": 8,
        "num_negatives": 3,
        "max_steps": 12,
        "report_to": "none",
        "eval_strategy": "no",
    }
    start = ["train", "--model", str(model)] if not more else list(more)
    return [*start, *(f"--{name}={value}" for name, value in flags.items())]


def test_the_verb_train_streams(micro, folder, tiny_bert, tmp_path, monkeypatch):
    def held(*arguments, **settings):
        raise AssertionError("the rows were read whole")

    monkeypatch.setattr(RowSet, "_cached", held)
    main(train_flags(micro, folder, tiny_bert, tmp_path / "out"))
    manifest = json.loads((tmp_path / "out" / "run_manifest.json").read_text())
    assert manifest["data"]["rows"]["number"] == ROWS
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"bm25", "before", "trained"} <= set(metrics["micro/test"])


def test_the_verb_distill_streams_a_column_of_scores(micro, folder, tiny_bert, tmp_path):
    more = ["distill", "--teacher", "column:scores", "--student", str(tiny_bert)]
    main(train_flags(micro, folder, tiny_bert, tmp_path / "out", *more))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"student", "student_no_teacher"} <= set(metrics["micro/test"])
    state = json.loads((tmp_path / "out" / "checkpoint-12" / "training_rows.json").read_text())
    assert state["order"]["streamed"] and state["order"]["shuffle_buffer"] == 10_000


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--max_queries", "8"], "no sample can be drawn from rows that are streamed"),
        (["--rows=nowhere"], "there is no row set 'nowhere'"),
        (["--num_negatives", "-1"], "-1 is not a number of negatives"),
    ],
)
def test_wishes_that_streams_cannot_meet(more, problem, micro, folder, tiny_bert, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([*train_flags(micro, folder, tiny_bert, tmp_path / "out"), *more])
    assert end.value.code == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_stream_needs_a_row_set(micro, folder, tiny_bert, tmp_path, capsys):
    flags = train_flags(micro, folder, tiny_bert, tmp_path / "out")
    with pytest.raises(SystemExit):
        main([flag for flag in flags if not flag.startswith("--rows")])
    assert "Name one with --rows, or leave --streaming out" in capsys.readouterr().err


def test_a_ranker_scores_no_stream(micro, folder, tiny_bert, tiny_ranker, tmp_path, capsys):
    more = ["distill", "--teacher", str(tiny_ranker), "--student", str(tiny_bert)]
    with pytest.raises(SystemExit):
        main(train_flags(micro, folder, tiny_bert, tmp_path / "out", *more))
    assert "--teacher_mode live" in capsys.readouterr().err


def _main(flags):
    main(flags)
    return "done"


def test_rows_of_a_repository(hub, hub_client, micro, folder, tiny_bert, tmp_path):
    """`--rows ID --streaming true`: the same model as from the same files in a folder, and nothing of them is kept."""
    files = {f"data/{file.name}": file.read_bytes() for file in folder.glob("*.parquet")}
    hub.add_repo("alice/rows", files, kind="dataset", private=True)
    settings = [micro, "alice/rows", tiny_bert, tmp_path / "hub"]
    assert hub_client(_main, train_flags(*settings)) == "done"
    main(train_flags(micro, folder, tiny_bert, tmp_path / "folder"))
    assert_same(*(load_file(tmp_path / name / "model.safetensors") for name in ("hub", "folder")))
    got = {request.status for request in hub.requests if request.method == "GET" and request.path.endswith(".parquet")}
    assert got == {206}
