"""`hf-distill convert`: data in any format becomes a folder of this project's layout."""

from __future__ import annotations

from pathlib import Path

from ..console import get_logger, print_table
from ..errors import InputError
from .options import ConvertOptions
from .parsing import Verb, require


logger = get_logger(__name__)


def run(options: ConvertOptions) -> None:
    """Converts, and says what was written and what was left out."""
    require(
        "convert",
        input=(options.input, "files, folders or a Hub id"),
        output_dir=(options.output_dir, "where to write"),
    )
    from ..data.formats.conversion import convert, working_folder
    from ..data.formats.opening import open_inputs

    source = open_inputs(
        options.input,
        format=options.format,
        revision=options.revision,
        # What has to be put in order lies beside the output and goes when that is complete.
        cache_dir=options.cache_dir or working_folder(options.output_dir) / ".cache",
        allow_pickle=options.allow_pickle,
        corpus_columns=options.corpus_columns.split(",") if options.corpus_columns else None,
    )
    if options.unknown_ids not in ("error", "drop"):
        raise InputError(f"{options.unknown_ids!r} is not a choice", where="--unknown_ids", cure="Use error or drop")
    done = convert(source, options.output_dir, unknown_ids=options.unknown_ids, name=options.name)
    rows = [[part.label, f"{part.rows:,}", ", ".join(part.columns)] for part in done.parts]
    print_table(f"{source.where} → {Path(options.output_dir)}", ["part", "rows", "columns"], rows)
    for part in done.parts:
        for line in part.notes.lines():
            logger.warning("%s: %s", part.label, line)


VERB = Verb(
    "convert",
    "Turn data in another format into a folder of this project's layout.",
    (ConvertOptions,),
    run,
    example="hf-distill convert --input msmarco --output_dir data/msmarco",
)
