"""`hf-distill explain`: the terms that a lexical model sees in a query and a passage, and what they share."""

from __future__ import annotations

import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..settings import option
from .options import CollectionOptions, EncodeOptions
from .parsing import Verb, require


if TYPE_CHECKING:
    from ..data import Collection


@dataclass
class ExplainOptions:
    """What a lexical model sees in texts."""

    _argument_group_name = "explanation"

    model: str | None = option(None, "Hub id or folder of a lexical model; lexical:ID for a bare SPLADE checkpoint.")
    query: str | None = option(None, "The question. Default: the first of the collection (--data) that is judged.")
    passage: str | None = option(
        None, "A passage. Default: the best of the collection (--data); without --query a relevant one."
    )
    top: int = option(15, "Terms to show of each.")
    output_dir: str | None = option(None, "Folder for terms.png and terms.json.")


def run(data_options: CollectionOptions, options: ExplainOptions, encode_options: EncodeOptions) -> None:
    """Prints the heaviest terms, and draws them."""
    require(
        "explain",
        model=(options.model, "a Hub id or folder of a lexical model"),
    )
    for name, cure in (("query", "first question"), ("passage", "best passage")):
        if getattr(options, name) is None and data_options.data is None:
            raise InputError(
                f"there is no {name} to explain",
                where=f"--{name}",
                cure=f"Give one, or a collection (--data) whose {cure} is taken",
            )
    if options.top < 1:
        raise InputError(f"{options.top} terms are too few", where="--top", cure="Ask for one at least")
    from ..console import print_table
    from ..evaluation.terms import plot_terms, text_terms
    from ..files import write_json
    from ..retrieval import Searcher
    from . import steps

    model = steps.open_lexical(options.model)
    settings = steps.encode_settings(encode_options, data_options)
    query, positions = options.query, None
    if query is None or options.passage is None:
        collection = steps.Data.open(data_options).collection
    if query is None:
        query, positions = _judged_pair(collection)
    elif options.passage is None:
        _, positions = Searcher(model, collection.corpus, **settings)(query, 1)
        if not len(positions):
            raise InputError("no passage shares a term with the question", where="--query", cure="Ask another one")
    passage = options.passage or collection.corpus.texts(positions, template=model.config.template)[0]
    terms = text_terms(model, query, passage, dtype=encode_options.dtype)
    sys.stdout.write(textwrap.fill(passage, 100) + "\n\n")
    counts = f"{len(terms.query)} terms of the query, {len(terms.passage)} of the passage, {len(terms.shared)} shared"
    print_table(
        f"score {sum(terms.shared.values()):.2f}: {counts}",
        ["query", "weight", "passage", "weight", "shared", "part of the score"],
        _rows([terms.query, terms.passage, terms.shared], options.top),
    )
    if options.output_dir is not None:
        folder = Path(options.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        plot_terms(terms, folder / "terms.png", top=options.top, title=query)
        entry: dict[str, Any] = {"query": query, "passage": passage, "terms": terms._asdict()}
        write_json(folder / "terms.json", entry)


def _judged_pair(collection: Collection) -> tuple[str, list[int]]:
    """The first query with a relevant passage, of the test split if there is one, and the passage's position."""
    for name in ("test", "dev", "train"):
        qrels = collection.qrels.get(name)
        if qrels is not None and len(positions := qrels.query_positions()):
            return collection.queries.texts(positions[:1])[0], [int(qrels.positives().of(positions[0])[0])]
    raise InputError("the collection has no judgements", where=collection.source, cure="Give a question with --query")


def _rows(columns: list[dict[str, float]], top: int) -> list[list[str]]:
    """The heaviest terms of every column, side by side."""
    heaviest = [list(column.items())[:top] for column in columns]
    rows = []
    for line in range(max(map(len, heaviest), default=0)):
        cells = [column[line] if line < len(column) else ("", None) for column in heaviest]
        rows.append([text for name, weight in cells for text in (name, "" if weight is None else f"{weight:.3f}")])
    return rows


VERB = Verb(
    "explain",
    "Show the terms that a lexical model sees in a query and a passage.",
    (CollectionOptions, ExplainOptions, EncodeOptions),
    run,
    example="hf-distill explain --data my_collection --model outputs/lexical --query 'remove blanks' --output_dir out",
)
