"""Training with the Hub: pushed while it goes on, opened elsewhere, gone on from the repository, and never lost."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_distill.data import RowSet, load_collection
from hf_distill.files import read_json

from .hub_client import RemoteError, verb
from .model_zoo import save_tiny


COMMON = (
    "--use_cpu true --per_device_train_batch_size 8 --num_negatives 3 --report_to none --disable_tqdm true "
    "--learning_rate 0.003 --max_steps 6 --save_steps 2 --eval_steps 2 --mine_depth 20 --mine_negatives 8"
).split()
NATIVE = {"config.json", "model.safetensors", "modules.json", "tokenizer.json", "1_Pooling/config.json"}


def distill(micro, teacher, folder, *more):
    """Runs the verb on the micro corpus; see [`verb`]."""
    words = ["distill", "--data", micro, "--teacher", teacher, "--student", "layers:2", "--baseline", "false"]
    return verb(*words, "--output_dir", folder, *COMMON, *more)


PUSH = ["--push_to_hub", "true", "--hub_model_id", "alice/student"]


def test_a_student_is_pushed_and_opens_elsewhere(hub, hub_client, micro, tiny_bert, tmp_path):
    code, _ = hub_client(distill, micro, tiny_bert, tmp_path / "student", *PUSH)
    assert code == 0
    repo = hub.repo("alice/student")
    files = repo.files()
    assert NATIVE | {"README.md", "run_manifest.json", "metrics.json", "training_args.json"} <= set(files)
    assert repo.history()[0] == "End of training" and repo.history()[-2] == "Training in progress, step 2"
    local = tmp_path / "student"
    assert all((local / path).read_bytes() == content for path, content in files.items())
    told = json.loads(files["run_manifest.json"])["artefacts"]
    assert {name: facts["sha256"] for name, facts in told.items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in files.items() if name != "run_manifest.json"
    }
    assert not any("hf_alice" in content.decode("utf-8", "ignore") for content in files.values())
    # Every state that was pushed on the way is a whole model, with card and manifest.
    for commit in list(repo.commits.values())[1:]:
        assert NATIVE | {"README.md", "run_manifest.json"} <= set(commit.files), commit.title
    card = files["README.md"].decode()
    assert 'SentenceTransformer("alice/student")' in card and "name: nDCG@10" in card
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    here, there = _vectors([str(local), "alice/student"], elsewhere, hub.environment(elsewhere / "home"))
    assert here == there


def test_a_pretrained_model_is_pushed_with_its_own_card(hub, hub_client, micro, tiny_tokenizer, tmp_path):
    model = save_tiny(tmp_path / "masked", "bert", tiny_tokenizer, head="MaskedLM", layers=2)
    words = ["pretrain", "--data", micro, "--model", model, "--output_dir", tmp_path / "lexmae", "--max_steps", "2"]
    words += ["--use_cpu", "true", "--per_device_train_batch_size", "8", "--save_steps", "1", "--logging_steps", "1"]
    assert hub_client(verb, *words, "--push_to_hub", "true", "--hub_model_id", "alice/lexmae") == (0, "")
    repo = hub.repo("alice/lexmae")
    for commit in list(repo.commits.values())[1:]:
        assert 'AutoModelForMaskedLM.from_pretrained("alice/lexmae")' in commit.files["README.md"].content.decode()
    files = repo.files()
    manifest = json.loads(files["run_manifest.json"])
    assert "pre-trained further" in files["README.md"].decode() and "encoder_loss" in manifest["training"]
    sizes = {name: len(content) for name, content in files.items() if name != "run_manifest.json"}
    assert {name: facts["bytes"] for name, facts in manifest["artefacts"].items()} == sizes


def _vectors(names, folder, variables):
    """Embeddings by sentence-transformers, in a process that cannot import this package."""
    code = f"""
