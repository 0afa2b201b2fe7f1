"""`hf-distill demo`: a real search task made on this machine, and a student distilled on it."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from ..console import get_logger, is_main_process
from ..errors import InputError
from ..files import read_json, write_json
from ..provenance import recording
from ..settings import option
from .parsing import Verb, parse


logger = get_logger(__name__)

# Chosen on the demonstration's dev split, to end within minutes on two cores.
_RECIPE = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 32,
    "num_negatives": 1,
    "learning_rate": 3e-4,
    "losses": '[{"name": "kl", "candidates": "global"}, {"name": "contrastive", "weight": 0.5}]',
    "dropout": 0.0,
    "freeze_embeddings": "true",
    "query_length": 48,
    "passage_length": 96,
    "mine_negatives": 20,
    "logging_steps": 50,
    "eval_steps": 0.5,
    "save_steps": 0.5,
    "eval_corpus_size": 2000,
    "eval_queries": 300,
}


@dataclass
class DemoOptions:
    """The size of the demonstration."""

    _argument_group_name = "demonstration"

    output_dir: str = option("outputs/demo", "Folder for the collection, the student and the figures.")
    num_passages: int = option(8000, "Functions and classes whose documentation is collected.")
    seed: int = option(13, "Seed of the collection and of training.")
    teacher: str = option("sentence-transformers/all-MiniLM-L6-v2", "The teacher.")
    student: str = option("layers:1,5,6", "The student: here layers 1, 5 and 6 of the six of the teacher.")


def collection_folder(options: DemoOptions) -> Path:
    """The demonstration's collection, built if it is not there; another one's is not touched."""
    from ..data import build_demo_collection
    from ..distributed import wait_for_everyone

    folder = Path(options.output_dir) / "data"
    wanted = {"num_passages": options.num_passages, "seed": options.seed}
    marker = folder.with_name("data.json")
    if marker.is_file() and read_json(marker) != wanted:
        raise InputError(
            f"holds a collection made with {read_json(marker)}, not {wanted}",
            where=str(folder),
            cure="Choose another --output_dir, or remove that folder",
        )
    # The folder appears only when it is complete, so the marker can be written first.
    if is_main_process() and not folder.exists():
        write_json(marker, wanted)
        logger.info("Collecting documentation of Python and its packages ...")
        build_demo_collection(folder, **wanted)
    wait_for_everyone()
    return folder


def run(options: DemoOptions) -> None:
    """Builds the collection, distils, and says what to try next."""
    start = time.perf_counter()
    import torch

    from ..hub.manifest import write_manifest
    from ..retrieval import choose_dtype
    from .distill import VERB as distill

    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = collection_folder(options)
    student = Path(options.output_dir) / "student"
    flags = {
        "data": data,
        "teacher": options.teacher,
        "student": options.student,
        "output_dir": student,
        "seed": options.seed,
        "use_cpu": device == "cpu",
        "bf16": choose_dtype("auto", device) == "bfloat16",
        **_RECIPE,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    parsed = parse(distill, words)
    with recording(distill.name, words, words, parsed):
        distill.run(*parsed)
    if not is_main_process():
        return
    root = Path(options.output_dir)
    shutil.copyfile(student / "metrics.json", root / "metrics.json")
    shutil.copytree(student / "plots", root / "plots", dirs_exist_ok=True)
    made = read_json(student / "run_manifest.json")
    write_manifest(root, **{name: made[name] for name in ("data", "models", "metrics", "seeds")})
    logger.info(
        "\nDone in %.0f minutes. The student is in %s; figures in %s, plots in %s.\n"
        "Try it:  hf-distill search --data %s --model %s --query 'remove blanks at both ends of a string'",
        (time.perf_counter() - start) / 60,
        student,
        root / "metrics.json",
        root / "plots",
        data,
        student,
    )


VERB = Verb(
    "demo",
    "Build the demonstration collection and distil a student on it.",
    (DemoOptions,),
    run,
    example="hf-distill demo --num_passages 4000",
)
