"""Runs the benchmarks, each in a process of its own, and writes what they found to `benchmarks/RESULTS.md`.

python benchmarks/run.py                          # all, about twenty minutes on two quiet cores
python benchmarks/run.py --only encoding mining   # some; the others' last results stay in the report
python benchmarks/run.py --quick                  # small sizes, about three minutes, to outputs/benchmarks/quick
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parent.parent

# Small sizes: they show that everything runs, and roughly what comes out.
QUICK = {
    "encoding": ["--passages", "192", "--rounds", "3"],
    "training": ["--batch", "8", "--steps", "1", "--rounds", "3"],
    "caching": ["--batch", "16", "--rounds", "2", "--memory", "4,64", "--plain", "16", "--chunk", "8"],
    "mining": ["--passages", "500", "--queries", "100", "--rounds", "1", "--warm", "1", "--batch", "32"]
    + ["--vectors", "70000,140000"],
    "neighbours": ["--vectors", "20000,100000", "--queries", "200", "--rounds", "1"],
    "distillation": ["--batch", "8", "--steps", "1", "--rounds", "3"],
    "scoring": ["--queries", "4", "--candidates", "24", "--rounds", "3"],
    "layers": ["--batch", "4", "--negatives", "1", "--steps", "1", "--rounds", "1", "--queries", "10"],
    "conversion": ["--passages", "100000", "--rounds", "3"],
    "inline_rows": ["--rows", "512", "--timed", "128", "--batch", "4", "--steps", "2", "--rounds", "2"],
    "streaming": ["--rows", "50000", "--passages", "50000", "--timed", "20000", "--tokenised", "1024"]
    + ["--rounds", "3"],
    "overhead": ["--batch", "8", "--steps", "2", "--rounds", "3"],
    "lexical_training": ["--batch", "8", "--steps", "1", "--rounds", "3"],
    "pretraining": ["--batch", "8", "--steps", "1", "--rounds", "3"],
    "sparse_search": ["--passages", "20000", "--grown", "100000", "--queries", "100", "--rounds", "3"]
    + ["--many", "30000"],
}
PACKAGES = ("hf_distill", "torch", "transformers", "sentence-transformers", "tokenizers", "faiss-cpu", "numpy")


def hardware() -> str:
    """This machine in a line."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
        flags = {word for word in Path("/proc/cpuinfo").read_text().split() if word.startswith(("avx512", "amx"))}
        known = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
        name += f" with {', '.join(known)}" if known else ""
        memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
        name += f", {memory:.0f} GiB"
    except (OSError, ValueError, IndexError):
        pass
    return f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores of {name}"


def versions() -> str:
    """What is installed, in a line."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def run(name: str, extra: Sequence[str], folder: Path) -> None:
    """One benchmark in its process; its result lies in `folder` afterwards."""
    path = folder / f"{name}.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(path), *extra]
    environment = {**os.environ, "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
    load, start = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, time.perf_counter()
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        raise SystemExit(f"benchmark {name} failed")
    result = json.loads(path.read_text(encoding="utf-8"))
    result["provenance"] = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m", f"benchmarks.{name}", *extra]),
        "hardware": hardware(),
        "versions": versions(),
        "seconds": round(time.perf_counter() - start),
        "load_before": round(load, 1),
    }
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def section(result: dict[str, Any]) -> list[str]:
    """One benchmark's part of the report."""
    about = result["provenance"]
    lines = [f"## {result['title']}", "", result["intro"], "", *table(result["columns"], result["rows"]), ""]
    lines += ["How many times as fast (or as small) as the peer:", ""]
    claims = [[one["what"], one["ratio"], one["rounds"], one["target"], one["verdict"]] for one in result["claims"]]
    lines += table(["comparison", "ratio: median (range)", "rounds", "target", "verdict"], claims)
    lines += ["", *(f"- {line}" for line in result["checks"]), ""]
    lines.append(
        f"`{about['command']}`, {about['date']}, {about['seconds']} s; {about['hardware']}, "
        f"{result['threads']} threads, load before the start {about['load_before']}; {about['versions']}."
    )
    return [*lines, ""]


def write_report(folder: Path, target: Path) -> None:
    """Writes all results that lie in `folder` as Markdown."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench` (`python benchmarks/run.py`). Both sides run the same model "
        "(all-MiniLM-L6-v2) on the same texts in the same precision, in turns of forward and backward order in one "
        "process unless said otherwise; a ratio compares two runs of the same round. *Met* and *missed* mean that the "
        "whole middle half of the rounds lies on that side of the target, *within noise* that it does not.",
        "",
    ]
    for name in QUICK:
        path = folder / f"{name}.json"
        if path.is_file():
            lines += section(json.loads(path.read_text(encoding="utf-8")))
    target.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(f"\n{target.read_text(encoding='utf-8')}\nWritten to {target}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(QUICK), default=list(QUICK), help="which benchmarks")
    parser.add_argument("--quick", action="store_true", help="small sizes, to outputs/benchmarks/quick")
    parser.add_argument("--data", default=None, help="measure on this collection instead of each benchmark's choice")
    args = parser.parse_args()
    results = ROOT / "outputs" / "benchmarks" / "quick" if args.quick else ROOT / "benchmarks" / "results"
    results.mkdir(parents=True, exist_ok=True)
    target = results / "RESULTS.md" if args.quick else ROOT / "benchmarks" / "RESULTS.md"
    for name in args.only:
        print(f"\n=== {name}", flush=True)
        extra = [*(QUICK[name] if args.quick else []), *(["--data", args.data] if args.data else [])]
        run(name, extra, results)
        write_report(results, target)


if __name__ == "__main__":
    main()
