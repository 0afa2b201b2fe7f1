"""`hf-distill export`: a lexical model's index of a collection for another engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..console import get_logger
from ..errors import InputError
from ..settings import option
from .options import CollectionOptions, EncodeOptions
from .parsing import Verb, require


logger = get_logger(__name__)


@dataclass
class ExportOptions:
    """An index for another engine."""

    _argument_group_name = "export"

    model: str | None = option(None, "Hub id or folder of a lexical model; lexical:ID for a bare SPLADE checkpoint.")
    format: str = option(
        "anserini",
        "anserini (JSON vectors and topics, also Pyserini) or ciff (PISA, JASS, ...).",
        choices=["anserini", "ciff"],
    )
    scale: int = option(100, "What weights are multiplied by before they are rounded.")
    output_dir: str | None = option(None, "Folder of the files.")


def run(data_options: CollectionOptions, options: ExportOptions, encode_options: EncodeOptions) -> None:
    """Encodes (or finds) the collection's vectors and writes them in the engine's format."""
    require(
        "export",
        data=(data_options.data, "the collection, a folder or Hub id"),
        model=(options.model, "a Hub id or folder of a lexical model"),
        output_dir=(options.output_dir, "folder of the files"),
    )
    if options.scale < 1:
        raise InputError(f"scale is {options.scale}", where="--scale", cure="Give 1 or more")
    from ..hub.manifest import write_manifest
    from ..retrieval import InvertedIndex, encode_table, export_anserini, export_ciff
    from . import steps

    model = steps.open_lexical(options.model)
    data = steps.Data.open(data_options)
    collection = data.collection
    settings = steps.encode_settings(encode_options, data_options)
    passages = encode_table(model, collection.corpus, "passage", **settings)
    folder = Path(options.output_dir)
    if options.format == "ciff":
        index = InvertedIndex.build(passages, options.scale, cache_dir=data_options.cache_dir)
        written = export_ciff(folder / "index.ciff", index, collection.corpus, model.tokenizer)
    else:
        queries = encode_table(model, collection.queries, "query", **settings)
        written = export_anserini(
            folder, passages, collection.corpus, queries, collection.queries, model.tokenizer, scale=options.scale
        )
    write_manifest(folder, data=data.facts())
    logger.info("written to %s", written)


VERB = Verb(
    "export",
    "Write a lexical model's index for another engine.",
    (CollectionOptions, ExportOptions, EncodeOptions),
    run,
    example="hf-distill export --data my_collection --model outputs/lexical --format ciff --output_dir outputs/ciff",
)
