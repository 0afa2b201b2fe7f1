"""Work that is killed at random moments and run again: the harness of `test_killing.py`.

A job is a function at the top level of an importable module, called as `work(folder, **arguments)` in a process of
its own; whatever it writes lies in `folder` (the cache too, as `$HF_DISTILL_CACHE`). The processes are forked from a
server that has imported the libraries once, so that twenty kills cost twenty short runs and not twenty imports of
torch. They are ordinary processes: what SIGKILL does to them is what it does to any.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


_PRELOADED = (
    "torch", "transformers.trainer", "datasets", "accelerate", "hf_distill.cli.train", "hf_distill.cli.steps",
    "hf_distill.cli.reporting", "hf_distill.cli.training_arguments", "hf_distill.trainers.retrieval",
    "hf_distill.retrieval.mining", "hf_distill.retrieval.score", "hf_distill.retrieval.bm25",
    "hf_distill.models.loading", "hf_distill.evaluation.in_loop", "hf_distill.hub.manifest",
)  # fmt: skip
_LONGEST_SECONDS = 240.0


@dataclass(frozen=True)
class Job:
    """Something that survives being killed.

    Args:
        work: Does it, given the folder and `arguments`.
        kills: How often it is killed.
        arguments: For `work`.
        processes: How many work together (with ranks in the environment, as a launcher starts them).
        result: What must be the same, from the folder; by default the digests of all files that are not hidden.
    """

    work: Callable[..., None]
    kills: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1
    result: Callable[[Path], Any] | None = None

    def outcome(self, folder: Path) -> Any:
        """The result in `folder`."""
        return (self.result or digests)(folder)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file; locks and what a killed process left under a temporary name are hidden files."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def run(job: Job, folder: Path, kill_after: float | None = None) -> bool:
    """Runs a job to its end, or kills all of its processes after so many seconds; True if it was killed.

    Raises:
        AssertionError: If it fails by itself, with what it said.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    port = _free_port()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    processes = [
        context.Process(
            target=_child, args=(job.work, str(folder), dict(job.arguments), rank, job.processes, port, log)
        )
        for rank in range(job.processes)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + (_LONGEST_SECONDS if kill_after is None else kill_after)
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.005)
    killed = [process for process in processes if process.is_alive()]
    for process in killed:
        process.kill()
    for process in processes:
        process.join()
    assert kill_after is not None or not killed, f"not done after {_LONGEST_SECONDS:g} s\n{log.read_text()}"
    if not killed:
        assert all(process.exitcode == 0 for process in processes), log.read_text()
    return bool(killed)


def torture(job: Job, folder: Path, expected: Any, seconds: float, seed: int) -> None:
    """Kills a job `job.kills` times, each time at a random moment, and runs it again where it was cut off.

    Args:
        job: The job.
        folder: A folder for its runs.
        expected: The outcome of an uninterrupted run.
        seconds: How long that took; moments are drawn from this span.
        seed: Of the moments.
    """
    luck = random.Random(seed)
    hits, number = 0, 0
    place = folder / "0"
    for _ in range(6 * job.kills):
        if hits == job.kills:
            break
        if run(job, place, kill_after=luck.uniform(0.0, seconds)):
            hits += 1
        else:
            # It came to its end before the moment: compare, and begin anew.
            assert job.outcome(place) == expected
            shutil.rmtree(place)
            number += 1
            place = folder / str(number)
    assert hits == job.kills, f"only {hits} of {job.kills} kills came before the end"
    run(job, place)
    assert job.outcome(place) == expected


def _child(
    work: Callable[..., None], folder: str, arguments: dict[str, Any], rank: int, processes: int, port: int, log: Path
) -> None:
    os.environ.update(HF_DISTILL_CACHE=str(Path(folder) / "cache"), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if processes > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), **address)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    torch.set_num_threads(1)
    try:
        work(Path(folder), **arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # Without the interpreter's own end, which waits for threads of libraries.
    sys.stdout.flush()
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
