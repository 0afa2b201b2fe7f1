"""Finding what two systems did on each query, and showing how they differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..console import get_logger
from ..data.collection import Collection
from ..data.run import Run
from ..errors import InputError
from .measures import DEFAULT_MEASURES, evaluate_run
from .report import markdown_rows, read_per_query
from .significance import Comparison, PerQuery


logger = get_logger(__name__)

# The systems that a folder stands for where one is wanted, the first that it has.
_OF_A_FOLDER = ("student", "trained")


@dataclass(frozen=True)
class Measured:
    """The file that says what a system did: a TREC run, or the values of each query as Parquet.

    Args:
        name: The system.
        path: The file.
        dataset: Collection and split in the file's name, if it has the form that `evaluate_system` writes.
    """

    name: str
    path: Path
    dataset: tuple[str, str] | None

    @classmethod
    def of(cls, path: Path) -> Measured:
        """From a file; `<system>.<collection>.<split>.*` names all three."""
        parts = path.stem.split(".")
        return cls(parts[0], path, (parts[1], parts[2])) if len(parts) == 3 else cls(path.stem, path, None)


def find_measured(places: Sequence[str], *, runs: bool, split: str | None = None) -> list[Measured]:
    """The files behind what a person names, with names that tell them apart.

    Args:
        places: TREC runs, Parquet files of `per_query/`, output folders, or `folder:system`. A folder alone stands
            for all of its systems if it is the only place, else for its `student` (or `trained`, or only) system.
        runs: Take the TREC runs of a folder, to measure them anew, instead of the stored values.
        split: Only files of this split, where their names say.

    Raises:
        InputError: If there is nothing, or more than one thing that could be meant; if the files are of different
            collections or splits.
    """
    found: list[Measured] = []
    for place in places:
        folder, system = _folder_and_system(place)
        if folder is None:
            path = Path(place)
            if not path.is_file():
                raise InputError(
                    "there is no such file or folder",
                    where=place,
                    cure="Give TREC runs, output folders or folder:system",
                )
            found.append(Measured.of(path))
        else:
            found += _in_folder(folder, system, everything=len(places) == 1, runs=runs, split=split)
    named = [entry for entry in found if entry.dataset is not None]
    for entry in named[1:]:
        if entry.dataset != named[0].dataset:
            raise InputError(
                f"{named[0].name} was measured on {'/'.join(named[0].dataset)} and {entry.name} on "
                f"{'/'.join(entry.dataset)}",
                where=str(entry.path),
                cure="Compare systems on one collection and split; --split chooses among those of a folder",
            )
    names = [entry.name for entry in found]
    doubled = {name for name in names if names.count(name) > 1}
    return [replace(e, name=f"{_parent(e)}:{e.name}") if e.name in doubled else e for e in found]


def _folder_and_system(place: str) -> tuple[Path | None, str | None]:
    if Path(place).is_dir():
        return Path(place), None
    folder, colon, system = place.rpartition(":")
    return (Path(folder), system) if colon and Path(folder).is_dir() else (None, None)


def _parent(entry: Measured) -> str:
    """The output folder that a file lies in."""
    folder = entry.path.resolve().parent
    return (folder.parent if folder.name in ("runs", "per_query") else folder).name


def _in_folder(folder: Path, system: str | None, *, everything: bool, runs: bool, split: str | None) -> list[Measured]:
    pattern = "runs/*.trec" if runs else "per_query/*.parquet"
    entries = [Measured.of(path) for path in sorted(folder.glob(pattern))]
    entries = [entry for entry in entries if split is None or entry.dataset is None or entry.dataset[1] == split]
    if not entries:
        raise InputError(
            f"there is no {pattern}" + (f" of split {split!r}" if split else ""),
            where=str(folder),
            cure="Give an output folder of hf-distill evaluate, train or distill",
        )
    datasets = sorted({"/".join(entry.dataset) for entry in entries if entry.dataset})
    if len(datasets) > 1:
        raise InputError(
            f"holds figures of {', '.join(datasets)}", where=str(folder), cure="Choose one with --split, or name files"
        )
    names = [entry.name for entry in entries]
    if system is None and everything:
        return entries
    wanted = [name for name in ((system,) if system else _OF_A_FOLDER) if name in names] or (
        names if len(names) == 1 and system is None else []
    )
    if not wanted:
        raise InputError(
            f"has no system {system!r}" if system else "holds several systems",
            where=str(folder),
            cure=f"Choose one as {folder}:NAME, of {', '.join(names)}",
        )
    return [entry for entry in entries if entry.name == wanted[0]]


def read_measured(
    entry: Measured,
    collection: Collection | None,
    split: str,
    measures: Sequence[str] = DEFAULT_MEASURES,
    relevance_threshold: int = 1,
) -> PerQuery:
    """The values of each query: read from Parquet, or measured from a TREC run.

    Raises:
        InputError: If a run is to be measured without a collection, or answers the queries of another split.
    """
    if entry.path.suffix == ".parquet":
        return read_per_query(entry.path)
    if collection is None:
        raise InputError(
            "a run has to be measured against judgements", where=str(entry.path), cure="Name the collection: --data"
        )
    run = Run.load_trec(entry.path, collection.queries, collection.corpus)
    _check_split(run, collection, split, relevance_threshold, entry.path)
    queries, corpus = collection.queries, collection.corpus
    return evaluate_run(
        collection.split(split).as_dict(queries, corpus),
        run.as_dict(queries, corpus),
        measures,
        relevance_threshold=relevance_threshold,
    ).per_query


def _check_split(run: Run, collection: Collection, split: str, threshold: int, path: Path) -> None:
    """Refuses a run that answers less than half of the split's queries, and more of another split's."""

    def answered(name: str) -> float:
        labelled = collection.qrels[name].query_positions(threshold)
        return float(np.isin(labelled, run.query).mean()) if len(labelled) else 0.0

    collection.split(split)
    share = answered(split)
    best = max(collection.qrels, key=answered)
    if share < 0.5 and answered(best) > share:
        raise InputError(
            f"a run of another split: it answers {share:.0%} of the queries of {split!r} and {answered(best):.0%} of "
            f"those of {best!r}",
            where=str(path),
            cure=f"Add --split {best}, or give the run of {split}",
        )
    if share < 1:
        logger.warning("%s: %.0f %% of the queries of %s have no results and count 0.", path, 100 - 100 * share, split)


def most_changed(
    systems: Mapping[str, PerQuery],
    comparisons: Sequence[Comparison],
    number: int,
    collection: Collection | None = None,
) -> list[dict[str, Any]]:
    """The queries that gained or lost most, for each comparison: the largest changes first, equal ones by id."""
    result = []
    for pair in comparisons:
        before, after = systems[pair.baseline], systems[pair.system]
        change = {query: after[query][pair.measure] - before[query][pair.measure] for query in before}
        ranked = sorted((query for query in change if change[query]), key=lambda query: (-abs(change[query]), query))
        for query in ranked[:number]:
            entry = {
                "measure": pair.measure,
                "baseline": pair.baseline,
                "system": pair.system,
                "query_id": query,
                "baseline_value": before[query][pair.measure],
                "system_value": after[query][pair.measure],
                "difference": change[query],
            }
            if collection is not None:
                entry["text"] = collection.queries.texts(collection.queries.positions([query]))[0]
            result.append(entry)
    return result


def comparison_table(comparisons: Sequence[Comparison], alpha: float = 0.05) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the comparisons on one measure."""
    columns = ["system", "mean", "against", "its mean", "difference", f"{1 - alpha:.0%} interval", "d"]
    columns += ["w/l/t", "p (rand.)", "corrected", "p (t)", "corrected", "significant"]
    rows = [
        [
            pair.system,
            f"{pair.system_mean:.4f}",
            pair.baseline,
            f"{pair.baseline_mean:.4f}",
            f"{pair.difference:+.4f}",
            f"{pair.interval[0]:+.4f} … {pair.interval[1]:+.4f}",
            f"{pair.effect_size:+.2f}",
            f"{pair.wins}/{pair.losses}/{pair.ties}",
            *(_p(value) for value in (pair.p_randomization, pair.p_randomization_adjusted)),
            *(_p(value) for value in (pair.p_t_test, pair.p_t_test_adjusted)),
            "yes" if pair.significant else "no",
        ]
        for pair in comparisons
    ]
    return columns, rows