import sys, json
sys.modules["hf_distill"] = None
from sentence_transformers import SentenceTransformer
texts = ["how do I bake bread", "stars at night"]
print(json.dumps([SentenceTransformer(name, device="cpu").encode_query(texts).tolist() for name in {names!r}]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"} | variables
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def test_going_on_from_the_repository_gives_the_same_weights(hub, hub_client, micro, tiny_bert, tmp_path):
    """Cut off after step 4, the local folder gone: the repository is enough, also for the best checkpoint."""
    import shutil

    whole = tmp_path / "whole"
    assert hub_client(distill, micro, tiny_bert, whole)[0] == 0
    cut = tmp_path / "cut"
    with pytest.raises(RemoteError, match="cut off"):
        hub_client(_distill_until, 4, micro, tiny_bert, cut, *PUSH, "--hub_strategy", "checkpoint")
    files = hub.repo("alice/student").files()
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= set(files)
    assert json.loads(files["last-checkpoint/trainer_state.json"])["global_step"] == 4
    shutil.rmtree(cut)
    again = tmp_path / "elsewhere" / "again"
    code, _ = hub_client(
        distill, micro, tiny_bert, again, *PUSH, "--hub_strategy", "checkpoint",
        "--resume_from_checkpoint", "alice/student",
    )  # fmt: skip
    assert code == 0
    assert any("going on from step 4 of alice/student" in line for line in hub_client.log)
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [entry["step"] for entry in read_json(again / "history.json")] == [
        entry["step"] for entry in read_json(whole / "history.json")
    ]
    files = hub.repo("alice/student").files()
    assert files["model.safetensors"] == (whole / "model.safetensors").read_bytes()
    last = (whole / "checkpoint-6" / "model.safetensors").read_bytes()
    assert files["last-checkpoint/model.safetensors"] == last


def _distill_until(step, *args):
    """A run that dies at the beginning of a step, when the state before it has been pushed."""
    from transformers import TrainerCallback

    from hf_distill.trainers import BaseTrainer

    class Death(TrainerCallback):
        def __init__(self, trainer):
            self.trainer = trainer

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step:
                self.trainer._publisher.wait()
                raise KeyboardInterrupt("cut off")

    prepare = BaseTrainer.__init__

    def doomed(self, *words, **options):
        prepare(self, *words, **options)
        self.add_callback(Death(self))

    BaseTrainer.__init__ = doomed
    try:
        return distill(*args)
    finally:
        BaseTrainer.__init__ = prepare


def test_a_hub_that_fails_meanwhile_loses_nothing(hub, hub_client, micro, tiny_bert, tmp_path):
    """Every push fails: one sentence for each, the run is complete here, the exit code says that it is not there."""
    plain, folder = tmp_path / "plain", tmp_path / "student"
    assert hub_client(distill, micro, tiny_bert, plain)[0] == 0
    hub.fail("commit", 503, times=float("inf"))
    code, errors = hub_client(distill, micro, tiny_bert, folder, *PUSH)
    assert code == 3
    assert errors.startswith(f"error: {folder} is complete on this machine but was not pushed to alice/student: ")
    assert errors.rstrip().endswith(f"hf-distill push {folder} --repo_id alice/student.")
    sentences = [line for line in hub_client.log if "training goes on" in line]
    assert sentences and all(
        line.startswith("Training in progress, step ") and "the Hub failed (503)" in line for line in sentences
    )
    assert (folder / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert set(read_json(folder / "metrics.json")["micro/test"]) >= {"student", "teacher"}
    assert not list(folder.glob(".push-*"))
    hub.faults.clear()
    assert hub_client(verb, "push", folder, "--repo_id", "alice/student")[0] == 0
    assert 'SentenceTransformer("alice/student")' in hub.repo("alice/student").files()["README.md"].decode()
    assert hub_client(distill, micro, tiny_bert, folder, *PUSH)[0] == 0, "and the same command again is the same run"


@pytest.mark.parametrize(("fault", "times"), [("delete", 1), ("cut", 5)])
def test_faults_in_the_middle_of_training(hub, hub_client, micro, tiny_bert, tmp_path, fault, times):
    """The Hub fails from the second state on and is back at the end, unless somebody has deleted the repository."""
    hub.fail("commit", fault, nth=2, times=times)
    folder = tmp_path / "student"
    code, errors = hub_client(distill, micro, tiny_bert, folder, *PUSH, "--hub_always_push", "true")
    assert (folder / "model.safetensors").is_file() and (folder / "run_manifest.json").is_file()
    assert sum("training goes on" in line for line in hub_client.log) >= 1
    if fault == "delete":
        assert code == 3 and "Push it later" in errors and "404" in errors
        assert ("model", "alice/student") not in hub.repos, "not made again behind somebody's back"
    else:
        assert code == 0
        assert hub.repo("alice/student").files()["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_slow_hub_does_not_hold_training(hub, hub_client, micro, tiny_bert, tmp_path):
    hub.fail("commit", "slow", seconds=1.0)
    assert hub_client(distill, micro, tiny_bert, tmp_path / "student", *PUSH)[0] == 0
    history = hub.repo("alice/student").history()
    assert history[0] == "End of training" and len(history) < 5, "states that would wait are left to later ones"


def test_what_cannot_be_pushed_is_said_before_the_work(hub, hub_client, micro, tiny_bert, tmp_path):
    for env, name, words in (
        ({"HF_TOKEN": None}, "alice/student", "nobody is logged in"),
        ({"HF_TOKEN": "hf_wrong"}, "alice/student", "does not know the token"),
        ({"HF_TOKEN": "hf_bob"}, "alice/student", "may not write there"),
        ({}, "alice/a/student", "no id of a repository"),
    ):
        push = ["--push_to_hub", "true", "--hub_model_id", name]
        code, errors = hub_client(distill, micro, tiny_bert, tmp_path / "student", *push, env=env)
        assert code == 2 and words in errors and "hf_wrong" not in errors, errors
    hub_client(distill, micro, tiny_bert, tmp_path / "one", *PUSH)
    code, errors = hub_client(distill, micro, tiny_bert, tmp_path / "two", *PUSH, "--seed", "7")
    assert code == 2 and "alice/student: the repository holds another run" in errors
    assert not list((tmp_path / "two").glob("*.safetensors"))


@pytest.mark.parametrize("fault", ["refuse", 503])
def test_a_hub_that_is_silent_at_the_start_is_asked_again_at_the_end(
    hub, hub_client, micro, tiny_bert, tmp_path, fault
):
    """The repository cannot even be looked at before the work: that is a warning, and the run is pushed later."""
    hub.fail("GET /api/models/alice/student", fault, times=5)
    assert hub_client(distill, micro, tiny_bert, tmp_path / "student", *PUSH, "--hub_strategy", "end") == (0, "")
    assert any("alice/student cannot be opened now" in line for line in hub_client.log)
    assert hub.repo("alice/student").history()[0] == "End of training"


def test_every_checkpoint_and_what_cannot_be_resumed(hub, hub_client, micro, tiny_bert, tmp_path):
    name, every = ["--hub_model_id", "alice/every"], ["--hub_strategy", "all_checkpoints", "--hub_always_push", "true"]
    assert hub_client(distill, micro, tiny_bert, tmp_path / "a", "--push_to_hub", "true", *name, *every)[0] == 0
    repo = hub.repo("alice/every")
    folders = {path.split("/")[0] for path in repo.files() if path.startswith("checkpoint-")}
    assert folders == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert "optimizer.pt" not in repo.files() and "checkpoint-2/optimizer.pt" in repo.files()
    resume = ["--resume_from_checkpoint", "alice/every"]
    hub.fail(r"GET .*checkpoint-6/model\.safetensors", "corrupt")
    code, errors = hub_client(distill, micro, tiny_bert, tmp_path / "b", *resume)
    assert code == 2 and "model.safetensors: the downloaded file is damaged" in errors
    code, _ = hub_client(distill, micro, tiny_bert, tmp_path / "b", *resume)
    assert code == 0 and any("going on from step 6" in line for line in hub_client.log)
    a, b = (tmp_path / folder / "model.safetensors" for folder in "ab")
    assert a.read_bytes() == b.read_bytes()
    (early,) = [oid for oid, commit in repo.commits.items() if commit.title == "Training in progress, step 2"]
    resume = ["--resume_from_checkpoint", f"alice/every@{early}"]
    assert hub_client(distill, micro, tiny_bert, tmp_path / "c", *resume) == (0, "")
    assert any(f"going on from step 2 of alice/every at {early[:10]}" in line for line in hub_client.log)
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == a.read_bytes()
    hub.add_repo("alice/bare", {"config.json": b"{}"})
    for wanted, more, words in (
        ("alice/bare", [], "holds no checkpoint to go on from.*hub_strategy checkpoint"),
        ("alice/nothing", [], "does not exist, or this account may not see it"),
        ("alice/every@v9", [], "revision"),
        ("alice/every", ["--seed", "5"], "checkpoint of another run.*seed: 42, here 5"),
    ):
        resume = ["--resume_from_checkpoint", wanted, *more]
        code, errors = hub_client(distill, micro, tiny_bert, tmp_path / f"c{len(words)}", *resume)
        assert code == 2 and re.search(words, errors), errors


def _train_in_a_program(micro, bert, folder, **more):
    """A program of one's own: a trainer, its arguments, and nothing else."""
    from hf_distill.data import RowSet, load_collection
    from hf_distill.models import DenseRetriever
    from hf_distill.trainers import RetrievalTrainer, RetrievalTrainingArguments

    collection = load_collection(micro)
    rows = RowSet.from_qrels(collection, "train")
    args = RetrievalTrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=2, save_steps=1, per_device_train_batch_size=4,
        num_negatives=0, report_to="none", push_to_hub=True, hub_token="hf_alice", **more,
    )  # fmt: skip
    trainer = RetrievalTrainer(DenseRetriever.from_pretrained(bert), args, rows=rows)
    trainer.train()
    return trainer.push_to_hub().url


def test_a_program_of_ones_own(hub, hub_client, micro, tiny_bert, tmp_path):
    folder = tmp_path / "retriever"
    nobody = {"HF_TOKEN": None}
    url = hub_client(_train_in_a_program, micro, tiny_bert, folder, env=nobody, hub_private_repo=True)
    repo = hub.repo("alice/retriever")
    assert url == f"{hub.url}/alice/retriever" and repo.private
    assert NATIVE | {"README.md", "run_manifest.json", "training_args.json"} <= set(repo.files())
    assert not any(b"hf_alice" in content for content in repo.files().values())
    assert json.loads(repo.files()["run_manifest.json"])["training"]["steps"] == 2
    assert 'SentenceTransformer("alice/retriever")' in repo.files()["README.md"].decode()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("# My own card\n")
    hub_client(_train_in_a_program, micro, tiny_bert, tmp_path / "own", hub_revision="dev")
    assert hub.repo("alice/own").files("dev")["README.md"] == b"# My own card\n"
    assert not hub.repo("alice/own").files(), "a branch of its own"
    with pytest.raises(RemoteError, match="another run"):
        hub_client(
            _train_in_a_program, micro, tiny_bert, tmp_path / "two", hub_model_id="retriever", learning_rate=1e-6
        )


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_push_whole_checkpoints(hub, micro, tiny_bert, tiny_ranker, tmp_path):
    """One process pushes, when both have written their part; both go on from the repository, with the same weights."""
    collection = load_collection(micro)
    rows = RowSet.from_qrels(collection, "train")
    rows.with_column("scores", [np.arange(n) for n in rows.lengths]).save(tmp_path / "rows")
    common = {"collection": micro, "rows": tmp_path / "rows", "teacher": tiny_bert, "ranker": tiny_ranker}
    arguments = {
        "use_cpu": True, "per_device_train_batch_size": 4, "num_negatives": 0, "report_to": "none", "save_steps": 2,
        "losses": "[contrastive]", "lr_scheduler_type": "constant", "eval_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    push = {"push_to_hub": True, "hub_model_id": "alice/student", "hub_strategy": "checkpoint"}
    jobs = [
        {"arguments": {"output_dir": "first", "max_steps": 2, **push}},
        {"arguments": {"output_dir": "again", "max_steps": 4}, "resume": "alice/student"},
        {"arguments": {"output_dir": "whole", "max_steps": 4}},
    ]
    for job in jobs:
        job |= {
            **{name: str(path) for name, path in common.items()},
            "result": job["arguments"]["output_dir"] + ".json",
        }
        job["arguments"] = {**arguments, **job["arguments"]}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    root = Path(__file__).parents[1]
    options = ["--config_file", root / "hf_distill" / "configs" / "multi_cpu.yaml", "--num_processes", "2"]
    words = [*options, "--main_process_port", "0", root / "tests" / "distributed_run.py", tmp_path / "jobs.json"]
    environment = os.environ | hub.environment(tmp_path / "home", token="hf_alice") | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *map(str, words)],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, again, whole = (read_json(tmp_path / job["result"]) for job in jobs)
    assert first["world_size"] == again["world_size"] == 2
    repo = hub.repo("alice/student")
    assert {"last-checkpoint/rng_state_0.pth", "last-checkpoint/rng_state_1.pth"} <= set(repo.files())
    assert repo.history() == ["Training in progress, step 2", "initial commit"]
    assert again["weights"] == whole["weights"] != first["weights"]
