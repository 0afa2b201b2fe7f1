"""The README of a data folder: a YAML header that tells `datasets` where the configs lie, then text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import write_text


_HEADER = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


def split_card(card: str, where: str = "card") -> tuple[dict[str, Any], str]:
    """The metadata and the text of a card; a card without a header has no metadata."""
    import yaml

    match = _HEADER.match(card)
    if match is None:
        return {}, card
    try:
        metadata = yaml.safe_load(match.group(1)) or {}
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 2
        raise InputError(
            f"the YAML header is broken ({getattr(error, 'problem', None) or error})",
            where=f"{where}, line {line}",
            cure="Mend the lines between the two '---'",
        ) from None
    if not isinstance(metadata, dict):
        raise InputError("the YAML header is no mapping", where=where, cure="Write it as 'key: value' lines")
    return metadata, card[match.end() :]


def read_card(path: Path) -> tuple[dict[str, Any], str]:
    """Metadata and text of a README."""
    try:
        return split_card(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise InputError("not UTF-8", where=str(path), cure="Convert the file to UTF-8") from None


def join_card(metadata: Mapping[str, Any], text: str) -> str:
    """A card of metadata and text."""
    import yaml

    header = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n{text}"


def config_entry(name: str, files: Mapping[str, str]) -> dict[str, Any]:
    """One entry of `configs:`; `files` maps splits to paths or patterns."""
    return {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in files.items()]}


def add_config(readme: Path, entry: Mapping[str, Any]) -> None:
    """Adds `entry` to the configs of a README, in the place of one of the same name."""
    metadata, text = read_card(readme) if readme.exists() else ({}, "")
    configs = list(metadata.get("configs") or [])
    names = [config.get("config_name", "default") for config in configs]
    if entry["config_name"] in names:
        configs[names.index(entry["config_name"])] = dict(entry)
    else:
        configs.append(dict(entry))
    write_text(readme, join_card({**metadata, "configs": configs}, text))
