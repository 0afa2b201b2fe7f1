"""`hf-distill convert`: data in any format becomes a folder of this project's layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import get_logger, print_table
from ..provenance import note_source
from ..settings import option
from .parsing import Verb, require


if TYPE_CHECKING:
    from ..data.formats.opening import Source

logger = get_logger(__name__)


@dataclass
class ConvertOptions:
    """What to convert, and into which folder."""

    _argument_group_name = "conversion"

    input: list[str] | None = option(
        None,
        "Files, folders or Hub ids. If a file is not recognised, say what it is: corpus=FILE, titles=FILE, "
        "queries=FILE, qrels:dev=FILE, negatives:bm25=FILE, triples=FILE, run=FILE, scores=FILE.",
    )
    output_dir: str | None = option(None, "A new or empty folder.")
    format: str = option("auto", "Format of inputs that are not recognised, for example tevatron or hard_negatives.")
    revision: str | None = option(
        None, "Branch, tag or commit of inputs on the Hub; user/name@REVISION gives one input its own."
    )
    name: str | None = option(None, "The collection's name. Default: after the input.")
    corpus_columns: str | None = option(
        None, "Fields of a file of passages without a header: 'document_id,text,title'. Default: by how many they are."
    )
    unknown_ids: str = option(
        "error", "Judgements and rows of unknown queries or documents: stop, or leave them out.",
        choices=["error", "drop"],
    )  # fmt: skip
    allow_pickle: bool = option(
        False, "Read pickles of scores or negatives. No code in them is run: only plain data is read."
    )
    cache_dir: str | None = option(
        None, "Folder for intermediate files. Default: beside the output, until the conversion is done."
    )


def run(options: ConvertOptions) -> None:
    """Converts, and says what was written and what was left out."""
    require(
        "convert",
        input=(options.input, "files, folders or a Hub id"),
        output_dir=(options.output_dir, "where to write"),
    )
    from ..data.formats.conversion import convert, working_folder
    from ..data.formats.opening import open_inputs
    from ..hub.manifest import MANIFEST, write_manifest

    source = open_inputs(
        options.input,
        format=options.format,
        revision=options.revision,
        # What has to be put in order lies beside the output and goes when that is complete.
        cache_dir=options.cache_dir or working_folder(options.output_dir) / ".cache",
        allow_pickle=options.allow_pickle,
        corpus_columns=options.corpus_columns.split(",") if options.corpus_columns else None,
    )
    done = convert(source, options.output_dir, unknown_ids=options.unknown_ids, name=options.name)
    _note(source, options.revision)
    rows = [[part.label, f"{part.rows:,}", ", ".join(part.columns)] for part in done.parts]
    print_table(f"{source.where} → {Path(options.output_dir)}", ["part", "rows", "columns"], rows)
    for part in done.parts:
        for line in part.notes.lines():
            logger.warning("%s: %s", part.label, line)
    if not (done.folder / MANIFEST).exists():
        write_manifest(done.folder, data={part.label: {"rows": part.rows} for part in done.parts})


def _note(source: Source, revision: str | None) -> None:
    """Notes what was read, for the manifest."""
    from ..data.sources import folder_hashes

    inputs = getattr(source, "inputs", None)
    folder = Path(source.where)
    if inputs is None and folder.is_dir():
        note_source("folder", folder, lambda: {"files": folder_hashes(folder)})
    elif inputs is None:
        note_source("data", source.where, dict, source.revision or revision)
    for item in inputs or ():
        if item.repository is not None:
            note_source("data", item.repository[0], dict, item.repository[1])
        else:
            note_source("file", item.path, partial(_facts, item.path))


def _facts(path: Path) -> dict[str, str]:
    from ..data.sources import content_hash

    return {"fingerprint": content_hash(path)}


VERB = Verb(
    "convert",
    "Turn data in another format into a folder of this project's layout.",
    (ConvertOptions,),
    run,
    example="hf-distill convert --input msmarco --output_dir data/msmarco",
)
