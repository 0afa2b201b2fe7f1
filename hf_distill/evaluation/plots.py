"""Plots as PNG: what a student costs and what it is worth, and how a training went."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files import atomic_path
from .report import load_metrics, order_systems


if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .forgetting import Change


# Okabe and Ito's colours, which people with colour blindness can tell apart; one for each well-known system, so that
# it looks the same in every plot.
_COLOURS = {
    "teacher": "#0072B2",
    "student": "#D55E00",
    "student_no_teacher": "#E69F00",
    "student_before": "#999999",
    "bm25": "#009E73",
}
_MORE = ("#CC79A7", "#56B4E9", "#8C6D31", "#5254A3", "#AD494A", "#637939")
_INK, _FAINT = "#222222", "#767676"
_COSTS = {
    "passages_per_second": ("passages encoded per second", "speed"),
    "parameters": ("parameters (millions)", "size"),
    "index_bytes": ("index (MiB)", "index"),
}
# What the Trainer logs beside losses and measures.
_BESIDE = {"step", "epoch", "learning_rate", "grad_norm", "total_flos", "num_input_tokens_seen", "train_loss"}
_UNITS = {"parameters": 1e6, "index_bytes": 2**20}


def plot_tradeoff(
    systems: Mapping[str, Mapping[str, Any]],
    path: str | os.PathLike,
    *,
    cost: str = "passages_per_second",
    measure: str = "nDCG@10",
    title: str | None = None,
) -> Path | None:
    """A point for each system: its quality against its speed or size.

    Systems without that figure, such as BM25 without parameters, are drawn as a horizontal line.

    Args:
        systems: system -> figures, one dataset of a `metrics.json`.
        path: The PNG.
        cost: `passages_per_second`, `parameters` or `index_bytes`.
        measure: The measure of quality.
        title: Above the plot, for example the dataset.

    Returns:
        The path, or None if no system has both figures.

    Raises:
        InputError: For another `cost`.
    """
    if cost not in _COSTS:
        raise InputError(f"unknown cost {cost!r}", cure=f"Choose one of {', '.join(_COSTS)}")
    named = [(name, systems[name]) for name in order_systems(systems) if systems[name].get(measure) is not None]
    points = [(name, row[cost] / _UNITS.get(cost, 1), row[measure]) for name, row in named if row.get(cost)]
    levels = [(name, row[measure]) for name, row in named if not row.get(cost)]
    if not points:
        return None
    colours = _colours([name for name, _ in named])
    figure, axes = _canvas(6.4, 4.2)
    values = [value for *_, value in points] + [value for _, value in levels]
    _limits(axes, [x for _, x, _ in points], values)
    for name, value in levels:
        axes.axhline(value, color=colours[name], linewidth=1.3, linestyle=(0, (5, 3)), zorder=1)
        axes.annotate(
            f"{name}  {value:.3f}",
            (0.01, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            color=_ink(colours[name]),
            fontsize=9,
        )
    for name, x, value in points:
        axes.scatter(x, value, s=75, color=colours[name], edgecolor="white", linewidth=1.2, zorder=3)
    _label_points(figure, axes, points, colours)
    words, what = _COSTS[cost]
    axes.set_xlabel(words)
    axes.set_ylabel(measure)
    _title(axes, f"{measure} against {what}", title)
    return _save(figure, path)


def plot_training(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> Path | None:
    """The losses of a training, and below them the measures of its evaluations, by step.

    Args:
        log_history: `trainer.state.log_history`: entries with `step` and either `loss` with its parts, or `eval_*`
            measures.
        path: The PNG.

    Returns:
        The path, or None if the history has neither.
    """
    losses = _series([entry for entry in log_history if "loss" in entry], "")
    if len(losses) == 2:  # a single part is the loss itself
        losses = {"loss": losses["loss"]}
    measures = _series(log_history, "eval_")
    panels = [(series, label) for series, label in ((losses, "loss"), (measures, "evaluation")) if series]
    if not panels:
        return None
    figure, all_axes = _canvas(6.4, 2.7 * len(panels) + 0.5, rows=len(panels))
    steps = [step for series, _ in panels for points in series.values() for step, _ in points]
    for axes, (series, label) in zip(all_axes, panels):
        total = len(series) - 1
        for number, (name, points) in enumerate(series.items()):
            main = label == "evaluation" or name == "loss"
            colour = _INK if name == "loss" else (*_COLOURS.values(), *_MORE)[number % 11]
            if label == "loss" and total > 0 and name == "loss":
                name = "total"
            x, y = zip(*points)
            style = {"marker": "o", "markersize": 4} if label == "evaluation" or len(points) == 1 else {}
            axes.plot(
                x, y, color=colour, linewidth=1.8 if main else 1.3, alpha=1 if main else 0.9, label=name, **style
            )
        if len(series) > 1:
            _label_lines(figure, axes, max(steps))
        else:
            label = next(iter(series))
        axes.set_ylabel(label)
        axes.set_xlim(0, max(steps) * 1.02 or 1)
    all_axes[-1].set_xlabel("step")
    _title(all_axes[0], "Training", None)
    return _save(figure, path)


def plot_forgetting(changes: Sequence[Change], path: str | os.PathLike) -> Path:
    """Learning and forgetting of every episode, and the noise where it was measured.

    Args:
        changes: From [`hf_distill.evaluation.forgetting.changes`].
        path: The PNG.
    """
    figure, (above, below) = _canvas(6.4, 5.2, rows=2)
    places = range(len(changes))
    above.plot(places, [one.rr for one in changes], color=_INK, marker="o", markersize=4)
    above.set_ylabel("mean reciprocal rank")
    for name, colour in (("learning", _COLOURS["bm25"]), ("forgetting", _COLOURS["student"]), ("noise", _FAINT)):
        points = [(i, 100 * getattr(one, name)) for i, one in enumerate(changes) if getattr(one, name) is not None]
        if points:
            below.plot(*zip(*points), color=colour, marker="o", markersize=4, label=name)
    below.set_ylabel("% of the training queries")
    below.set_ylim(bottom=0)
    below.legend(frameon=False, fontsize=9)
    below.set_xticks(list(places), [one.name.replace("_", " ") for one in changes])
    _title(above, "Learning and forgetting", f"{changes[0].n_queries:,} queries")
    return _save(figure, path)


def plot_composition(shares: np.ndarray, names: Sequence[str], path: str | os.PathLike) -> Path:
    """Which episode was the first to supply the negatives of each.

    Args:
        shares: `float[episodes, episodes]` from [`hf_distill.evaluation.forgetting.composition`].
        names: Of the episodes.
        path: The PNG.
    """
    figure, axes = _canvas(6.4, 3.4)
    below = [0.0] * len(names)
    palette = (*_COLOURS.values(), *_MORE)
    for first, name in enumerate(names):
        heights = [100 * float(row[first]) for row in shares]
        axes.bar(range(len(names)), heights, bottom=below, color=palette[first % 11], width=0.6, label=name)
        below = [low + height for low, height in zip(below, heights)]
    axes.set_ylabel("% of the negatives")
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.legend(title="first supplied by", frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    _title(axes, "Where the negatives came from", None)
    return _save(figure, path)


def plot_stages(
    values: Mapping[str, float], path: str | os.PathLike, *, measure: str, title: str | None = None
) -> Path:
    """A measure after every stage of a recipe, in the order in which they ran.

    Args:
        values: stage or system -> value.
        path: The PNG.
        measure: Its name.
        title: Above the plot, for example the dataset.
    """
    figure, axes = _canvas(6.4, 0.9 + 0.3 * len(values))
    names, heights = list(values), list(values.values())
    colours = _colours(names)
    places = range(len(names), 0, -1)
    axes.barh(places, heights, color=[colours[name] for name in names], height=0.6)
    for place, value in zip(places, heights):
        axes.annotate(
            f"{value:.4f}", (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_yticks(places, names)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set_xlabel(measure)
    _title(axes, f"{measure} after every stage", title)
    return _save(figure, path)


def plot_report(
    output_dir: str | os.PathLike,
    *,
    measure: str = "nDCG@10",
    log_history: Sequence[Mapping[str, Any]] | None = None,
) -> list[Path]:
    """All plots that the figures in `<output_dir>/metrics.json` allow, in `<output_dir>/plots`.

    Args:
        output_dir: A folder with a `metrics.json`.
        measure: The measure of quality.
        log_history: Of the training, for its curves.

    Returns:
        The PNG files.
    """
    folder = Path(output_dir) / "plots"
    made = []
    for dataset, systems in load_metrics(Path(output_dir) / "metrics.json").items():
        for cost, (_, what) in _COSTS.items():
            path = folder / f"{dataset.replace('/', '_')}_{what}.png"
            made.append(plot_tradeoff(systems, path, cost=cost, measure=measure, title=dataset))
    if log_history:
        made.append(plot_training(log_history, folder / "training.png"))
    return [path for path in made if path is not None]


def _canvas(width: float, height: float, rows: int | None = None) -> tuple[Figure, Any]:
    # A figure of its own instead of pyplot: nothing global, no display, nothing to close.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    grid = figure.subplots(rows or 1, 1, squeeze=False, sharex=rows is not None)[:, 0]
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#AAAAAA")
        axes.tick_params(colors=_FAINT, labelsize=9)
        axes.xaxis.label.set_color(_INK)
        axes.yaxis.label.set_color(_INK)
        axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, grid if rows else grid[0]


def _title(axes: Axes, title: str, detail: str | None) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_INK, pad=10)
    if detail:
        axes.set_title(detail, loc="right", fontsize=9, color=_FAINT, pad=10)


def _save(figure: Figure, path: str | os.PathLike) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return Path(path)


def _colours(names: Sequence[str]) -> dict[str, str]:
    others = [name for name in names if name.partition("@")[0] not in _COLOURS]
    extra = {name: _MORE[number % len(_MORE)] for number, name in enumerate(others)}
    return {name: _COLOURS.get(name.partition("@")[0]) or extra[name] for name in names}


def _ink(colour: str) -> str:
    """A darker shade of a line's colour: small letters need more contrast than points."""
    from matplotlib.colors import to_hex, to_rgb

    return to_hex([0.78 * part for part in to_rgb(colour)])


