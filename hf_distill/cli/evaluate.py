"""`hf-distill evaluate`: models, BM25 and runs on one collection, in one table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from ..console import is_main_process
from ..errors import InputError
from ..settings import option
from .options import CollectionOptions, IndexOptions
from .parsing import Verb, require


@dataclass
class EvaluateOptions:
    """What to measure."""

    _argument_group_name = "evaluation"

    model: list[str] | None = option(
        None, "Hub ids or folders of bi-encoders and cross-encoders, bm25, or TREC runs (*.trec)."
    )
    names: list[str] | None = option(None, "Their names in the table. Default: made from the ids.")
    split: str = option("test", "Judgements to use.")
    measures: str = option("nDCG@10,RR@10,R@100", "nDCG, RR, AP, R, P and Success, with a cut-off: nDCG@10.")
    depth: int = option(100, "Passages retrieved for each query.")
    rerank: str = option("bm25", "Whose passages a cross-encoder re-ranks: bm25, or a model id or folder.")
    relevance: int = option(1, "Lowest grade that counts as relevant.")
    output_dir: str | None = option(None, "Folder for metrics.json, runs, per-query figures and plots. Default: none.")


def system_names(models: list[str], names: list[str] | None) -> list[str]:
    """The names in the table: as given, else the last parts of the ids, numbered where they are equal."""
    if names is not None:
        if len(names) != len(models):
            raise InputError(f"{len(names)} names for {len(models)} models", where="--names", cure="Give one for each")
        if len(set(names)) != len(names):
            raise InputError("two systems have the same name", where="--names", cure="Give each its own")
        return names
    found: list[str] = []
    for model in models:
        name = re.sub(r"\.trec$", "", model.rstrip("/").rpartition("/")[2])
        numbered = (f"{name}_{number}" for number in count(2))
        found.append(next(one for one in chain([name], numbered) if one not in found))
    return found


def run(data_options: CollectionOptions, options: EvaluateOptions, encode_options: IndexOptions) -> None:
    """Measures every system and prints the table; with an output folder also runs, figures and plots are kept."""
    require(
        "evaluate",
        data=(data_options.data, "the collection, a folder or Hub id"),
        model=(options.model, "Hub ids or folders, bm25, or TREC runs"),
    )
    names = system_names(options.model, options.names)
    if options.depth < 1:
        raise InputError(f"{options.depth} passages cannot be ranked", where="--depth", cure="Give 1 or more")
    from ..data import Run
    from ..hub.manifest import write_manifest
    from ..models import load_model
    from . import steps
    from .reporting import Report

    data = steps.Data.open(data_options)
    steps.check_split(data.collection, options.split, "--split")
    steps.check_relevant(data.collection, options.split, "--split", options.relevance)
    data.test = options.split
    encode = steps.encode_settings(encode_options, data_options)
    report = Report(
        options.output_dir,
        data,
        encode,
        measures=options.measures,
        depth=options.depth,
        index=encode_options.index,
        relevance=options.relevance,
    )
    models, runs = {}, {}
    for origin in options.model:
        if origin.endswith(".trec"):
            if not Path(origin).is_file():
                raise InputError(f"there is no file {origin}", where="--model", cure="Give the path of a TREC run")
            runs[origin] = Run.load_trec(origin, data.collection.queries, data.collection.corpus)
        elif origin != "bm25":
            models[origin] = load_model(origin)
    retriever = options.rerank if options.rerank == "bm25" else load_model(options.rerank)
    steps.check_index(encode_options.index, retriever, *models.values())
    rerank = None
    if retriever != "bm25":
        rerank = steps.candidates_run(retriever, data, report.queries, options.depth, encode, encode_options.index)
    for name, origin in zip(names, options.model):
        if origin in runs:
            report.run(name, runs[origin])
        elif origin in models:
            report.model(name, models[origin], rerank)
        else:
            report.run(name, report.bm25_run())
    report.show()
    if options.output_dir is not None and is_main_process():
        write_manifest(options.output_dir, data=data.facts(), metrics={report.dataset: report.results})


VERB = Verb(
    "evaluate",
    "Measure models, BM25 or TREC runs on a collection.",
    (CollectionOptions, EvaluateOptions, IndexOptions),
    run,
    example="hf-distill evaluate --data BeIR/scifact --model bm25 sentence-transformers/all-MiniLM-L6-v2",
)
