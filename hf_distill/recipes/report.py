"""One report about a run of a recipe: Markdown, and one HTML page with its plots inside, which needs no network."""

from __future__ import annotations

import base64
import html
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..console import duration
from ..files import fingerprint, read_json, write_json, write_text
from ..hub.manifest import note_files
from .loading import Recipe
from .manifest import write_recipe_manifest
from .processes import in_other_process
from .records import Record, Workspace
from .results import own_figures


# Where the part of a model card that a recipe writes begins.
_TOLD = "<!-- the recipe's stages -->"
# Raised by hand when the same records would give another report.
_VERSION = 3
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; }
th { text-align: left; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { color: #555; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; } code { background: #f6f6f6; }
"""


def write_report(recipe: Recipe, workspace: Workspace) -> dict[str, Any]:
    """Writes report, `metrics.json` and manifest, unless they tell of the same records already.

    Returns:
        The measures of all stages, as in `metrics.json`.
    """
    records = {name: record for name in recipe.stages if (record := workspace.record(name)) is not None}
    metrics = merged_metrics(recipe, records)
    told = fingerprint([_VERSION, recipe.profile, recipe.overrides, {n: asdict(r) for n, r in records.items()}])
    marker = workspace.records_folder / "report.txt"
    if not marker.is_file() or marker.read_text(encoding="utf-8") != told:
        write_json(workspace.folder / "metrics.json", metrics)
        in_other_process(_write, recipe, workspace.folder, records, metrics)
        write_recipe_manifest(workspace, records, metrics)
        write_text(marker, told)
    return metrics


def merged_metrics(recipe: Recipe, records: Mapping[str, Record]) -> dict[str, dict[str, dict[str, Any]]]:
    """Every stage's own system under the stage's name, and what evaluating stages measured: by dataset.

    A system that an evaluating stage measured as well is told by the stage that made it.
    """
    metrics: dict[str, dict[str, dict[str, Any]]] = {}
    for name, record in records.items():
        for dataset, systems in own_figures(recipe.stages[name], record.figures).items():
            table = metrics.setdefault(dataset, {})
            for system, figures in systems.items():
                table.setdefault(system, figures)
    return metrics


def measures_of(systems: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The measures of a table, those with a cut-off, in the order in which they come."""
    return list(dict.fromkeys(name for figures in systems.values() for name in figures if "@" in name))


def _write(recipe: Recipe, folder: Path, records: Mapping[str, Record], metrics: dict[str, Any]) -> None:
    """Runs where importing the library of plots does not matter."""
    from ..evaluation.report import summary_table

    plots = _plots(recipe, folder, metrics)
    stages = [
        [
            name,
            recipe.stages[name].kind.verb,
            record.status,
            duration(record.seconds),
            record.figures.get("headline", ""),
        ]
        for name, record in records.items()
    ]
    sections: list[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = [
        ("Stages", ("stage", "verb", "state", "time", "result"), stages)
    ]
    for dataset, systems in metrics.items():
        sections.append((f"Measured on {dataset}", *summary_table(systems, measures_of(systems))))
    comparisons = {
        name: (folder / "stages" / name / "comparison.md").read_text(encoding="utf-8")
        for name in records
        if (folder / "stages" / name / "comparison.md").is_file()
    }
    heading = f"Recipe {recipe.name}" + (f", profile {recipe.profile}" if recipe.profile else "")
    seconds = sum(record.seconds for record in records.values())
    facts = [
        f"{len(records)} of {len(recipe.stages)} stages, {duration(seconds)} in all.",
        *([f"Set: {', '.join(recipe.overrides)}"] if recipe.overrides else []),
    ]
    if recipe.card in records:
        _tell_in_card(folder / "stages" / recipe.card / "README.md", heading, sections)
    write_text(folder / "report.md", _markdown(heading, recipe.summary, facts, sections, comparisons, plots))
    write_text(folder / "report.html", _page(heading, recipe.summary, facts, sections, comparisons, folder, plots))


def _plots(recipe: Recipe, folder: Path, metrics: Mapping[str, Any]) -> dict[str, str]:
    """The plots: path in the folder -> caption."""
    from ..evaluation.plots import plot_stages, plot_training

    plots: dict[str, str] = {}
    for number, (dataset, systems) in enumerate(metrics.items()):
        measure = next(iter(measures_of(systems)), None)
        values = {name: figures[measure] for name, figures in systems.items() if figures.get(measure) is not None}
        if values:
            path = f"plots/stages-{number}.png"
            plot_stages(values, folder / path, measure=measure, title=dataset)
            plots[path] = f"{measure} on {dataset}"
    for name in recipe.stages:
        history = folder / "stages" / name / "history.json"
        path = f"plots/training-{name}.png"
        if history.is_file() and plot_training(read_json(history), folder / path) is not None:
            plots[path] = f"Training of stage {name}"
        terms = folder / "stages" / name / "terms.png"
        if terms.is_file():
            path = f"plots/terms-{name}.png"
            shutil.copyfile(terms, folder / path)
            plots[path] = "The heaviest terms of a query and of a passage, and those they share"
    return plots


def _tell_in_card(
    card: Path, heading: str, sections: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]]
) -> None:
    """Adds the tables of the whole run to the card of its model, in place of those that were there."""
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8").partition(_TOLD)[0].rstrip()
    lines = [_TOLD, "", f"# How it was made: {heading}", "", *(line for part in sections for line in _table(*part))]
    write_text(card, "\n".join([text, "", *lines]))
    note_files(card.parent, card.name)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [f"## {title}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return [*lines, *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows), ""]


def _markdown(
    heading: str,
    summary: str,
    facts: Sequence[str],
    sections: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]],
    comparisons: Mapping[str, str],
    plots: Mapping[str, str],
) -> str:
    lines = [f"# {heading}", "", summary, "", *(f"- {fact}" for fact in facts), ""]
    for part in sections:
        lines += _table(*part)
    for name, text in comparisons.items():
        lines += [f"## Stage {name}", "", text.strip(), ""]
    lines += [line for path, caption in plots.items() for line in (f"![{caption}]({path})", "")]
    return "\n".join(lines)


