"""`run_manifest.json`: everything that a repetition of a run needs to know."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from ..console import get_logger
from ..files import read_json, write_json
from ..provenance import current


logger = get_logger(__name__)

MANIFEST = "run_manifest.json"
HIDDEN = "<hidden>"

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "huggingface-hub",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
    "faiss-cpu",
    "faiss-gpu",
    "bm25s",
    "pytrec-eval-terrier",
    "numba",
    "PyStemmer",
    "peft",
    "deepspeed",
)
# Options that name what is read, with the option that names its revision.
REVISIONS = {
    "data": "data_revision",
    "rows": "rows_revision",
    "model": "model_revision",
    "teacher": "teacher_revision",
    "student": "student_revision",
    "filter_teacher": "filter_teacher_revision",
    "stream": "stream_revision",
}
_SECRET = re.compile(r"(^|[_.])(token|password|passwd|secret|(api|access)_?key)($|[_.])")
# A field name that has a secret's name in it and is none.
_HARMLESS = ("token_budget",)


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
        return {key: HIDDEN if _is_secret(str(key)) and item else without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return value


def _is_secret(name: str) -> bool:
    return name not in _HARMLESS and _SECRET.search(name.lower().replace("-", "_")) is not None


def artefacts(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file that would be pushed; manifests are left out."""
    from .push import files_of

    found = sorted(files_of(Path(folder)).items())
    return {name: artefact(path) for name, path in found if not fnmatch.fnmatch(name, "run_manifest*.json")}


def artefact(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def with_files(manifest: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, Any]:
    """A manifest that knows some files as they are now."""
    known = {name: artefact(path) for name, path in files.items()}
    return {**manifest, "artefacts": {**manifest.get("artefacts", {}), **known}}


def note_files(folder: Path, *names: str) -> None:
    """Tells a folder's manifest, if there is one, of files that were written after it."""
    if (folder / MANIFEST).is_file():
        files = {name: folder / name for name in names}
        write_json(folder / MANIFEST, with_files(read_json(folder / MANIFEST), files))


def run_manifest(**sections: Any) -> dict[str, Any]:
    """The manifest of a run: what every run has, and `sections`.

    What the command line knows (verb, options, what was read, times) comes from [`hf_distill.provenance`].

    Args:
        sections: What the run knows besides: `data`, `models`, `rows`, `training`, `metrics` ...

    Returns:
        A JSON-like mapping without secrets.
    """
    from ..distributed import world_size

    now, recorded = datetime.now(UTC), current()
    manifest: dict[str, Any] = {
        "made": now.isoformat(timespec="seconds"),
        "verb": recorded.verb if recorded else None,
        "command": command_line(),
        "code": code_version(),
        "versions": versions(),
        "hardware": hardware(),
        "world_size": world_size(),
        "launch": launch_facts(),
    }
    if recorded is not None:
        config = config_of(recorded.options)
        started = recorded.started
        manifest |= {
            # Of the last start; what an earlier one had finished was not done again.
            "times": {
                "started": started.isoformat(timespec="seconds"),
                "finished": now.isoformat(timespec="seconds"),
                "seconds": round((now - started).total_seconds(), 1),
            },
            "arguments": [recorded.verb, *_hide(recorded.arguments)],
            "config": config,
            "seeds": {name: value for name, value in config.items() if name == "seed" or name.endswith("_seed")},
            "precision": _precision(config),
            "sources": recorded_sources(),
        }
    return without_secrets(json.loads(json.dumps({**manifest, **sections}, default=str)))


def recorded_sources() -> list[dict[str, Any]]:
    """What the verb has read so far, as a manifest holds it."""
    recorded = current()
    return [
        {"kind": kind, "name": name, "revision": revision, **facts()}
        for (kind, name, revision), facts in sorted(recorded.sources.items() if recorded else (), key=str)
    ]


def write_manifest(folder: str | os.PathLike, *, files: Mapping[str, Any] | None = None, **sections: Any) -> Path:
    """Writes `run_manifest.json`, with hashes of all that lies in `folder`; so it is written last.

    A folder that another verb has made keeps that manifest; the later verb's is `run_manifest.<verb>.json` then.

    Args:
        folder: The result's.
        files: The artefacts, where not every file in the folder is one.
        sections: See [`run_manifest`].
    """
    path = Path(folder) / MANIFEST
    manifest = run_manifest(**sections)
    # What the run itself has made and then read is no source of it.
    own = f"{os.path.abspath(folder)}{os.sep}"
    sources = [one for one in manifest.get("sources", ()) if not os.path.abspath(one["name"]).startswith(own)]
    manifest |= {"sources": sources} if "sources" in manifest else {}
    if path.is_file() and (verb := read_json(path).get("verb")) not in (None, manifest["verb"]):
        logger.debug("%s is of %s and stays", path, verb)
        path = path.with_name(f"run_manifest.{manifest['verb']}.json")
    write_json(path, {**manifest, "artefacts": artefacts(folder) if files is None else dict(files)})
    return path


def launch_facts() -> dict[str, Any]:
    """How the processes were started, and what runs them."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else None
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        launcher = "accelerate launch"
    facts: dict[str, Any] = {"typed": os.environ.get("HF_DISTILL_LAUNCH"), "launcher": launcher}
    if PartialState._shared_state:  # asking would start the state, and with it a process group
        state = PartialState()
        facts |= {"distributed": state.distributed_type.value, "device": str(state.device), "backend": state.backend}
    if AcceleratorState._shared_state:
        facts["mixed_precision"] = AcceleratorState().mixed_precision
    return facts


def config_of(options: Sequence[Any]) -> dict[str, Any]:
    """All settings of parsed option objects, as a manifest holds them."""
    found: dict[str, Any] = {}
    for option in options:
        found |= option.to_dict() if hasattr(option, "to_dict") else asdict(option)
    return without_secrets(json.loads(json.dumps(found, default=str)))


def _precision(config: Mapping[str, Any]) -> dict[str, str]:
    """The arithmetic of training and of everything else, as it was chosen for this machine."""
    found = {}
    if "bf16" in config:
        found["training"] = "bfloat16" if config["bf16"] else "float16" if config.get("fp16") else "float32"
    if "dtype" in config:
        import torch

        from ..retrieval.inference import choose_dtype

        found["encoding"] = choose_dtype(config["dtype"], "cuda" if torch.cuda.is_available() else "cpu")
    return found


def command_line() -> list[str]:
    """The command as it was typed, with the value of every secret flag blanked."""
    recorded = current()
    if recorded is None:
        return [Path(sys.argv[0]).name, *_hide(sys.argv[1:])]
    launch = os.environ.get("HF_DISTILL_LAUNCH", "").split()
    return ["hf-distill", *launch, recorded.verb, *_hide(recorded.words)]


def _hide(typed: Sequence[str]) -> list[str]:
    words, hide = [], False
    for word in typed:
        name, equals, _ = word.partition("=")
        secret = word.startswith("--") and _is_secret(name[2:])
        words.append(HIDDEN if hide else f"{name}={HIDDEN}" if secret and equals else word)
        hide = secret and not equals
    return words
