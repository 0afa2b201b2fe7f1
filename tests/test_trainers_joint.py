"""Student and teacher trained at once: both learn, are saved, and go on after a kill, on any number of processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import AutocastKwargs
from safetensors.torch import load_file
from transformers import get_scheduler

from hf_distill.data import RowSet, load_collection
from hf_distill.errors import InputError
from hf_distill.losses import contrastive_loss, kl_loss, layer_alignment_loss
from hf_distill.models import CrossEncoderRanker, DenseRetriever, MultiVectorRetriever, load_model
from hf_distill.teachers import CachedScores, JointTeacher, LiveTeacher
from hf_distill.trainers import DistillTrainer, DistillTrainingArguments
from hf_distill.trainers.joint import joint_schedules

from .joint_run import make_trainer
from .model_zoo import save_tiny


SCRIPT = Path(__file__).with_name("joint_run.py")
# Every kind of teacher jointly, and frozen ones whose weights of layers depend on rows of all processes.
JOBS = {
    "joint-tokens": {"teacher": "tokens"},
    "joint-pair": {"teacher": "pair"},
    "live-pair": {"teacher": "pair", "mode": "live"},
    "live-tokens": {"teacher": "tokens", "mode": "live"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, micro, tiny_tokenizer) -> dict[str, str]:
    """What every job opens; passages of very different lengths, so that processes pad differently."""
    collection = load_collection(micro, cache_dir=tmp_path_factory.mktemp("collection"))
    positives = collection.qrels["train"].positives()
    queries = collection.qrels["train"].query_positions()[:16]
    generator = np.random.default_rng(5)
    documents = [
        np.concatenate([positives.of(q), generator.choice(np.setdiff1d(np.arange(30), positives.of(q)), 5, False)])
        for q in queries
    ]
    counts = [len(positives.of(query)) for query in queries]
    rows = RowSet.from_arrays(collection.queries, collection.corpus, queries, documents, counts)
    folder = rows.save(tmp_path_factory.mktemp("rows") / "rows")
    # Models whose texts differ: those of the small initial weights have almost no gradient.
    sources = tmp_path_factory.mktemp("models")
    bert = save_tiny(sources / "bert", "bert", tiny_tokenizer)
    ranker = save_tiny(sources / "ranker", "bert", tiny_tokenizer, head="SequenceClassification", num_labels=1)
    return {"collection": str(micro), "rows": str(folder), "bert": str(bert), "ranker": str(ranker)}


def job(models: dict[str, str], folder: Path, name: str, processes: int = 1, **more) -> dict:
    settings = {**models, **JOBS.get(name, {}), **more, "result": str(folder / f"{name}.json")}
    settings["arguments"] = {
        "output_dir": str(folder / name),
        "use_cpu": True,
        "per_device_train_batch_size": 8 // processes,
        "num_negatives": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "teacher_learning_rate": 5e-4,
        "teacher_warmup_steps": 2,
        "warmup_steps": 0,
        "dropout": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "method": "lead",
        "num_layer_pairs": 2,
        "layer_resample_every": 2,
        "max_grad_norm": 0.5,
        "seed": 1,
        **more.get("arguments", {}),
    }
    return settings


def launch(jobs: list[dict], folder: Path, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    path = folder / f"jobs-{processes}.json"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, str(SCRIPT), str(path)]
    if processes > 1:
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
            "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
            str(SCRIPT), str(path),
        ]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(SCRIPT.parents[1]),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory, models) -> dict[int, dict[str, dict]]:
    """What every job saw on one process and on two."""
    found = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"processes-{processes}")
        launch([job(models, folder, name, processes) for name in JOBS], folder, processes)
        found[processes] = {name: json.loads((folder / f"{name}.json").read_text()) for name in JOBS}
    return found


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", JOBS)
def test_two_processes_equal_one(name, runs):
    one, two = runs[1][name], runs[2][name]
    assert two["engine"] == "DistributedDataParallel" and len(one["history"]) == len(two["history"]) == 4
    for step, (ours, theirs) in enumerate(zip(one["history"], two["history"])):
        for part in set(ours) - {"epoch", "step"}:
            assert theirs[part] == pytest.approx(ours[part], rel=3e-4, abs=1e-6), (step, part)
    for weight, total in one["weights"].items():
        assert two["weights"][weight] == pytest.approx(total, rel=1e-4, abs=3e-3), weight


def test_both_learn_by_the_objective_of_the_paper(models, tmp_path):
    trainer = make_trainer(
        job(models, tmp_path, "joint-tokens", arguments={"max_steps": 1, "teacher_warmup_steps": 0})
    )
    student, teacher = trainer.model.student, trainer.model.teacher
    assert list(trainer.terms) == ["contrastive", "teacher_contrastive", "kl", "teacher_kl", "layer_alignment"]
    for term in trainer.terms.values():
        term.mask_false_negatives = False
    batch = next(iter(trainer.get_train_dataloader()))
    pairs = trainer.layers
    pairs.begin_step(0)
    mine, theirs = pairs.pairs["teacher"]
    student.eval(), teacher.eval()
    with torch.no_grad():
        ours = student(**batch["tokens"]["student"], layers=mine)
        other = teacher(**batch["tokens"]["teacher"], layers=theirs)
        s, t = student.batch_scores(ours, batch, "global"), teacher.batch_scores(other, batch, "global")
        layers = student.layer_scores(ours, batch, "global"), teacher.layer_scores(other, batch, "global")
    target = torch.arange(8) * 3
    expected = {
        "contrastive": contrastive_loss(s, target),
        "teacher_contrastive": contrastive_loss(t, target),
        "kl": kl_loss(s, t),
        "teacher_kl": kl_loss(t, s),
        "layer_alignment": layer_alignment_loss(*layers, target),
    }
    before = {name: one.clone() for name, one in trainer.model.state_dict().items()}
    trainer.train()
    logged = trainer.state.log_history[0]
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value.item(), rel=1e-4), name
    changed = {name for name, one in trainer.model.state_dict().items() if not torch.equal(one, before[name])}
    for who in ("student", "teacher"):
        assert any(name.startswith(who) and "layer.0" in name for name in changed), who


def test_rate_schedule_and_clipping_of_each(models, tmp_path):
    settings = {"max_grad_norm": 0.05, "lr_scheduler_type": "constant", "teacher_lr_scheduler_type": "linear"}
    trainer = make_trainer(job(models, tmp_path, "rates", teacher="dense", arguments=settings))
    norms = []
    clip = trainer._clip_grad_norm

    def watched(model):
        found = clip(model)
        both = (trainer.model.student, trainer.model.teacher)
        norms.append(
            [torch.nn.utils.get_total_norm([p.grad for p in one.parameters() if p.grad is not None]) for one in both]
        )
        return found

    trainer._clip_grad_norm = watched
    trainer.train()
    for student, teacher in norms:
        assert student == pytest.approx(0.05, rel=1e-3) and teacher == pytest.approx(0.05, rel=1e-3)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["learning_rate"] for entry in history] == [1e-3] * 4
    # The rates that the steps were made with: two of warm-up, then two on the way down to nothing.
    assert [entry["teacher_learning_rate"] for entry in history] == pytest.approx([0.0, 2.5e-4, 5e-4, 2.5e-4])
    assert all(entry["teacher_grad_norm"] > 0.05 for entry in history)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("cosine_with_min_lr", {"min_lr": 1e-4}),
        ("cosine_with_restarts", {"num_cycles": 2}),
        ("warmup_stable_decay", {"num_decay_steps": 3}),
        ("polynomial", {"lr_end": 5e-5, "power": 2.0}),
    ],
)
def test_schedules_and_their_arguments(kind, given, models, tmp_path):
    settings = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": given, "max_steps": 8}
    trainer = make_trainer(job(models, tmp_path, "schedules", teacher="dense", arguments=settings))
    trainer.create_optimizer_and_scheduler(8)
    expected = []
    for rate, warmup in ((1e-3, 0), (5e-4, 2)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
        expected.append(get_scheduler(kind, optimizer, warmup, 8, given))
    by_model = [group["model"] for group in trainer.optimizer.param_groups]
    for step in range(9):
        rates = dict(zip(by_model, trainer.lr_scheduler.get_last_lr()))
        for who, one in zip(("student", "teacher"), expected):
            assert rates[who] == pytest.approx(one.get_last_lr()[0], abs=1e-9), (who, step)
            one.optimizer.step(), one.step()
        trainer.optimizer.step(), trainer.lr_scheduler.step()


def test_a_teacher_of_another_schedule_has_its_defaults():
    args = DistillTrainingArguments(
        use_cpu=True,
        warmup_steps=0,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs='{"min_lr_rate": 0.25}',
        teacher_lr_scheduler_type="linear",
    )
    schedules = joint_schedules(args, 10)
    assert schedules["student"](10) == pytest.approx(0.25) and schedules["teacher"](10) == 0.0


def test_a_joint_training_of_warm_up_alone_is_said(models, tmp_path, caplog):
    caplog.set_level("WARNING", logger="hf_distill")
    for student, teacher, said in ((4, 0, "--warmup_steps 0"), (0, 4, "--teacher_warmup_steps 0"), (0, 3, None)):
        caplog.clear()
        settings = {"warmup_steps": student, "teacher_warmup_steps": teacher}
        trainer = make_trainer(job(models, tmp_path, "warm", teacher="dense", arguments=settings))
        trainer.create_optimizer_and_scheduler(4)
        found = [record.getMessage() for record in caplog.records if "all of them warm-up" in record.getMessage()]
        assert len(found) == (said is not None) and all(said in message for message in found)


def test_float16_takes_the_loss_scale_out_once(models, tmp_path, monkeypatch):
    """On a CPU accelerate makes no scaler of its own, so one is put in, and autocast is left out."""
    settings = {"max_steps": 2, "max_grad_norm": 0.05, "teacher_warmup_steps": 0}
    plain = make_trainer(job(models, tmp_path, "plain", teacher="dense", arguments=settings))
    plain.train()
    trainer = make_trainer(job(models, tmp_path, "scaled", teacher="dense", arguments=settings))
    monkeypatch.setitem(trainer.accelerator.state._shared_state, "_mixed_precision", "fp16")
    monkeypatch.setattr(trainer.accelerator, "autocast_handler", AutocastKwargs(enabled=False))
    trainer.accelerator.native_amp, trainer.accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 1024.0 and trainer.state.global_step == 2
    for ours, theirs in zip(trainer.state.log_history[:2], plain.state.log_history[:2]):
        for name in ("grad_norm", "teacher_grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4) and ours[name] > 0.05
    for name, tensor in plain.model.state_dict().items():
        assert torch.allclose(tensor, trainer.model.state_dict()[name], atol=1e-4), name


def test_both_are_exported(models, tmp_path):
    trainer = make_trainer(job(models, tmp_path, "joint-tokens", arguments={"max_steps": 2}))
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    student, teacher = load_model(tmp_path / "saved"), load_model(tmp_path / "saved" / "teacher")
    assert isinstance(student, DenseRetriever) and isinstance(teacher, MultiVectorRetriever)
    for ours, opened in ((trainer.model.student, student), (trainer.model.teacher, teacher)):
        for name, tensor in opened.state_dict().items():
            assert torch.equal(tensor, ours.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["tokens"])
def test_killed_and_resumed_equals_uninterrupted(teacher, models, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "dropout": 0.1}
    straight = make_trainer(job(models, tmp_path, "straight", teacher=teacher, arguments=saving))
    straight.train()
    killed = job(models, tmp_path, "killed", teacher=teacher, kill_at=3, arguments=saving)
    done = launch([killed], tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    folder = tmp_path / "killed"
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2"]
    assert (folder / "checkpoint-2" / "teacher" / "model.safetensors").is_file()
    resumed = make_trainer(job(models, tmp_path, "killed", teacher=teacher, arguments=saving))
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    one, two = straight.model.state_dict(), resumed.model.state_dict()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    straight.save_model(tmp_path / "one"), resumed.save_model(tmp_path / "two")
    for part in ("model.safetensors", "teacher/model.safetensors"):
        ours, theirs = load_file(tmp_path / "one" / part), load_file(tmp_path / "two" / part)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_refusals(models, tmp_path, tiny_bert):
    settings = job(models, tmp_path, "refused", teacher="dense")
    collection = load_collection(models["collection"])
    rows = RowSet.load(models["rows"], collection.queries, collection.corpus)
    dense = DenseRetriever.from_pretrained(tiny_bert)

    def trainer(teachers, **more):
        args = DistillTrainingArguments(**{**settings["arguments"], **more})
        return DistillTrainer(DenseRetriever.from_pretrained(tiny_bert), args, teachers, rows=rows)

    with pytest.raises(InputError, match="2 teachers are to be trained along.*freeze the others"):
        trainer([JointTeacher("a", dense), JointTeacher("b", DenseRetriever.from_pretrained(tiny_bert))])
    with pytest.raises(InputError, match="cannot be trained together under FSDP.*--multi_gpu"):
        args = DistillTrainingArguments(**settings["arguments"])
        args.fsdp = ["full_shard"]
        DistillTrainer(DenseRetriever.from_pretrained(tiny_bert), args, [JointTeacher("a", dense)], rows=rows)
    with pytest.raises(InputError, match="trains the teacher 'a', which is frozen.*joint"):
        trainer(
            [LiveTeacher("a", dense)], losses='[{"name": "contrastive", "learner": "teacher", "candidates": "own"}]'
        )
    # Before the first step: these options are all that a schedule depends on.
    for options, problem in (
        ({"teacher_lr_scheduler_type": "reduce_lr_on_plateau"}, "depends on more than the step"),
        ({"teacher_lr_scheduler_type": "steep"}, "teacher_lr_scheduler_type.*'steep' with no arguments"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr.*lr_scheduler_kwargs"),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"min_lr": 0}}, "'min_lr': 0.*lr_scheduler_kwargs"),
    ):
        with pytest.raises(InputError, match=problem):
            trainer([JointTeacher("a", dense)], **options)
    with pytest.raises(InputError, match=r"cannot score global candidates.*to one of: own\.$"):
        trainer(
            [JointTeacher("a", CrossEncoderRanker.from_pretrained(models["ranker"]))],
            losses='[{"name": "layer_alignment", "candidates": "global"}]',
        )
    with pytest.raises(InputError, match="nothing is known of the layers"):
        scored = rows.with_column("scores", [np.zeros(len(rows.documents_at(row))) for row in range(len(rows))])
        args = DistillTrainingArguments(**settings["arguments"])
        DistillTrainer(DenseRetriever.from_pretrained(tiny_bert), args, [CachedScores("a")], rows=scored)
