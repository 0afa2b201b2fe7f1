"""The manifest of a recipe's run: what its stages read and made, and the command that makes it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import read_json
from ..hub.manifest import MANIFEST, REVISIONS, artefact, recorded_sources, write_manifest
from ..provenance import current
from .records import Record, Workspace


# What the report leaves at the top of the folder.
_REPORT = ("metrics.json", "report.md", "report.html")


def write_recipe_manifest(workspace: Workspace, records: Mapping[str, Record], metrics: Mapping[str, Any]) -> Path:
    """Writes the manifest of a run that has come to its end.

    Its artefacts are the report's files; those of a stage stand in the stage's own manifest. A stage that lies on the
    Hub only has none here, and what it had read is not known.

    Args:
        workspace: The run's folder.
        records: Of the stages that have been started.
        metrics: Of all stages.
    """
    paths = {name: workspace.result(name) / MANIFEST for name in records}
    manifests = {name: read_json(path) for name, path in paths.items() if path.is_file()}
    read = [*recorded_sources(), *(one for manifest in manifests.values() for one in manifest.get("sources", ()))]
    sources = {(one["kind"], str(one["name"]), str(one["revision"])): one for one in read}
    recorded = current()
    again = {}
    if recorded is not None:
        again["arguments"] = [recorded.verb, *_pinned(recorded.arguments, manifests)]
    return write_manifest(
        workspace.folder,
        files={name: artefact(path) for name in _REPORT if (path := workspace.folder / name).is_file()},
        **again,
        sources=[sources[key] for key in sorted(sources)],
        seeds={
            f"{name}.{seed}": value
            for name, manifest in manifests.items()
            for seed, value in manifest.get("seeds", {}).items()
        },
        data={"stages": {name: _results(manifest) for name, manifest in manifests.items()}},
        metrics=metrics,
    )


def _results(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies the result of a stage."""
    rows = manifest.get("data", {}).get("rows")
    student = manifest.get("models", {}).get("student", {})
    found = {"verb": manifest.get("verb"), "weights": student.get("weights")}
    # The rows that a training has read are another stage's result.
    if "weights" not in student and isinstance(rows, Mapping):
        found["rows"] = rows.get("fingerprint")
    return {name: value for name, value in found.items() if value is not None}


def _pinned(words: list[str], manifests: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The recipe's arguments, with the commits that its stages have read set as their revisions."""
    kept: list[str] = []
    overrides: list[str] = []
    inside = False
    for word in words:
        inside = word == "--set" or (inside and not word.startswith("--"))
        if word != "--set":
            (overrides if inside else kept).append(word)
    overrides += [pin for name, manifest in manifests.items() for pin in _pins(name, manifest)]
    return [*kept, *(["--set", *overrides] if overrides else [])]


def _pins(stage: str, manifest: Mapping[str, Any]) -> Iterator[str]:
    config = manifest.get("config", {})
    commits = {one["name"]: one["revision"] for one in manifest.get("sources", ()) if one.get("revision")}
    for option, revision in REVISIONS.items():
        named = config.get(option)
        named = named[0] if isinstance(named, list) and len(named) == 1 else named
        if isinstance(named, str) and named in commits and revision in config and config[revision] is None:
            yield f"{stage}.{revision}={commits[named]}"
