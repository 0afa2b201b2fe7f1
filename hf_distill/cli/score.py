"""`hf-distill score`: a teacher's scores as a column of a row set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import duration, get_logger
from ..errors import InputError
from ..settings import option
from .options import CollectionOptions, EncodeOptions, PushToOptions
from .parsing import Verb, require


if TYPE_CHECKING:
    from ..data import Collection, RowSet
    from ..models.base import RetrievalModel

logger = get_logger(__name__)


@dataclass
class ScoreOptions(PushToOptions):
    """Whose scores, and of which rows."""

    _argument_group_name = "scoring"

    model: str | None = option(None, "The teacher: a Hub id or folder of a bi-encoder or cross-encoder.")
    model_revision: str | None = option(None, "Its branch, tag or commit.")
    run: str | None = option(None, "Take the scores from this TREC run instead.")
    rows: str | None = option(None, "The row set: a name in the collection, a folder, a file, or a Hub id.")
    column: str = option("scores", "Column to write: scores (the primary teacher's) or scores_NAME.")
    layers: str | None = option(
        None,
        "Also write the scores of these layers, all or numbers from 1 such as 2,4,6, as the column layer_scores_NAME "
        "(layer_scores_teacher of the primary teacher).",
    )
    max_queries: int | None = option(None, "Score the rows of this many queries, a seeded sample. Default: all.")
    seed: int = option(42, "Seed of the sample.")
    length: int | None = option(
        None, "Longest pair (of a bi-encoder: passage) that the teacher reads. Default: as it was trained."
    )
    plan_only: bool = option(False, "Say how many pairs there are and how long they take, and stop.")
    output_dir: str | None = option(
        None,
        "Folder for the scored rows. Default: under the row set's name inside the collection, if that is a folder in "
        "this project's layout.",
    )


def run(data_options: CollectionOptions, options: ScoreOptions, encode_options: EncodeOptions) -> None:
    """Scores and saves a row set."""
    require(
        "score",
        data=(data_options.data, "the collection, a folder or Hub id"),
        rows=(options.rows, "a row set's name, or its folder"),
    )
    if (options.model is None) == (options.run is None):
        raise InputError(
            "hf-distill score needs either --model (a Hub id or folder) or --run (a TREC file)",
            cure="See hf-distill score --help",
        )
    from ..retrieval import score_from_run, score_layers, score_rows
    from . import folders, publishing, row_sets, steps

    data = steps.Data.open(data_options)
    rows = row_sets.sample_rows(row_sets.named_rows(data, options.rows), options.max_queries, options.seed)
    encode = steps.encode_settings(encode_options, data_options)
    model = None if options.model is None else open_teacher(options.model, options.model_revision, options.length)
    if model is not None:
        announce(model, rows, data.collection, encode)
    if options.plan_only:
        return
    target = row_sets.row_folder(data, options.output_dir, options.rows)
    folders.claim_rows(target, adds=options.output_dir is None or target.resolve() == Path(options.rows).resolve())
    publishing.check_push_to(options)
    if model is None:
        if options.layers is not None:
            raise InputError("a run has no layers", where="--layers", cure="Give the model that made it (--model)")
        scored = score_from_run(rows, options.run, column=options.column)
    else:
        layers = _layers(options.layers)
        if layers is not None and layers != "all":
            model.check_layers(layers)
        scored = score_rows(model, rows, column=options.column, **encode)
        if layers is not None:
            column = layer_column(options.column)
            settings = {name: value for name, value in encode.items() if name != "storage"}
            scored = score_layers(model, scored, layers=layers, column=column, **settings)
    row_sets.warn_of_scores(scored, options.column)
    row_sets.save_rows(scored, data, target, options.rows)
    logger.info("column %s of %s rows written to %s", options.column, f"{len(scored):,}", target)
    publishing.push_rows(scored, data_options, options, target)


def open_teacher(name: str, revision: str | None, length: int | None) -> RetrievalModel:
    """Opens a teacher, at another length than it was trained at only with a warning."""
    from ..models import load_model

    model = load_model(name, revision=revision)
    if length is None:
        return model
    field = "max_length" if model.representation == "pair" else "passage_length"
    trained = getattr(model.config, field)
    if trained == length:
        return model
    logger.warning(
        "%s was made for texts of %s tokens and will read %s: its scores change, and what it was measured at does not "
        "hold for them.", name, trained, length,
    )  # fmt: skip
    return load_model(name, revision=revision, **{field: length})


def announce(model: RetrievalModel, rows: RowSet, collection: Collection, encode: Mapping[str, Any]) -> None:
    """Says how many pairs will be scored, about how long that takes, and what it costs in hours of a device."""
    from accelerate import PartialState

    from ..retrieval import estimate_seconds

    pairs, processes = int(rows.lengths.sum()), PartialState().num_processes
    seconds = estimate_seconds(model, collection, pairs, pairs=True, **encode)
    logger.info(
        "scoring %s pairs of %s queries with %s: about %s on %d process%s, %s device hours in all",
        f"{pairs:,}", f"{len(rows):,}", model.name_or_path, duration(seconds), processes,
        "es" if processes > 1 else "", f"{seconds * processes / 3600:.2g}",
    )  # fmt: skip


def layer_column(column: str) -> str:
    """The column of layers' scores beside a column of scores: `layer_scores_teacher` beside `scores`."""
    return f"layer_scores_{column.removeprefix('scores').removeprefix('_') or 'teacher'}"


def _layers(text: str | None) -> str | list[int] | None:
    if text in (None, "all"):
        return text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise InputError(
            f"{text!r} is no list of layers", where="--layers", cure="Write all, or numbers from 1 such as 2,4,6"
        ) from None


VERB = Verb(
    "score",
    "Write a teacher's scores into a row set.",
    (CollectionOptions, ScoreOptions, EncodeOptions),
    run,
    example="hf-distill score --data my_collection --rows outputs/rows --model cross-encoder/ms-marco-MiniLM-L6-v2 "
    "--output_dir outputs/scored",
)