def _page(
    heading: str,
    summary: str,
    facts: Sequence[str],
    sections: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]],
    comparisons: Mapping[str, str],
    folder: Path,
    plots: Mapping[str, str],
) -> str:
    say = html.escape
    parts = [f"<h1>{say(heading)}</h1>", f"<p>{say(summary)}</p>", "<ul>"]
    parts += [f"<li>{say(fact)}</li>" for fact in facts] + ["</ul>"]
    for title, columns, rows in sections:
        parts += [
            f"<h2>{say(title)}</h2>",
            "<table><tr>",
            *(f"<th>{say(str(column))}</th>" for column in columns),
            "</tr>",
        ]
        for row in rows:
            cells = (
                f'<td class="number">{say(str(c))}</td>' if _is_number(c) else f"<td>{say(str(c))}</td>" for c in row
            )
            parts.append(f"<tr>{''.join(cells)}</tr>")
        parts.append("</table>")
    for name, text in comparisons.items():
        parts += [f"<h2>Stage {say(name)}</h2>", f"<pre>{say(text)}</pre>"]
    for path, caption in plots.items():
        image = base64.b64encode((folder / path).read_bytes()).decode()
        source = f"data:image/png;base64,{image}"
        parts.append(
            f'<figure><img alt="{say(caption)}" src="{source}"><figcaption>{say(caption)}</figcaption></figure>'
        )
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{say(heading)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _is_number(cell: Any) -> bool:
    text = str(cell).rstrip("%").replace(",", "")
    return text.replace(".", "", 1).replace("-", "", 1).isdigit()
