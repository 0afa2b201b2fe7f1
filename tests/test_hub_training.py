"""Training with the Hub: pushed while it goes on, opened elsewhere, gone on from the repository, and never lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from hf_distill.files import read_json

from .hub_client import RemoteError


COMMON = ["--use_cpu", "true", "--per_device_train_batch_size", "8", "--num_negatives", "3", "--report_to", "none"]
STEPS = [
    "--learning_rate",
    "0.003",
    "--max_steps",
    "6",
    "--save_steps",
    "2",
    "--eval_steps",
    "2",
    "--mine_depth",
    "20",
    "--mine_negatives",
    "8",
]
NATIVE = {"config.json", "model.safetensors", "modules.json", "tokenizer.json", "1_Pooling/config.json"}


def distill(micro, teacher, folder, *more):
    """Runs the verb; the exit code, and what went to standard error."""
    import contextlib
    import io

    from hf_distill.cli.main import main

    words = [
        "distill",
        "--data",
        str(micro),
        "--teacher",
        str(teacher),
        "--student",
        "layers:2",
        "--baseline",
        "false",
    ]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            main([*words, "--output_dir", str(folder), *COMMON, *STEPS, *map(str, more)])
    except SystemExit as end:
        return end.code, errors.getvalue()
    return 0, errors.getvalue()


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
    assert not any("hf_alice" in content.decode("utf-8", "ignore") for content in files.values())
    # Every state that was pushed on the way is a whole model, with card and manifest.
    for commit in list(repo.commits.values())[1:]:
        assert NATIVE | {"README.md", "run_manifest.json"} <= set(commit.files), commit.title
    card = files["README.md"].decode()
    assert 'SentenceTransformer("alice/student")' in card and "name: nDCG@10" in card
    expected = _vectors(str(local), tmp_path, {"HF_HUB_OFFLINE": "1"})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    found = _vectors("alice/student", elsewhere, hub.environment(elsewhere / "home"))
    assert found == expected


def _vectors(name, folder, variables):
    """Embeddings by sentence-transformers, in a process that cannot import this package."""
    code = f"""
import sys, json
sys.modules["hf_distill"] = None
from sentence_transformers import SentenceTransformer
model = SentenceTransformer({name!r}, device="cpu")
print(json.dumps(model.encode_query(["how do I bake bread", "stars at night"]).tolist()))
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
