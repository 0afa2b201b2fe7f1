"""Skip keys: what a stage's result depends on, so that equal keys mean that nothing is to be done.

A key is made of the verb and its version number, the settings, the keys of the stages that are read, and the contents
of files and folders that are named; where those lie does not count, so that a run can go on on another machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import file_fingerprint, fingerprint, read_json, write_json
from ..settings import NOT_OF_THE_RUN
from .loading import Recipe, Stage


class Contents:
    """Fingerprints of files and folders; a file is read again only when its size or time has changed.

    Args:
        path: A JSON file that remembers them from one start to the next.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._known: dict[str, list[Any]] = dict(read_json(path))
        except (OSError, ValueError):
            self._known = {}
        self._folders: dict[Path, str] = {}
        self._changed = False

    def of(self, path: str | os.PathLike) -> str:
        """16 hexadecimal digits of a file's bytes, or of the names and bytes in a folder (hidden ones left out)."""
        path = Path(path)
        if path.is_file():
            return self._of_file(path)
        if path not in self._folders:
            files = sorted(_files(path))
            self._folders[path] = fingerprint([[str(file.relative_to(path)), self._of_file(file)] for file in files])
        return self._folders[path]

    def _of_file(self, file: Path) -> str:
        status = file.stat()
        name = str(file.resolve())
        seen = [status.st_size, status.st_mtime_ns]
        if self._known.get(name, [])[:2] != seen:
            self._known[name] = [*seen, file_fingerprint(file)]
            self._changed = True
        return self._known[name][2]

    def save(self) -> None:
        """Writes what was learned."""
        if self._changed:
            write_json(self.path, self._known)
            self._changed = False


def _files(folder: Path) -> Iterator[Path]:
    """The files below a folder, hidden ones left out."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _files(Path(entry.path))
            else:
                yield Path(entry.path)


def stage_parts(stage: Stage, keys: Mapping[str, str], contents: Contents) -> dict[str, Any]:
    """What the result of a stage depends on, by a name that a person understands."""
    parts: dict[str, Any] = {"verb": stage.kind.verb, "version": stage.kind.version}
    for name, value in stage.settings.items():
        if name not in NOT_OF_THE_RUN:
            parts[name] = _part(value, contents) if name in stage.kind.inputs else value
    for other in stage.needs:
        parts[f"stage {other}"] = keys[other]
    if stage.kind.trains and stage.launch is not None:
        parts["launch"] = stage.launch
    return parts


def stage_keys(recipe: Recipe, contents: Contents) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """The keys of all stages, and the parts that they are made of."""
    keys: dict[str, str] = {}
    parts: dict[str, dict[str, Any]] = {}
    for name, stage in recipe.stages.items():
        parts[name] = stage_parts(stage, keys, contents)
        keys[name] = fingerprint(parts[name])
    return keys, parts


def _part(value: Any, contents: Contents) -> Any:
    if isinstance(value, list):
        return [_part(one, contents) for one in value]
    if isinstance(value, str) and "${" not in value:
        # `corpus=FILE` says what a file is.
        role, equals, path = value.rpartition("=")
        if path and Path(path).expanduser().exists():
            return {"contents": contents.of(Path(path).expanduser()), **({"role": role} if equals else {})}
    return value


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two sets of parts, one short phrase each."""
    changes = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        if name.startswith("stage "):
            changes.append(f"{name} is another one")
        elif isinstance(before, Mapping) and isinstance(after, Mapping) and {"contents"} == set(before) == set(after):
            changes.append(f"the files of {name} changed")
        elif name == "version":
            changes.append(f"the code of this kind of stage changed (version {before} -> {after})")
        else:
            changes.append(f"{name}: {_short(before)} -> {_short(after)}")
    return changes


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
