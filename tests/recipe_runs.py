"""Recipes as a person starts them, in a process of their own, and killed in the middle."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def command(recipe: str, profile: str, folder: Path, *overrides: str, until: str | None = None) -> list[str]:
    words = [sys.executable, "-m", "hf_distill", "recipe", recipe, "--profile", profile, "--output_dir", str(folder)]
    words += [word for override in overrides for word in ("--set", override)]
    return [*words, *(["--until", until] if until else [])]


def run(words: Sequence[str], environment: Mapping[str, str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def run_with_kills(words: Sequence[str], environment: Mapping[str, str], folder: Path, kills: int, seed: int) -> None:
    """Kills the recipe so often, each time after some more checkpoints or finished stages, and lets it end."""
    luck = random.Random(seed)

    def results() -> int:
        return len(list(folder.glob("stages/*/*")))

    for number in range(kills):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        seen = results()
        while process.poll() is None and results() < seen + 3 + number:
            time.sleep(0.02)
        time.sleep(luck.uniform(0, 0.5))
        if process.poll() is not None:
            # A quick machine was through before the last kill.
            assert number, "the recipe ended before it was killed"
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    run(words, environment)


def measures(folder: Path) -> Any:
    """What a stage measured, without times."""
    figures = json.loads((folder / "metrics.json").read_text())
    for systems in figures.values():
        for values in systems.values():
            values.pop("passages_per_second", None)
    return figures
