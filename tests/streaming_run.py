"""Run by the tests of streamed training, in one process or several: trains, or goes on where it was cut.

python tests/streaming_run.py SETTINGS.json     (a list of runs)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_distill.cli.steps import finish_training
from hf_distill.data import StreamedRows, load_collection
from hf_distill.distributed import leave
from hf_distill.files import write_json
from hf_distill.models import DenseRetriever
from hf_distill.trainers import RetrievalTrainer, RetrievalTrainingArguments


class Watching(RetrievalTrainer):
    """Keeps the query ids of every batch of this process."""

    def compute_loss(self, model, inputs, **kwargs):
        self.seen = [*getattr(self, "seen", []), inputs["query_ids"].tolist()]
        return super().compute_loss(model, inputs, **kwargs)


def train(settings: dict[str, Any]) -> None:
    args = RetrievalTrainingArguments(**settings["arguments"])
    collection = load_collection(settings["collection"])
    rows = StreamedRows.open(settings["rows"], collection.queries, collection.corpus)
    torch.manual_seed(0)
    trainer = Watching(DenseRetriever.from_pretrained(settings["model"]), args, rows=rows)
    finish_training(trainer)
    folder = Path(args.output_dir)
    write_json(folder / f"seen-{args.process_index}.json", {"world_size": args.world_size, "batches": trainer.seen})
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "weights")


if __name__ == "__main__":
    for one in json.loads(Path(sys.argv[1]).read_text()):
        train(one)
    leave()
