"""Run by `test_cli_folders.py` in a mount namespace of its own: work on a file system that is really full.

unshare --user --map-root-user --mount python tests/full_disk.py FOLDER COLLECTION MODEL
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

from hf_distill.cli.main import main
from hf_distill.locking import unlock_folder


class Disk:
    """A small file system whose free space can be set."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.filler = folder, folder / "filler"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)

    def free(self) -> int:
        status = os.statvfs(self.folder)
        return status.f_bavail * status.f_frsize

    def leave(self, free: int) -> None:
        self.filler.unlink(missing_ok=True)
        self.filler.write_bytes(b"x" * (self.free() - free))

    def make_room(self) -> None:
        self.filler.unlink(missing_ok=True)


def command(*words: object) -> tuple[int, str]:
    """Exit code and standard error of a verb."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            return int(end.code), said.getvalue()
    return 0, said.getvalue()


def broken(folder: Path) -> list[str]:
    """Files that look finished and are not."""
    from safetensors import SafetensorError, safe_open

    found = []
    for path in folder.rglob("*"):
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".npy":
                import numpy as np

                np.load(path)
            elif path.suffix == ".arrow":
                import datasets

                len(datasets.Dataset.from_file(str(path)))
        except (SafetensorError, ValueError, OSError, EOFError) as error:
            found.append(f"{path}: {error}")
    return found + [
        str(path) for path in folder.glob("out/checkpoint-*") if not (path / "trainer_state.json").exists()
    ]


def attempts(disk: Disk, words: list[object], levels: list[int]) -> list[dict]:
    """Runs a verb at each level of free space, then with enough of it."""
    seen = []
    for level in levels:
        disk.leave(level)
        code, said = command(*words)
        unlock_folder(disk.folder / "out")
        seen.append({"free": level, "code": code, "said": said[-600:], "broken": broken(disk.folder)})
    disk.make_room()
    code, said = command(*words)
    unlock_folder(disk.folder / "out")
    seen.append({"free": None, "code": code, "said": said[-600:], "broken": broken(disk.folder)})
    return seen


def run(folder: Path, data: str, model: str) -> None:
    training = [
        "train",
        "--data",
        data,
        "--model",
        model,
        "--use_cpu",
        "true",
        "--max_steps",
        "6",
        "--save_steps",
        "2",
    ]
    training += ["--per_device_train_batch_size", "4", "--num_negatives", "2", "--eval_strategy", "no"]
    training += ["--report_to", "none", "--mine_with", "student", "--mine_depth", "20", "--mine_negatives", "6"]
    training += ["--save_total_limit", "1"]
    os.environ["HF_DISTILL_CACHE"] = str(folder / "cache")
    code, said = command(*training, "--output_dir", folder / "reference")
    assert code == 0, said
    checkpoint = sum(path.stat().st_size for path in (folder / "reference" / "checkpoint-6").rglob("*"))
    model_size = (folder / "reference" / "model.safetensors").stat().st_size
    result = {}
    disk = Disk(folder / "disk", 16 * checkpoint)
    levels = [0, model_size // 2, checkpoint // 2, checkpoint - 8192, checkpoint + model_size // 2]
    result["training"] = attempts(disk, [*training, "--output_dir", disk.folder / "out"], levels)
    weights = [(place / "model.safetensors").read_bytes() for place in (folder / "reference", disk.folder / "out")]
    result["same weights"] = weights[0] == weights[1]

    caches = Disk(folder / "caches", 2**24)
    os.environ["HF_DISTILL_CACHE"] = str(caches.folder / "cache")
    words = ["evaluate", "--data", data, "--model", model, "--output_dir", folder / "figures", "--dtype", "float32"]
    result["caches"] = attempts(caches, words, [0, 2**14, *(2**16 + 4096 * pages for pages in range(4))])
    os.environ["HF_DISTILL_CACHE"] = str(folder / "cache")
    code, said = command(*words[:-4], "--output_dir", folder / "expected", "--dtype", "float32")
    assert code == 0, said
    runs = [
        sorted(path.read_bytes() for path in (folder / place / "runs").glob("*")) for place in ("figures", "expected")
    ]
    result["same run"] = runs[0] == runs[1]
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    run(Path(sys.argv[1]), *sys.argv[2:])
