"""`hf-distill train`: a bi-encoder or a cross-encoder from labelled rows."""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from .options import DataOptions, EncodeOptions, ModelOptions, RowOptions, TrainOptions
from .parsing import Verb, require


def _arguments() -> tuple[type, ...]:
    from .training_arguments import TrainArguments

    return (DataOptions, TrainOptions, RowOptions, ModelOptions, EncodeOptions, TrainArguments)


def run(
    data_options: DataOptions,
    options: TrainOptions,
    row_options: RowOptions,
    model_options: ModelOptions,
    encode_options: EncodeOptions,
    args: Any,
) -> None:
    """Trains, evaluates, and writes the native checkpoint with its card."""
    require(data_options, "train", data="the collection, a folder or Hub id")
    require(options, "train", model="what to start from, a Hub id or folder")
    require(args, "train", output_dir="where the model goes")
    from ..models import CrossEncoderRanker, DenseRetriever, load_model
    from ..trainers import RetrievalTrainer
    from . import steps
    from .reporting import Report

    data = steps.Data.open(data_options)
    overrides = steps.model_overrides(model_options)
    if options.kind not in (None, "dense", "cross_encoder"):
        raise InputError(f"unknown kind {options.kind!r}", where="--kind", cure="Choose dense or cross_encoder")
    loader = {None: load_model, "dense": DenseRetriever.from_pretrained, "cross_encoder": CrossEncoderRanker.from_pretrained}
    model = loader[options.kind](options.model, revision=options.model_revision, **overrides)
    settings = steps.settings_of(
        data_options, options, row_options, model_options, args, data_fingerprint=data.collection.fingerprint,
        start=model.weights_fingerprint(),
    )
    folder = steps.claim_output(args.output_dir, settings)
    encode = steps.encode_settings(encode_options, data_options)
    report = Report(folder, data, encode, measures=args.eval_measures, depth=args.eval_depth)

    if row_options.rows is not None:
        rows = steps.named_rows(data, row_options.rows)
    else:
        source = {"auto": "bm25", "teacher": "bm25", "student": model}.get(row_options.mine_with, row_options.mine_with)
        if isinstance(source, str) and source != "bm25":
            source = load_model(source)
        rows = steps.mined_rows(source, data, row_options, encode, index=encode_options.index, seed=args.seed)
    rows = steps.sample_rows(rows, row_options.max_queries, args.seed)

    report.bm25()
    report.model("before", model)
    trainer = RetrievalTrainer(model, args, rows=rows, evaluation=steps.evaluation_for(data, args, model))
    steps.finish_training(trainer)
    report.model("trained", model)
    report.finish(
        trainer,
        rows,
        title=f"{folder.name}",
        main="trained",
        settings=settings,
        base_models=[options.model],
    )


VERB = Verb(
    "train",
    "Train a bi-encoder or a cross-encoder on labelled rows; hard negatives are mined if there are none.",
    (DataOptions, TrainOptions, RowOptions, ModelOptions, EncodeOptions),
    run,
    _arguments,
    "hf-distill train --data BeIR/scifact --model microsoft/MiniLM-L12-H384-uncased --kind cross_encoder "
    "--output_dir outputs/ranker",
)
