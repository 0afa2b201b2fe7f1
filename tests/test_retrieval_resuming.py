"""Spread over two processes, or started twice, the whole of offline retrieval leaves the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


SCRIPT = str(Path(__file__).with_name("retrieval_run.py"))
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"],
    "accelerate": [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    ],
}  # fmt: skip


class Workplace:
    """A cache and an output folder, and the command that works in them."""

    def __init__(self, folder: Path, micro: Path, dense: Path, ranker: Path, processes: int = 1, pause: float = 0.0):
        self.cache, self.output, self.processes = folder / "cache", folder / "output", processes
        self.output.mkdir(parents=True, exist_ok=True)
        self.settings = folder / "settings.json"
        self.settings.write_text(
            json.dumps(
                {
                    "collection": str(micro),
                    "dense": str(dense),
                    "ranker": str(ranker),
                    "output": str(self.output),
                    "processes": processes,
                    "pause": pause,
                }
            )
        )

    def start(self, launcher: str | None = None) -> subprocess.Popen:
        environment = {
            **os.environ,
            "HF_DISTILL_CACHE": str(self.cache),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "ACCELERATE_USE_CPU": "true",
        }
        command = [sys.executable, *(LAUNCHERS[launcher] if launcher else []), SCRIPT, str(self.settings)]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def finish(self, launcher: str | None = None) -> dict[str, str]:
        process = self.start(launcher)
        try:
            _, errors = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            _kill_orphans(self)
            raise
        assert process.returncode == 0, errors[-3000:]
        return self.result()

    def result(self) -> dict[str, str]:
        """Digests of everything that was made: shards, indexes, rows, runs."""
        found = {}
        for root in (self.cache, self.output):
            for path in sorted(root.rglob("*")):
                name = str(path.relative_to(root))
                # Locks and marks of beginnings are no results; where a cached table came from is not content.
                if (
                    path.is_file()
                    and not name.startswith(("data", "started", "world_size"))
                    and path.suffix != ".lock"
                ):
                    found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found


@pytest.fixture(scope="module")
def models(tiny_bert_source, tiny_ranker_source):
    return tiny_bert_source, tiny_ranker_source


@pytest.fixture(scope="module")
def reference(tmp_path_factory, micro, models) -> dict[str, str]:
    return Workplace(tmp_path_factory.mktemp("uninterrupted"), micro, *models).finish()


def test_everything_is_made(reference):
    kinds = {name.split("/")[0] for name in reference}
    assert {"embeddings", "search", "scores", "bm25", "bm25-search", "rows", "dense.trec", "bm25.trec"} <= kinds
    assert sum(name.startswith("embeddings") for name in reference) > 12
    assert not [name for name in reference if ".tmp" in name]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_two_processes_leave_the_same_bytes(launcher, tmp_path, micro, models, reference):
    place = Workplace(tmp_path, micro, *models, processes=2)
    assert place.finish(launcher) == reference
    assert (place.output / "world_size").read_text() == "2"
    assert (place.output / "started-1").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_killed_go_on_as_one(tmp_path, micro, models, reference):
    place = Workplace(tmp_path, micro, *models, processes=2, pause=0.05)
    process = place.start("torchrun")
    deadline = time.monotonic() + 120
    while process.poll() is None and not list(place.cache.glob("embeddings/*/shard-*")):
        assert time.monotonic() < deadline, "the job never began"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    _kill_orphans(place)
    assert Workplace(tmp_path, micro, *models, processes=1).finish() == reference


def _kill_orphans(place: Workplace) -> None:
    """Workers of a launcher that was killed; they are recognised by the path of this test's own settings."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(place.settings).encode() in command:
                os.kill(int(entry.name), signal.SIGKILL)
    time.sleep(0.2)


@pytest.mark.slow
def test_two_independent_runs_share_a_cache(tmp_path, micro, models, reference):
    one = Workplace(tmp_path, micro, *models, pause=0.02)
    first, second = one.start(), one.start()
    for process in (first, second):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    assert one.result() == reference
