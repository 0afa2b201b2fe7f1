"""Run by the tests of joint training: trainings of student and teacher, one after the other, each says what it saw.

python tests/joint_run.py SETTINGS.json     (a list of jobs)
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hf_distill.data import RowSet, load_collection
from hf_distill.distributed import leave
from hf_distill.files import write_json
from hf_distill.models import CrossEncoderRanker, DenseRetriever, MultiVectorRetriever, student_from
from hf_distill.teachers import JointTeacher, LiveTeacher
from hf_distill.trainers import DistillTrainer, DistillTrainingArguments


MODES = {"joint": JointTeacher, "live": LiveTeacher}


class KillAt(TrainerCallback):
    """Ends the process without any farewell after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def make_trainer(settings: dict[str, Any]) -> DistillTrainer:
    """The trainer of a job: a teacher (`"dense"`, `"tokens"` or `"pair"`) and a dense student of two layers."""
    args = DistillTrainingArguments(**settings["arguments"])
    collection = load_collection(settings["collection"])
    rows = RowSet.load(settings["rows"], collection.queries, collection.corpus)
    torch.manual_seed(0)
    dense = DenseRetriever.from_pretrained(settings["bert"], pooling="cls", similarity="dot")
    if settings["teacher"] == "tokens":
        teacher = MultiVectorRetriever.from_pretrained(
            settings["bert"], query_length=12, passage_length=32, projection_dim=0
        )
    elif settings["teacher"] == "pair":
        teacher = CrossEncoderRanker.from_pretrained(settings["ranker"])
    else:
        teacher = DenseRetriever.from_pretrained(settings["bert"], pooling="cls", similarity="dot")
    student = student_from("layers:2", dense)
    callbacks = [KillAt(settings["kill_at"])] if settings.get("kill_at") else []
    mode = MODES[settings.get("mode", "joint")]
    return DistillTrainer(student, args, [mode("teacher", teacher)], rows=rows, callbacks=callbacks)


def main(path: str) -> None:
    for settings in json.loads(Path(path).read_text()):
        trainer = make_trainer(settings)
        trainer.train(resume_from_checkpoint=settings.get("resume"))
        if trainer.is_world_process_zero():
            weights = {
                name: tensor.double().sum().item() for name, tensor in trainer.whole_model().state_dict().items()
            }
            seen = {
                "engine": type(trainer.model_wrapped).__name__,
                "history": [entry for entry in trainer.state.log_history if "loss" in entry],
                "weights": weights,
            }
            write_json(settings["result"], seen)
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
