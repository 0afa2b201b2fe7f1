"""Run by the distributed tests, in one process or under a launcher: one job after another, each says what it saw.

python tests/distributed_run.py SETTINGS.json     (a list of jobs)
"""

from __future__ import annotations

import json
import os
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from hf_distill.data import RowSet, load_collection
from hf_distill.data.masking import StreamedTexts
from hf_distill.distributed import is_sharded, leave, world_size
from hf_distill.evaluation import RetrievalEvaluation
from hf_distill.files import write_json
from hf_distill.models import (
    CrossEncoderRanker,
    DenseRetriever,
    LexicalRetriever,
    LexMAEForPreTraining,
    student_from,
)
from hf_distill.teachers import CachedScores, LiveTeacher
from hf_distill.trainers import (
    DistillTrainer,
    DistillTrainingArguments,
    LexMAEPretrainer,
    LexMAETrainingArguments,
)


def main(path: str) -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        use_gloo_alone()
    for settings in json.loads(Path(path).read_text()):
        if "command" in settings:
            from hf_distill.cli.main import main as hf_distill

            hf_distill(settings["command"])  # the last job: it leaves the process group
            return
        kinds = {"golden": golden_steps, "pretrain": pretrain}
        kinds.get(settings.get("kind"), train)(settings)
    leave()


def use_gloo_alone() -> None:
    """Without this DeepSpeed compiles an operation for communication in shared memory, which takes a minute."""
    from deepspeed.ops import __compatible_ops__
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    __compatible_ops__[ShareMemCommBuilder.NAME] = False


# What jobs have in common is opened once.
open_collection = cache(load_collection)
open_teacher = cache(partial(DenseRetriever.from_pretrained, normalize=True))
open_ranker = cache(CrossEncoderRanker.from_pretrained)


@cache
def open_rows(folder: str, collection: str) -> RowSet:
    data = open_collection(collection)
    return RowSet.load(folder, data.queries, data.corpus)


def train(settings: dict[str, Any]) -> None:
    args = DistillTrainingArguments(**settings["arguments"])
    collection = open_collection(settings["collection"])
    rows = open_rows(settings["rows"], settings["collection"])
    teacher, ranker = open_teacher(settings["teacher"]), open_ranker(settings["ranker"])
    torch.manual_seed(0)
    dtypes: set[str] = set()
    if settings.get("untied"):
        student = DenseRetriever.from_pretrained(settings["teacher"], tied=False)
        note_dtypes(student, dtypes)
    elif settings.get("lexical"):
        student = LexicalRetriever.from_pretrained(settings["teacher"], new_head="random", pooled_tokens="text")
    else:
        student = student_from("layers:2", teacher)
    if settings.get("adapters"):
        from peft import LoraConfig

        student.add_adapter(LoraConfig(r=4, target_modules=["query", "value"]))
    teachers = [CachedScores("file"), LiveTeacher("dense", teacher), LiveTeacher("ranker", ranker)]
    if settings.get("projection"):
        student.add_projection("dense", 32)
    evaluation = None
    if args.eval_strategy != "no":
        evaluation = RetrievalEvaluation(collection, "dev", measures=["nDCG@10"], corpus_size=40)
    trainer = DistillTrainer(student, args, teachers=teachers, rows=rows, evaluation=evaluation)
    if settings.get("fully_shard"):
        divide(trainer)
    trainer.train(resume_from_checkpoint=settings.get("resume"))
    whole = trainer.whole_model()
    if settings.get("export"):
        trainer.save_model()
    live = [one.model for one in teachers[1:]]
    if trainer.is_world_process_zero():
        history = trainer.state.log_history
        seen = {
            "world_size": args.world_size,
            "engine": type(trainer.model_wrapped).__name__,
            "sharded": is_sharded(trainer.model),
            "history": [entry for entry in history if "loss" in entry],
            "measures": [entry["eval_nDCG@10"] for entry in history if "eval_nDCG@10" in entry],
            "score_dtypes": sorted(dtypes),
            "weights": {name: tensor.double().sum().item() for name, tensor in whole.state_dict().items()},
            "teachers_are_plain": not any(
                is_sharded(model) or model.training or any(one.requires_grad for one in model.parameters())
                for model in live
            ),
        }
        write_json(settings["result"], seen)


def pretrain(settings: dict[str, Any]) -> None:
    """LexMAE on the collection's passages, which are of very different lengths; perhaps on a stream of them."""
    args = LexMAETrainingArguments(**settings["arguments"])
    torch.manual_seed(0)
    model = LexMAEForPreTraining.from_pretrained(settings["teacher"], new_head="random", passage_length=40)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    texts = open_collection(settings["collection"]).corpus
    if settings.get("streamed"):
        from datasets import IterableDataset

        stream = IterableDataset.from_generator(partial(map, dict, texts.dataset))
        texts = StreamedTexts(stream, model.config.template, seed=1, buffer=10)
    trainer = LexMAEPretrainer(model, args, texts)
    trainer.train()
    if trainer.is_world_process_zero():
        seen = {
            "world_size": args.world_size,
            "history": [entry for entry in trainer.state.log_history if "loss" in entry],
            "weights": {name: tensor.double().sum().item() for name, tensor in model.state_dict().items()},
        }
        write_json(settings["result"], seen)


def note_dtypes(student: DenseRetriever, dtypes: set[str]) -> None:
    """Notes in which precision the loss gets the scores."""
    batch_scores = student.batch_scores

    def noted(*arguments: Any) -> torch.Tensor:
        scores = batch_scores(*arguments)
        dtypes.add(str(scores.dtype))
        return scores

    student.batch_scores = noted


def golden_steps(settings: dict[str, Any]) -> None:
    """The golden step of gradient caching with the batch shared by all processes, under DDP."""
    import numpy as np
    from accelerate import PartialState
    from test_models_gradient_caching_golden import CHUNKS, GOLDEN, Towers, step

    state, golden, seen = PartialState(cpu=True), np.load(GOLDEN), {"world_size": world_size()}
    for tag in ("tied", "untied"):
        for name, chunks in CHUNKS.items():
            model = torch.nn.parallel.DistributedDataParallel(Towers(golden, tag))
            loss, scores = step(model, golden, chunks)
            gradients = {
                f"{tower}.{part}": weight.grad.tolist()
                for tower, weights in model.module.named_children()
                for part, weight in weights.named_parameters()
            }
            seen[f"{tag}-{name}"] = {"loss": loss, "scores": scores.tolist(), "gradients": gradients}
    if state.is_main_process:
        write_json(settings["result"], seen)


def divide(trainer: DistillTrainer) -> None:
    """What accelerate does for FSDP2 on GPUs, by its own choice of modules, with torch's `fully_shard` on CPUs."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(trainer.model)
    is_unit = fsdp2_prepare_auto_wrap_policy(plugin, trainer.model)
    mesh = init_device_mesh("cpu", (world_size(),))
    for module in [one for one in trainer.model.modules() if is_unit(one)]:
        fully_shard(module, mesh=mesh)
    fully_shard(trainer.model, mesh=mesh)
    trainer.is_distributed_loading_by_transformers = True  # accelerate leaves such a model as it is


if __name__ == "__main__":
    main(sys.argv[1])