def _limits(axes: Axes, costs: Sequence[float], values: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = min(costs), max(costs)
    if high / low > 4:
        axes.set_xscale("log")
        axes.set_xlim(low / (high / low) ** 0.18, high * (high / low) ** 0.22)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        spread = (high - low) or high
        axes.set_xlim(max(0, low - 0.25 * spread), high + 0.3 * spread)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))
    spread = (max(values) - min(values)) or 0.1
    axes.set_ylim(max(0, min(values) - 0.15 * spread), max(values) + 0.2 * spread)


def _label_points(figure: Figure, axes: Axes, points: Sequence[tuple], colours: Mapping[str, str]) -> None:
    """Writes each name beside its point, at the first place where it covers no other name or point."""
    figure.draw_without_rendering()
    window = axes.get_window_extent()
    scale = figure.dpi / 72
    spots = [axes.transData.transform((x, value)) for _, x, value in points]
    taken = [(x - 7 * scale, y - 7 * scale, x + 7 * scale, y + 7 * scale) for x, y in spots]
    around = [(9, 0, "left"), (-9, 0, "right"), (0, 13, "center"), (0, -13, "center")]
    around += [(9, step, "left") for step in (14, -14, 26, -26, 38, -38)]
    for (name, x, value), spot in zip(points, spots):
        text = f"{name}  {value:.3f}"
        width, height = 5.4 * len(text) * scale, 11 * scale
        best = None
        for dx, dy, side in around:
            left = spot[0] + dx * scale - {"left": 0, "right": width, "center": width / 2}[side]
            box = (left, spot[1] + dy * scale - height / 2, left + width, spot[1] + dy * scale + height / 2)
            outside = box[0] < window.x0 or box[2] > window.x1 or box[1] < window.y0 or box[3] > window.y1
            clashes = sum(_overlap(box, other) for other in taken if not _same_spot(other, spot)) + 3 * outside
            if best is None or clashes < best[0]:
                best = (clashes, dx, dy, side, box)
            if clashes == 0:
                break
        _, dx, dy, side, box = best
        taken.append(box)
        axes.annotate(
            text,
            (x, value),
            xytext=(dx, dy),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=9,
            color=_ink(colours[name]),
            fontweight="bold" if name.partition("@")[0] == "student" else "normal",
        )


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _same_spot(box: Sequence[float], spot: Sequence[float]) -> bool:
    return math.isclose((box[0] + box[2]) / 2, spot[0]) and math.isclose((box[1] + box[3]) / 2, spot[1])


