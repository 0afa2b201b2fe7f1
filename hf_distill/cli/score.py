"""`hf-distill score`: a teacher's scores as a column of a row set."""

from __future__ import annotations

from ..console import get_logger
from ..errors import InputError
from .options import CollectionOptions, EncodeOptions, ScoreOptions
from .parsing import Verb, require


logger = get_logger(__name__)


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
    from ..models import load_model
    from ..retrieval import score_from_run, score_layers, score_rows
    from . import publishing, steps

    data = steps.Data.open(data_options)
    rows = steps.named_rows(data, options.rows)
    target = steps.claim_rows(steps.row_folder(data, options.output_dir, options.rows))
    publishing.check_push_to(options)
    if options.run is not None:
        if options.layers is not None:
            raise InputError("a run has no layers", where="--layers", cure="Give the model that made it (--model)")
        scored = score_from_run(rows, options.run, column=options.column)
    else:
        model = load_model(options.model, revision=options.model_revision)
        encode = steps.encode_settings(encode_options, data_options)
        layers = _layers(options.layers)
        if layers is not None and layers != "all":
            model.check_layers(layers)
        scored = score_rows(model, rows, column=options.column, **encode)
        if layers is not None:
            column = layer_column(options.column)
            settings = {name: value for name, value in encode.items() if name != "storage"}
            scored = score_layers(model, scored, layers=layers, column=column, **settings)
    steps.warn_of_scores(scored, options.column)
    steps.save_rows(scored, data, target, options.rows)
    logger.info("column %s of %s rows written to %s", options.column, f"{len(scored):,}", target)
    publishing.push_rows(scored, data_options, options, target)


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
    example="hf-distill score --data my_collection --rows outputs/rows --model cross-encoder/ms-marco-MiniLM-L6-v2",
)