def changed_table(changed: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of [`most_changed`]."""
    columns = ["query", "system", "against", "its value", "value", "difference"]
    with_text = any("text" in entry for entry in changed)
    rows = []
    for entry in changed:
        row = [entry["query_id"], entry["system"], entry["baseline"]]
        row += [f"{entry[name]:.4f}" for name in ("baseline_value", "system_value")] + [f"{entry['difference']:+.4f}"]
        text = " ".join(entry.get("text", "").split())
        rows.append([*row, text if len(text) <= 60 else f"{text[:57]}..."] if with_text else row)
    return [*columns, "text"] if with_text else columns, rows


def comparison_markdown(
    dataset: str, comparisons: Sequence[Comparison], changed: Sequence[Mapping[str, Any]], note: str, alpha: float
) -> str:
    """The whole comparison as Markdown."""
    parts = [f"# {dataset}", note]
    for measure in dict.fromkeys(pair.measure for pair in comparisons):
        pairs = [pair for pair in comparisons if pair.measure == measure]
        parts += [f"## {measure}", markdown_rows(*comparison_table(pairs, alpha))]
        entries = [entry for entry in changed if entry["measure"] == measure]
        if entries:
            parts += ["Queries that changed most:", markdown_rows(*changed_table(entries))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def comparison_json(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """As JSON can hold it: an infinite effect size is null."""
    return [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(pair).items()
        }
        for pair in comparisons
    ]


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "< 0.0001"