def _label_lines(figure: Figure, axes: Axes, last: float) -> None:
    """Names lines at their right ends, pushed apart where these are close; no legend to look up."""
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    lines = sorted(axes.get_lines(), key=lambda line: line.get_ydata()[-1])
    heights = [axes.transData.transform((0, line.get_ydata()[-1]))[1] for line in lines]
    wanted = list(heights)
    for index in range(1, len(wanted)):
        wanted[index] = max(wanted[index], wanted[index - 1] + 12 * scale)
    for line, height, target in zip(lines, heights, wanted):
        axes.annotate(
            line.get_label(),
            (line.get_xdata()[-1], line.get_ydata()[-1]),
            xytext=(8, (target - height) / scale),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=_ink(line.get_color()),
            annotation_clip=False,
        )


def _series(log_history: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, list[tuple[float, float]]]:
    """Name -> (step, value) of the entries whose key starts with `prefix`, without what the Trainer logs beside."""
    series: dict[str, list[tuple[float, float]]] = {}
    for entry in log_history:
        for key, value in entry.items():
            number = isinstance(value, (int, float)) and math.isfinite(value)
            beside = key in _BESIDE or key.endswith(("_runtime", "_per_second", "_time"))
            if number and key.startswith(prefix) and not beside and "step" in entry:
                series.setdefault(key.removeprefix(prefix).removeprefix("loss_"), []).append((entry["step"], value))
    return series
