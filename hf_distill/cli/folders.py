"""Which run an output folder belongs to: one at a time, and the same one again after a stop."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from ..console import get_logger, is_main_process
from ..data.rows_io import check_rows_folder
from ..distributed import engine_of, wait_for_everyone
from ..errors import InputError
from ..files import read_json, remove_leftovers, write_json
from ..hub.manifest import MANIFEST, config_of, without_secrets
from ..locking import lock_folder, unlock_folder
from ..provenance import current
from ..settings import NOT_OF_THE_RUN


logger = get_logger(__name__)

KEY_FILE = "run_key.json"


def settings_of(*options: Any, **facts: Any) -> dict[str, Any]:
    """The settings that make a run what it is, as JSON: option objects without what has no effect on the result.

    A trainer's arguments bring the number of processes and their engine along.
    """
    settings: dict[str, Any] = {}
    for option in options:
        if hasattr(option, "world_size"):
            settings |= {"processes": option.world_size, "engine": engine_of(option)}
        fields = option.to_dict() if hasattr(option, "to_dict") else asdict(option) if is_dataclass(option) else option
        settings.update({name: value for name, value in fields.items() if name not in NOT_OF_THE_RUN})
    return json.loads(json.dumps(without_secrets({**settings, **facts}), default=str, sort_keys=True))


def claim_output(folder: str | Path, settings: Mapping[str, Any]) -> Path:
    """Makes `folder` the output of the run with these settings until this process ends; all processes must call it.

    Raises:
        InputError: If it is another run's, naming what differs, holds files that are no run's, or another process
            works in it now.
    """
    folder = Path(folder)
    if is_main_process():
        key = folder / KEY_FILE
        if not key.is_file() and folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise InputError(
                "is not empty and holds no run of this command",
                where=str(folder),
                cure="Choose another --output_dir, or remove that folder",
            )
        # First the lock, then the key: of two runs that start at once only one may write it.
        lock_folder(folder)
        try:
            _claim(folder, settings)
        except InputError:
            unlock_folder(folder)
            raise
    wait_for_everyone()
    return folder


# What a run was begun with, in words; `data_fingerprint` says so part by part.
_INPUTS = {
    "rows_fingerprint": "the training rows",
    "start_weights": "the weights to start from",
    "student_weights": "the weights to start from",
    "teacher_weights": "a teacher's weights",
}


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    key = folder / KEY_FILE
    if not key.is_file():
        write_json(key, settings)
        return
    theirs = read_json(key)
    begun = any(entry != key and not entry.name.startswith(".") for entry in folder.iterdir())
    differing = sorted(name for name in {*theirs, *settings} if theirs.get(name) != settings.get(name))
    if not differing:
        if begun:
            logger.info("%s holds this run already: going on where it stopped.", folder)
    elif not begun:
        write_json(key, settings)  # the other run ended before it left anything, at bad input for example
    elif inputs := [what for name in differing for what in _changed_inputs(name, theirs, settings)]:
        raise InputError(
            f"holds a run that was begun with other data: {', '.join(inputs)} changed since",
            where=str(folder),
            cure="Bring back what it was, choose another --output_dir, or remove that folder to start anew",
        )
    else:
        shown = "; ".join(f"{name}: {theirs.get(name)!r}, now {settings.get(name)!r}" for name in differing[:5])
        raise InputError(
            f"holds another run ({shown})",
            where=str(folder),
            cure="Choose another --output_dir, or remove that folder",
        )


def _changed_inputs(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What differs in a setting that stands for content, in words; nothing for other settings.

    A run of other data by name (another `--data`, another teacher) is another run, and is told as that.
    """
    if any(theirs.get(option) != ours.get(option) for option in ("data", "rows", "model", "teacher", "student")):
        return []
    before, now = theirs.get(name), ours.get(name)
    if name == "data_fingerprint" and isinstance(before, Mapping) and isinstance(now, Mapping):
        return [f"the {part}" for part in sorted({*before, *now}) if before.get(part) != now.get(part)]
    return [_INPUTS[name]] if name in _INPUTS else []


def claim_rows(folder: Path, *, adds: bool = False) -> Path:
    """Makes this run the only one that writes the row set `folder`; all processes must call it.

    Args:
        folder: The row set's.
        adds: The row set there is read, and written with one more column.

    Raises:
        InputError: If there is something else, or rows that another command has made; or another process writes there.
    """
    if is_main_process():
        check_rows_folder(folder)
        if not adds:
            _check_maker(folder)
        lock_folder(folder, beside=True)
        remove_leftovers(folder)
    wait_for_everyone()
    return folder


def _check_maker(folder: Path) -> None:
    recorded, path = current(), folder / MANIFEST
    if recorded is None or not path.is_file():
        return
    theirs = read_json(path)
    if theirs.get("verb") == recorded.verb:
        # A setting that one of the two lacks came with another version of this package.
        before, now = theirs.get("config", {}), config_of(recorded.options)
        differing = sorted(
            name for name in {*before} & {*now} if before[name] != now[name] and name not in NOT_OF_THE_RUN
        )
        shown = "; ".join(f"{name}: {before[name]!r}, now {now[name]!r}" for name in differing[:5])
    else:
        # Rows that were scored where they are can be mined again: the scores are in the cache.
        shown = "" if theirs.get("verb") == "score" else f"of hf-distill {theirs.get('verb')}"
    if shown:
        raise InputError(
            f"holds another run's rows ({shown})",
            where=str(folder),
            cure="Choose another --output_dir, or remove that folder",
        )
