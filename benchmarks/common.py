"""What the benchmarks share: the data, the clock, the memory gauge, and verdicts that know about noise."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parent.parent
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
SCRATCH = ROOT / "outputs" / "benchmarks"
# Beside a checkout there may be collections; a clone alone makes its own.
SHARED = ROOT.parent / "shared" / "data"
MAX_LENGTH = 128

DTYPES = ("float32", "bfloat16")


def arguments(description: str, **options: tuple[Any, str]) -> argparse.Namespace:
    """Parses the options of one benchmark: `name=(default, help)`, and the ones that all have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="where to write the result")
    parser.add_argument("--data", default=None, help="a collection instead of the benchmark's own choice")
    for name, (default, text) in options.items():
        kind = str if default is None else type(default)
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    quiet()
    return parser.parse_args()


def quiet() -> None:
    """Silences libraries; what a benchmark has to say stands in its result."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_DISTILL_PROGRESS", "0")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")
    for name in ("sentence_transformers", "transformers", "datasets", "hf_distill"):
        logging.getLogger(name).setLevel(logging.ERROR)


def say(message: str) -> None:
    """A line for whoever watches."""
    print(message, flush=True)


def open_collection(preferred: str, data: str | None, num_passages: int = 8000) -> Any:
    """The collection to measure on.

    Args:
        preferred: Folder of a collection beside the checkout that is taken if it is there.
        data: A collection that somebody asked for instead.
        num_passages: Size of the demo collection, which is made where the other one is missing.
    """
    from hf_distill.data import build_demo_collection, load_collection

    if data is not None:
        return load_collection(data)
    if (SHARED / preferred).is_dir():
        return load_collection(str(SHARED / preferred))
    folder = SCRATCH / f"demo-{num_passages}"
    if not (folder / "README.md").is_file():
        say(f"making the demo collection of {num_passages} passages in {folder}")
        build_demo_collection(folder, num_passages=num_passages)
    return load_collection(str(folder))


def data_name(collection: Any) -> str:
    """How a report names the collection."""
    return f"{collection.name} ({len(collection.corpus):,} passages)"


def distinct_texts(collection: Any, count: int, seed: int = 0) -> list[str]:
    """`count` different passages in random order."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(collection.corpus))
    texts = dict.fromkeys(collection.corpus.texts(order[: 2 * count]))
    if len(texts) < count:
        raise SystemExit(f"{collection.name} has only {len(texts)} different passages; lower the number")
    return list(texts)[:count]


def dense_model(**overrides: Any) -> Any:
    """The model, opened by this library."""
    from hf_distill.models import DenseRetriever

    return DenseRetriever.from_pretrained(MODEL, query_length=MAX_LENGTH, passage_length=MAX_LENGTH, **overrides)


def peer_model(dtype: str = "float32", attention: str | None = None) -> Any:
    """The same files, opened by sentence-transformers."""
    import torch
    from sentence_transformers import SentenceTransformer

    from hf_distill.models.source import find_model

    settings: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if attention is not None:
        settings["attn_implementation"] = attention
    model = SentenceTransformer(str(find_model(MODEL).folder), model_kwargs=settings)
    model.max_seq_length = MAX_LENGTH
    return model


# ------------------------------------------------------------------------------------------------------------- time


def alternate(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Runs every contestant once a round, in turns of forward and backward order.

    Args:
        contestants: Functions that return the seconds which their work took.
        rounds: How often.

    Returns:
        The seconds of each, one a round: what stands at the same place was measured side by side.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in list(contestants) if number % 2 == 0 else reversed(contestants):
            gc.collect()
            seconds[name].append(contestants[name]())
        say(f"  round {number + 1}/{rounds}: " + ", ".join(f"{name} {one[-1]:.2f} s" for name, one in seconds.items()))
    return seconds


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 3:
        return min(values), statistics.median(values), max(values)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def spread(values: Sequence[float], form: str = "{:.0f}") -> str:
    """`median (smallest – largest)`."""
    low, middle, high = (form.format(value) for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} – {high})"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Their seconds over ours, round by round: how many times as fast we are."""
    return [b / a for a, b in zip(ours, theirs, strict=True)]


