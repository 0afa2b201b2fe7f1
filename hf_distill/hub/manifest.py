"""`run_manifest.json`: everything that a repetition of a run needs to know."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from ..distributed import world_size


PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "huggingface-hub",
    "tokenizers",
    "safetensors",
    "numpy",
    "pyarrow",
    "faiss-cpu",
    "faiss-gpu",
    "bm25s",
    "pytrec-eval-terrier",
    "deepspeed",
)
_SECRET = ("token", "password", "secret", "api_key")
# Field names that contain a secret's name and are none.
_HARMLESS = ("token_budget", "include_tokens_per_second", "include_num_input_tokens_seen")


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that a result depends on."""
    found = {"python": platform.python_version(), "hf_distill": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_version() -> str | None:
    """The git commit of this package's checkout, with `+changed` where files differ; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # An installed copy may lie inside a checkout of somebody else's project.
    if git("ls-files", "--error-unmatch", __file__) is None:
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}+changed" if git("status", "--porcelain", "--", str(folder.parent)) else commit


def hardware() -> dict[str, Any]:
    """Processor, memory, threads and accelerators of this machine."""
    import torch

    facts: dict[str, Any] = {
        "machine": platform.machine(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return facts


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def without_secrets(value: Any) -> Any:
    """A copy of nested settings with every token and password blanked."""
    if isinstance(value, Mapping):
        return {
            key: "<hidden>" if _is_secret(str(key)) and item else without_secrets(item) for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return value


def _is_secret(name: str) -> bool:
    return name not in _HARMLESS and any(word in name.lower() for word in _SECRET)


def run_manifest(**sections: Any) -> dict[str, Any]:
    """The manifest of a run.

    Args:
        sections: What the run knows: `command`, `config`, `data`, `models`, `seeds`, `metrics` ...

    Returns:
        A JSON-like mapping without secrets.
    """
    return without_secrets(
        {
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command_line(),
            "code": code_version(),
            "versions": versions(),
            "hardware": hardware(),
            "world_size": world_size(),
            **sections,
        }
    )


def command_line() -> list[str]:
    """This process's command line, with the value of every secret flag blanked."""
    words, hide = [], False
    for word in [Path(sys.argv[0]).name, *sys.argv[1:]]:
        name, equals, _ = word.partition("=")
        secret = word.startswith("--") and _is_secret(name[2:].replace("-", "_"))
        words.append("<hidden>" if hide else f"{name}=<hidden>" if secret and equals else word)
        hide = secret and not equals
    return words
