"""`hf-distill compare`: which differences between systems are more than the choice of queries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..console import get_logger, print_table
from ..errors import InputError
from ..files import file_fingerprint
from ..provenance import note_source
from ..settings import option
from .options import CollectionOptions
from .parsing import Verb, leading_words, require


logger = get_logger(__name__)


@dataclass
class CompareOptions:
    """What to compare, and how."""

    _argument_group_name = "comparison"

    systems: list[str] | None = option(
        None,
        "TREC runs, output folders, folder:system, or files of per_query/ (may stand first, without the flag). One "
        "folder alone stands for all of its systems; one of several folders stands for its student.",
    )
    names: list[str] | None = option(
        None, "Names in the table; name@1 and name@2 are two seeds of one system. Default: made from the files."
    )
    split: str | None = option(None, "Judgements to use. Default: those in the files' names, else test.")
    measures: str | None = option(
        None, "Measures to compare. Default: nDCG@10,RR@10,R@100 with --data, else those that all systems have."
    )
    baseline: str | None = option(None, "The system that the others are compared with. Default: the first.")
    all_pairs: bool = option(False, "Compare every pair of systems instead.")
    correction: str = option("holm", "For several comparisons on one measure.", choices=["holm", "bonferroni", "none"])
    alpha: float = option(0.05, "Significance level: the largest corrected p-value that is significant.")
    samples: int = option(100_000, "Random swaps of the randomisation test, which is exact for few queries.")
    seed: int = option(0, "Seed of these swaps.")
    changed: int = option(5, "Queries to show that changed most, for each comparison.")
    relevance: int = option(1, "Lowest grade that counts as relevant, where runs are measured.")
    output_dir: str | None = option(None, "Folder for comparison.md and comparison.json. Default: none.")


def run(data_options: CollectionOptions, options: CompareOptions) -> None:
    """Prints the comparison, and writes it as Markdown and JSON where an output folder is named."""
    require("compare", systems=(options.systems, "TREC runs, output folders or folder:system, at least two"))
    from dataclasses import replace

    from ..evaluation import average_seeds, compare_systems
    from ..evaluation.comparing import changed_table, comparison_table, find_measured, most_changed, read_measured

    _check(options)
    found = find_measured(options.systems, runs=data_options.data is not None, split=options.split)
    if options.names is not None:
        if len(options.names) != len(found):
            raise InputError(
                f"{len(options.names)} names for {len(found)} systems ({', '.join(entry.name for entry in found)})",
                where="--names",
                cure="Give one for each",
            )
        found = [replace(entry, name=name) for entry, name in zip(found, options.names)]
    for entry in found:
        note_source("file", entry.path, lambda path=entry.path: {"fingerprint": file_fingerprint(path)})
    named = next((entry.dataset for entry in found if entry.dataset is not None), (None, None))
    split = options.split or named[1] or "test"
    collection = None
    if data_options.data is not None:
        from ..data import load_collection

        collection = load_collection(
            data_options.data, revision=data_options.data_revision, cache_dir=data_options.cache_dir
        )
    measures = [name.strip() for name in options.measures.split(",")] if options.measures else None
    wanted: dict[str, Any] = {} if measures is None else {"measures": measures}
    systems = average_seeds(
        {
            entry.name: read_measured(entry, collection, split, relevance_threshold=options.relevance, **wanted)
            for entry in found
        }
    )
    comparisons = compare_systems(
        systems,
        measures,
        baseline=options.baseline,
        all_pairs=options.all_pairs,
        correction=options.correction,
        alpha=options.alpha,
        samples=options.samples,
        seed=options.seed,
    )
    changed = most_changed(systems, comparisons, options.changed, collection)
    dataset = f"{collection.name if collection is not None else named[0] or 'runs'}/{split}"
    for measure in dict.fromkeys(pair.measure for pair in comparisons):
        pairs = [pair for pair in comparisons if pair.measure == measure]
        title = f"{dataset}: {measure} on {pairs[0].n_queries:,} queries"
        print_table(title, *comparison_table(pairs, options.alpha))
    shown = [entry for entry in changed if entry["measure"] == comparisons[0].measure]
    if shown:
        print_table(f"Queries that changed most in {comparisons[0].measure}", *changed_table(shown))
    note = _note(options, comparisons[0].n_queries)
    logger.info("%s", note)
    if options.output_dir is not None:
        _write(Path(options.output_dir), dataset, comparisons, changed, note, options)


def _check(options: CompareOptions) -> None:
    for name, value, good, cure in (
        ("alpha", options.alpha, 0 < options.alpha < 1, "Give a number between 0 and 1, such as 0.05"),
        ("samples", options.samples, options.samples >= 100, "Give 100 or more"),
        ("changed", options.changed, options.changed >= 0, "Give 0 or more"),
    ):
        if not good:
            raise InputError(f"{value} cannot be used", where=f"--{name}", cure=cure)


def _note(options: CompareOptions, queries: int) -> str:
    corrected = {
        "holm": "corrected by Holm's method for the number of comparisons on a measure",
        "bonferroni": "corrected by Bonferroni's method for the number of comparisons on a measure",
        "none": "not corrected",
    }[options.correction]
    return (
        f"Paired tests over {queries:,} queries, two-sided: randomisation ({options.samples:,} swaps, seed "
        f"{options.seed}; all swaps where there are no more) and Student's t, {corrected}. Significant: corrected p "
        f"of the randomisation test at most {options.alpha:g}. w/l/t: queries won, lost, equal. d: Cohen's effect "
        "size for paired samples. The interval is the t-test's."
    )


def _write(
    folder: Path, dataset: str, comparisons: list[Any], changed: list[dict], note: str, options: CompareOptions
) -> None:
    from ..evaluation.comparing import comparison_json, comparison_markdown
    from ..files import write_json, write_text
    from ..hub.manifest import write_manifest

    write_text(folder / "comparison.md", comparison_markdown(dataset, comparisons, changed, note, options.alpha))
    settings = {name: getattr(options, name) for name in ("alpha", "correction", "samples", "seed", "relevance")}
    content = {"dataset": dataset, "settings": settings, "comparisons": comparison_json(comparisons)}
    write_json(folder / "comparison.json", {**content, "changed": changed})
    write_manifest(folder)
    logger.info("written to %s", folder / "comparison.md")


VERB = Verb(
    "compare",
    "Compare systems query by query: paired significance tests, wins and losses, the queries that changed most.",
    (CollectionOptions, CompareOptions),
    run,
    example="hf-distill compare outputs/student:student_no_teacher outputs/student:student\n"
    "  hf-distill compare bm25.trec dense.trec --data BeIR/scifact --split test --measures nDCG@10,R@100",
    words=leading_words("systems"),
)
