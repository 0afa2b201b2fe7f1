"""`hf-distill search`: ask a collection."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import InputError
from ..settings import option
from .options import CollectionOptions, IndexOptions
from .parsing import Verb, require


@dataclass
class SearchOptions:
    """What to look for."""

    _argument_group_name = "search"

    model: str | None = option(
        None, "Hub id or folder of a bi-encoder (lexical:ID for a bare SPLADE checkpoint), or bm25."
    )
    query: str | None = option(None, "The question. Without it, questions are read line by line.")
    top: int = option(5, "Passages to show, 1 or more.")
    width: int = option(300, "Characters of each passage to show.")


def _questions(options: SearchOptions) -> Iterator[str]:
    if options.query is not None:
        yield options.query
        return
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("query> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def run(data_options: CollectionOptions, options: SearchOptions, encode_options: IndexOptions) -> None:
    """Answers one question, or every line of standard input."""
    require(
        "search",
        data=(data_options.data, "the collection, a folder or Hub id"),
        model=(options.model, "a Hub id or folder of a bi-encoder, or bm25"),
    )
    if options.top < 1 or options.width < 20:
        name, value, least = ("top", options.top, 1) if options.top < 1 else ("width", options.width, 20)
        raise InputError(f"{value} is too little to show", where=f"--{name}", cure=f"Give {least} or more")
    from ..models import load_model
    from ..retrieval import Searcher
    from . import steps

    data = steps.Data.open(data_options)
    model = "bm25" if options.model == "bm25" else load_model(options.model)
    steps.check_index(encode_options.index, model)
    searcher = Searcher(
        model,
        data.collection.corpus,
        factory=encode_options.index,
        **steps.encode_settings(encode_options, data_options),
    )
    corpus = data.collection.corpus
    for question in _questions(options):
        scores, positions = searcher(question, options.top)
        passages = corpus.dataset.select([int(position) for position in positions])
        for number, (score, passage) in enumerate(zip(scores, passages), start=1):
            heading = f"{number}. {passage['title'] or passage['document_id']}  ({score:.3f})"
            body = textwrap.shorten(passage["text"], options.width, placeholder=" ...")
            sys.stdout.write(f"{heading}\n{textwrap.indent(textwrap.fill(body, 100), '   ')}\n\n")
        sys.stdout.flush()


VERB = Verb(
    "search",
    "Search a collection with a model.",
    (CollectionOptions, SearchOptions, IndexOptions),
    run,
    example="hf-distill search --data outputs/demo/data --model outputs/demo/student --query 'strip blanks'",
)
