"""`hf-distill tele`: episodes of mining and training, in one process (group)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .episode import answers_by_position, episode_options
from .options import DataOptions, IndexOptions, ModelOptions, PoolsOfEpisodesOptions, TeleHelp, TrainOptions
from .parsing import Verb, require


if TYPE_CHECKING:
    from ..models.base import RetrievalModel
    from ..trainers import TeleTrainer
    from .steps import Data


def _arguments() -> tuple[type, ...]:
    from .training_arguments import TeleArguments

    return (DataOptions, TrainOptions, PoolsOfEpisodesOptions, ModelOptions, IndexOptions, TeleArguments)


def run(
    data_options: DataOptions,
    options: TrainOptions,
    pool_options: PoolsOfEpisodesOptions,
    model_options: ModelOptions,
    encode_options: IndexOptions,
    args: Any,
) -> None:
    """Trains all episodes, evaluates, and writes the native checkpoint with its card."""
    require(
        "tele",
        data=(data_options.data, "the collection, a folder or Hub id"),
        model=(options.model, "the pretrained model that every episode starts from, a Hub id or folder"),
        output_dir=(args.output_dir, "where the episodes and the model go"),
    )
    from ..trainers import About
    from . import folders, publishing, steps
    from .reporting import Report

    publishing.check_no_checkpoint(args, "episodes")
    data = steps.Data.open(data_options)
    collection = data.collection
    model = steps.open_model(
        options.model, options.kind or "dense", options.model_revision, model_options, args.seed, layers=options.layers
    )
    settings = folders.settings_of(
        data_options,
        options,
        pool_options,
        model_options,
        encode_options,
        args,
        data_fingerprint=collection.fingerprints,
        start_weights=model.weights_fingerprint(),
    )
    folders.claim_output(args.output_dir, settings)
    publishing.check_push(args)
    encode = steps.encode_settings(encode_options, data_options)
    report = Report.of_training(data, encode, args, encode_options.index)
    report.bm25()
    report.model("before", model)
    trainer = _trainer(model, args, data, pool_options, {"factory": encode_options.index, **encode})
    summary = f"`{options.model}`, trained on *{collection.name}* in {args.episodes} episodes (ANCE-Tele)."
    trainer.about = About(summary, [options.model], [collection.source])
    trainer.train()
    trainer.write_history()
    for number in range(1, args.episodes + 1):
        report.model(f"episode_{number}", trainer.model_of(number))
    report.finish(
        trainer,
        trainer.whole_model(),
        trainer.rows,
        system=f"episode_{args.episodes}",
        summary=summary,
        settings=settings,
        base_models=[options.model],
    )
    publishing.publish(trainer)


def _trainer(
    model: RetrievalModel, args: Any, data: Data, options: PoolsOfEpisodesOptions, retrieval: dict[str, Any]
) -> TeleTrainer:
    from ..trainers import TeleTrainer
    from . import row_sets, steps

    return TeleTrainer(
        model,
        args,
        data.collection,
        data.train,
        episode=episode_options(options, args.seed),
        evaluation=steps.evaluation_for(data, args, model),
        answers=answers_by_position(options.answers, data.collection.queries),
        query_positions=row_sets.sampled_queries(data, options.max_queries, args.seed),
        retrieval=retrieval,
    )


VERB = Verb(
    "tele",
    "Train a bi-encoder in episodes of teleportation negatives (ANCE-Tele).",
    (DataOptions, TrainOptions, PoolsOfEpisodesOptions, ModelOptions, IndexOptions, TeleHelp),
    run,
    _arguments,
    "hf-distill tele --data my_collection --model Luyu/co-condenser-marco --stop_after 20000 "
    "--output_dir outputs/tele",
)
