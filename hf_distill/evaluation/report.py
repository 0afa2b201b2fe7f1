"""What is written about systems: `metrics.json`, results of each query, and a table."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..console import print_table
from ..errors import InputError
from ..files import atomic_path, read_json, write_json
from .measures import DEFAULT_MEASURES, Result


# Systems in the order of a reader's questions: the cheap baseline, the goal, the start, and what came of it.
SYSTEM_ORDER = ("bm25", "teacher", "student_before", "student_no_teacher", "student")
# Figures other than measures, under the keys that `metrics.json` has for them.
FIGURES = {
    "layers": "layers",
    "parameters": "parameters",
    "passages_per_second": "passages/s",
    "index_bytes": "index",
    "seconds": "seconds",
}


def update_metrics(path: str | os.PathLike, dataset: str, system: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Adds a system's figures to a `metrics.json`; everything else in the file stays.

    Args:
        path: The file, `{"<collection>/<split>": {"<system>": {"nDCG@10": 0.5, ..., "n_queries": 300}}}`.
        dataset: `"<collection>/<split>"`.
        system: For example `bm25`, `teacher`, `student_before`, `student_no_teacher`, `student`; a repetition with
            another seed is `student@seed`.
        figures: Measures with `n_queries`, and further figures: `layers`, `parameters`, `passages_per_second`
            (encoding), `index_bytes`, `seconds`. Those that are None are left out, those that are not finite become
            null. Figures of the same name are replaced.

    Returns:
        The whole content of the file.

    Raises:
        InputError: If the file exists and is not such JSON.
    """
    from filelock import FileLock

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):  # two evaluations may share a folder
        metrics = load_metrics(path) if path.exists() else {}
        entry = metrics.setdefault(dataset, {}).setdefault(system, {})
        for key, value in figures.items():
            if value is not None:
                entry[key] = _plain(value)
        write_json(path, metrics)
    return metrics


def load_metrics(path: str | os.PathLike) -> dict[str, dict[str, dict[str, Any]]]:
    """Reads a `metrics.json`.

    Raises:
        InputError: If it is missing or has another form.
    """
    path = Path(path)
    try:
        metrics = read_json(path)
    except FileNotFoundError as error:
        raise InputError("there is no such file", where=str(path), cure="Evaluate a system first") from error
    except ValueError as error:
        raise InputError(f"not JSON ({error})", where=str(path), cure="Remove it and evaluate again") from error
    if not isinstance(metrics, dict) or not all(
        isinstance(systems, dict) and all(isinstance(figures, dict) for figures in systems.values())
        for systems in metrics.values()
    ):
        raise InputError(
            "not of the form {dataset: {system: {measure: value}}}", where=str(path), cure="Give another output folder"
        )
    return metrics


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's, which JSON can hold."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_per_query(path: str | os.PathLike, result: Result) -> Path:
    """Writes the measures of each query as Parquet, columns `query_id` and one for each measure.

    Args:
        path: The file; written atomically.
        result: Of [`evaluate_run`].
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    queries = list(result.per_query)
    columns: dict[str, Any] = {"query_id": pa.array(queries, pa.string())}
    for measure in result.means:
        if measure != "n_queries":
            columns[measure] = pa.array([result.per_query[query][measure] for query in queries], pa.float64())
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns), temporary)
    return Path(path)


def read_per_query(path: str | os.PathLike) -> dict[str, dict[str, float]]:
    """Reads what [`write_per_query`] wrote: query id -> measure -> value."""
    import pyarrow.parquet as pq

    rows = pq.read_table(path).to_pylist()
    return {row.pop("query_id"): row for row in rows}


def order_systems(systems: Iterable[str]) -> list[str]:
    """The well-known systems first, in their order; the others as they come; seeds beside their system."""
    names = list(systems)
    places = {name: place for place, name in enumerate(dict.fromkeys(name.partition("@")[0] for name in names))}

    def key(name: str) -> tuple[int, int, int]:
        base = name.partition("@")[0]
        known = SYSTEM_ORDER.index(base) if base in SYSTEM_ORDER else len(SYSTEM_ORDER)
        return known, places[base], names.index(name)

    return sorted(names, key=key)


def summary_table(
    systems: Mapping[str, Mapping[str, Any]],
    measures: Sequence[str] = DEFAULT_MEASURES,
    *,
    teacher: str = "teacher",
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a comparison of systems on one dataset; columns without any value are left out.

    Args:
        systems: system -> figures, one dataset of a `metrics.json`.
        measures: The measures to show.
        teacher: The system whose first measure is 100 %.
    """
    names = order_systems(systems)
    shown = [key for key in (*measures, *FIGURES) if any(systems[name].get(key) is not None for name in names)]
    share = measures[0] if measures and systems.get(teacher, {}).get(measures[0]) else None
    columns = ["system", *(FIGURES.get(key, key) for key in shown)]
    if share:
        columns.append(f"{share} of {teacher}")
    rows = []
    for name in names:
        figures = systems[name]
        row = [name, *(_cell(key, figures.get(key)) for key in shown)]
        if share:
            value = figures.get(share)
            row.append("–" if value is None else f"{value / systems[teacher][share]:.1%}")
        rows.append(row)
    return columns, rows


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if key == "parameters":
        return f"{value / 1e6:.1f} M"
    if key == "index_bytes":
        return f"{value / 2**20:.1f} MiB"
    if key == "layers":
        return str(value)
    if key in FIGURES:
        return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
    return f"{value:.4f}"


def print_summary(
    metrics: Mapping[str, Mapping[str, Mapping[str, Any]]] | str | os.PathLike,
    measures: Sequence[str] = DEFAULT_MEASURES,
    *,
    dataset: str | None = None,
    teacher: str = "teacher",
) -> None:
    """Prints a table for each dataset of a `metrics.json` (a path or its content), or for `dataset` alone."""
    if not isinstance(metrics, Mapping):
        metrics = load_metrics(metrics)
    for name, systems in metrics.items():
        if dataset is None or name == dataset:
            counts = sorted({figures["n_queries"] for figures in systems.values() if figures.get("n_queries")})
            queries = f" ({' or '.join(f'{count:,}' for count in counts)} queries)" if counts else ""
            print_table(f"{name}{queries}", *summary_table(systems, measures, teacher=teacher))


def markdown_table(
    systems: Mapping[str, Mapping[str, Any]],
    measures: Sequence[str] = DEFAULT_MEASURES,
    *,
    teacher: str = "teacher",
) -> str:
    """The summary as Markdown, for a model card."""
    return markdown_rows(*summary_table(systems, measures, teacher=teacher))


def markdown_rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown; every column but the first is right-aligned."""
    lines = [columns, ["---", *("---:" for _ in columns[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
