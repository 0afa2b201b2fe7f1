"""What a finished stage has to show: its measures, the size of its rows, and one headline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import read_json
from .kinds import ROWS
from .loading import Stage


def stage_figures(stage: Stage, folder: Path) -> dict[str, Any]:
    """Figures of a stage's result, small enough for its record.

    Returns:
        `headline`, a few words for the table; `metrics`, as in `metrics.json`; `rows`, the number of rows.
    """
    if stage.kind.result == ROWS:
        return _of_rows(folder)
    try:
        metrics = read_json(folder / "metrics.json")
    except (OSError, ValueError):
        return {"headline": ""}
    return {"headline": _headline(metrics, stage.kind.system), "metrics": metrics}


def _of_rows(folder: Path) -> dict[str, Any]:
    try:
        metadata = read_json(folder / "metadata.json")
    except (OSError, ValueError):
        return {"headline": ""}
    rows = metadata.get("rows", 0)
    selection = metadata.get("selection")
    of_all = f" of {selection['queries']:,}" if selection else ""
    return {"headline": f"{rows:,}{of_all} rows", "rows": rows, "columns": metadata.get("columns", [])}


def _headline(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]], system: str | None) -> str:
    """The first measure of the stage's own system, or of the best one."""
    for dataset, systems in metrics.items():
        measure = next((name for figures in systems.values() for name in figures if "@" in name), None)
        measured = {name: figures[measure] for name, figures in systems.items() if measure in figures}
        if not measured:
            continue
        if system in measured:
            return f"{measure} {measured[system]:.4f}"
        best = max(measured, key=measured.get)
        return f"{dataset}: {best} {measured[best]:.4f}"
    return ""


def own_figures(stage: Stage, figures: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The systems of a stage for the table of the whole run, by dataset: its own model under the stage's name, or
    (for a stage that measures) everything that it measured."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for dataset, systems in figures.get("metrics", {}).items():
        if stage.kind.system is None:
            found[dataset] = dict(systems)
        elif stage.kind.system in systems:
            found[dataset] = {stage.name: systems[stage.kind.system]}
    return found