def claim(what: str, values: Sequence[float], target: float | None, form: str = "{:.2f}×") -> dict[str, str]:
    """One line of the report: a ratio, its spread, its target and whether it was reached.

    *Met* and *missed* need the whole middle half of the rounds on that side of the target; everything else is *within
    noise*.
    """
    lower, _, upper = quartiles(values)
    if target is None:
        verdict = "no target"
    elif lower >= target:
        verdict = "met"
    elif upper < target:
        verdict = "**missed**"
    else:
        verdict = "within noise"
    return {
        "what": what,
        "ratio": spread(values, form),
        "rounds": str(len(values)),
        "target": "–" if target is None else "≥ " + form.format(target),
        "verdict": verdict,
    }


# ----------------------------------------------------------------------------------------------------------- memory


def memory_now(field: str = "RssAnon") -> int | None:
    """Bytes of this process's memory: `RssAnon` is what it has taken, `VmRSS` includes files read through a map."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


class PeakMemory:
    """The most memory that the process took inside the `with`, above what it had before.

    Sampled every few milliseconds; only memory of its own counts (`RssAnon` of Linux), since pages of a mapped file
    are given back whenever somebody else needs them.
    """

    bytes: int = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self.before = memory_now() or 0
        self.highest, self._stop = self.before, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.004):
            self.highest = max(self.highest, memory_now() or 0)

    def __exit__(self, *_: Any) -> None:
        self.highest = max(self.highest, memory_now() or 0)
        self._stop.set()
        self._thread.join()
        self.bytes = self.highest - self.before


def mebibytes(count: float) -> str:
    """`123 MiB`."""
    return f"{count / 2**20:,.0f} MiB"


# ---------------------------------------------------------------------------------------------------------- results


class Report:
    """What a benchmark found: a table, what is claimed of it, and what had to hold.

    Args:
        args: The benchmark's options; the report goes to `args.json`, or is shown where that is not given.
        title: Of its section in `RESULTS.md`.
        columns: Of the table.
    """

    def __init__(self, args: argparse.Namespace, title: str, columns: Sequence[str]) -> None:
        self._path: Path | None = args.json
        self._found: dict[str, Any] = {
            "title": title,
            "columns": list(columns),
            "rows": [],
            "claims": [],
            "checks": [],
        }

    def row(self, *cells: str) -> None:
        """A row of the table."""
        self._found["rows"].append(list(cells))

    def claim(self, what: str, values: Sequence[float], target: float | None = None, form: str = "{:.2f}×") -> None:
        """A ratio, one value a round, that should reach `target`: see [`claim`]."""
        self._found["claims"].append(claim(what, values, target, form))

    def claim_growth(self, what: str, ratio: float, most: float) -> None:
        """A ratio, measured once, that should stay below `most`."""
        verdict = "met" if ratio <= most else "**missed**"
        self._found["claims"].append(
            {"what": what, "ratio": f"{ratio:.2f}×", "rounds": "1", "target": f"≤ {most:.2f}×", "verdict": verdict}
        )

    def check(self, condition: bool, what: str) -> None:
        """Notes something that has to hold; stops the benchmark where it does not."""
        if not condition:
            raise SystemExit(f"the two sides do not compute the same: {what}")
        self.note(what)

    def note(self, what: str) -> None:
        """A line below the claims."""
        self._found["checks"].append(what)

    def finish(self, intro: str) -> None:
        """Writes the result for `run.py`; `intro` says what was measured and how."""
        import torch

        write_result(self._path, {**self._found, "intro": intro, "threads": torch.get_num_threads()})


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Writes a result as JSON, or shows it where there is no path."""
    text = json.dumps(result, indent=1, ensure_ascii=False)
    if path is None:
        say(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")


def in_own_process(benchmark: str, **options: Any) -> dict[str, Any]:
    """Runs `python -m benchmarks.<benchmark>` with these options; returns the JSON object that it [`tell`]s.

    Memory is measured so: what a process took and gave back changes what the next measurement in it sees.
    """
    command = [sys.executable, "-m", f"benchmarks.{benchmark}"]
    command += [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


def tell(**found: Any) -> None:
    """Hands what was measured to the process that asked with [`in_own_process`]."""
    say(json.dumps(found))


def write_vectors(path: Path, count: int, width: int) -> None:
    """Random vectors in a file, block by block."""
    import numpy as np

    generator = np.random.default_rng(0)
    stored = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, width))
    for start in range(0, count, 50_000):
        stop = min(start + 50_000, count)
        stored[start:stop] = generator.standard_normal((stop - start, width), dtype=np.float32)
    stored.flush()


@contextlib.contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """A new folder, removed at the end."""
    import shutil
    import tempfile

    SCRATCH.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=SCRATCH))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
