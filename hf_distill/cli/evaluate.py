"""`hf-distill evaluate`: models, BM25 and runs on one collection, in one table."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import InputError
from .options import DataOptions, EncodeOptions, EvaluateOptions
from .parsing import Verb, require


def system_names(models: list[str], names: list[str] | None) -> list[str]:
    """The names in the table: as given, else the last parts of the ids, numbered where they are equal."""
    if names is not None:
        if len(names) != len(models):
            raise InputError(f"{len(names)} names for {len(models)} models", where="--names", cure="Give one for each")
        return names
    found: list[str] = []
    for model in models:
        name = re.sub(r"\.trec$", "", model.rstrip("/").rpartition("/")[2])
        found.append(name if name not in found else f"{name}_{len(found) + 1}")
    return found


def run(data_options: DataOptions, options: EvaluateOptions, encode_options: EncodeOptions) -> None:
    """Measures every system and prints the table; with an output folder also runs, figures and plots are kept."""
    require(
        "evaluate",
        data=(data_options.data, "the collection, a folder or Hub id"),
        model=(options.model, "Hub ids or folders, bm25, or TREC runs"),
    )
    names = system_names(options.model, options.names)
    from ..data import Run
    from ..models import load_model
    from . import steps
    from .reporting import Report

    data_options.test_split = options.split
    data = steps.Data.open(data_options)
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
    models = [None if name == "bm25" or name.endswith(".trec") else load_model(name) for name in options.model]
    rerank = None
    if options.rerank != "bm25":
        rerank = steps.candidates_run(
            load_model(options.rerank), data, report.queries, options.depth, encode, encode_options.index
        )
    for name, origin, model in zip(names, options.model, models):
        if model is not None:
            report.model(name, model, rerank)
        elif origin == "bm25":
            report.bm25()
        else:
            if not Path(origin).is_file():
                raise InputError(f"there is no file {origin}", where="--model", cure="Give the path of a TREC run")
            report.run(name, Run.load_trec(origin, data.collection.queries, data.collection.corpus))
    report.show()


VERB = Verb(
    "evaluate",
    "Measure models, BM25 or TREC runs on a collection.",
    (DataOptions, EvaluateOptions, EncodeOptions),
    run,
    example="hf-distill evaluate --data BeIR/scifact --model bm25 sentence-transformers/all-MiniLM-L6-v2",
)
