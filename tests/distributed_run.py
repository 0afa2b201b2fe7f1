"""Run by the distributed tests, in one process or under `accelerate launch`: trains some steps, writes what it saw.

python tests/distributed_run.py SETTINGS.json     (a list of runs)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from hf_distill.data import RowSet, load_collection
from hf_distill.distributed import leave
from hf_distill.files import write_json
from hf_distill.models import CrossEncoderRanker, DenseRetriever, student_from
from hf_distill.teachers import CachedScores, LiveTeacher
from hf_distill.trainers import DistillTrainer, DistillTrainingArguments


def main(path: str) -> None:
    for settings in json.loads(Path(path).read_text()):
        train(settings)
    leave()


def train(settings: dict[str, Any]) -> None:
    args = DistillTrainingArguments(**settings["arguments"])
    collection = load_collection(settings["collection"])
    rows = RowSet.load(settings["rows"], collection.queries, collection.corpus)
    torch.manual_seed(0)
    teacher = DenseRetriever.from_pretrained(settings["teacher"], normalize=True)
    student = student_from("layers:2", teacher)
    teachers = [
        CachedScores("file"),
        LiveTeacher("dense", teacher),
        LiveTeacher("ranker", CrossEncoderRanker.from_pretrained(settings["ranker"])),
    ]
    if settings.get("projection"):
        student.add_projection("dense", 32)
    trainer = DistillTrainer(student, args, teachers=teachers, rows=rows)
    trainer.train(resume_from_checkpoint=settings.get("resume"))
    if trainer.is_world_process_zero():
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        seen = {
            "world_size": args.world_size,
            "engine": type(trainer.model_wrapped).__name__,
            "history": history,
            "weights": {name: tensor.double().sum().item() for name, tensor in student.state_dict().items()},
        }
        write_json(settings["result"], seen)


if __name__ == "__main__":
    main(sys.argv[1])
