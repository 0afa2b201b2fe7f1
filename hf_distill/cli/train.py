"""`hf-distill train`: a bi-encoder or a cross-encoder from labelled rows."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .options import DataOptions, IndexOptions, ModelOptions, RowOptions, TrainHelp, TrainOptions
from .parsing import Verb, require


if TYPE_CHECKING:
    from ..data import RowSet
    from ..models.base import RetrievalModel
    from .steps import Data


def _arguments() -> tuple[type, ...]:
    from .training_arguments import TrainArguments

    return (DataOptions, TrainOptions, RowOptions, ModelOptions, IndexOptions, TrainArguments)


def run(
    data_options: DataOptions,
    options: TrainOptions,
    row_options: RowOptions,
    model_options: ModelOptions,
    encode_options: IndexOptions,
    args: Any,
) -> None:
    """Trains, evaluates, and writes the native checkpoint with its card."""
    require(
        "train",
        data=(data_options.data, "the collection, a folder or Hub id"),
        model=(options.model, "what to start from, a Hub id or folder"),
        output_dir=(args.output_dir, "where the model goes"),
    )
    from ..trainers import About, RetrievalTrainer
    from . import folders, publishing, row_sets, steps
    from .reporting import Report

    data = steps.Data.open(data_options)
    model = steps.open_model(
        options.model, options.kind, options.model_revision, model_options, args.seed, layers=options.layers
    )
    steps.check_training(data, row_options, args, model, index=encode_options.index)
    settings = folders.settings_of(
        data_options,
        options,
        row_options,
        model_options,
        encode_options,
        args,
        data_fingerprint=data.collection.fingerprints,
        rows_fingerprint=row_sets.rows_fingerprint(data, row_options),
        start_weights=model.weights_fingerprint(),
    )
    folders.claim_output(args.output_dir, settings)
    publishing.check_push(args)
    encode = steps.encode_settings(encode_options, data_options)
    report = Report.of_training(data, encode, args, encode_options.index)
    rows = _rows(data, row_options, model, encode, encode_options.index, args.seed)
    report.bm25()
    report.model("before", model)
    evaluation = steps.evaluation_for(data, args, model)
    trainer = RetrievalTrainer(model, args, rows=rows, evaluation=evaluation)
    summary = f"`{options.model}`, trained on *{data.collection.name}*."
    trainer.about = About(summary, [options.model], [data.collection.source])
    model = steps.finish_training(trainer)
    report.model("trained", model)
    report.finish(
        trainer,
        model,
        rows,
        system="trained",
        summary=summary,
        settings=settings,
        base_models=[options.model],
    )
    publishing.publish(trainer)


def _rows(
    data: Data, options: RowOptions, model: RetrievalModel, encode: dict[str, Any], index: str, seed: int
) -> RowSet:
    from ..models import load_model
    from . import row_sets

    if options.rows is not None:
        return row_sets.wanted_rows(data, options, seed)
    if options.mine_with == "teacher":
        raise InputError("there is no teacher here", where="--mine_with", cure="Choose bm25, student or a model id")
    source: Any = options.mine_with
    if source == "student":
        source = copy.deepcopy(model)
    elif source not in ("auto", "bm25"):
        source = load_model(source)
    return row_sets.mined_rows("bm25" if source == "auto" else source, data, options, encode, index=index, seed=seed)


VERB = Verb(
    "train",
    "Train a bi-encoder or a cross-encoder on labelled rows; hard negatives are mined if there are none.",
    (DataOptions, TrainOptions, RowOptions, ModelOptions, IndexOptions, TrainHelp),
    run,
    _arguments,
    "hf-distill train --data BeIR/scifact --model microsoft/MiniLM-L12-H384-uncased --kind cross_encoder "
    "--output_dir outputs/ranker",
)
