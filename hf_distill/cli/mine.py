"""`hf-distill mine`: hard negatives of every training query, as a row set."""

from __future__ import annotations

from pathlib import Path

from ..console import get_logger
from ..errors import InputError
from .options import CollectionOptions, IndexOptions, MineOptions, PoolOptions
from .parsing import Verb, require


logger = get_logger(__name__)


def run(
    data_options: CollectionOptions, options: MineOptions, pool_options: PoolOptions, encode_options: IndexOptions
) -> None:
    """Mines and saves a row set."""
    require("mine", data=(data_options.data, "the collection, a folder or Hub id"))
    if (options.model is None) == (options.run is None):
        raise InputError(
            "hf-distill mine needs either --model (a Hub id, a folder, or bm25) or --run (a TREC file)",
            cure="See hf-distill mine --help",
        )
    from ..data import Run
    from ..models import load_model
    from . import publishing, steps

    data = steps.Data.open(data_options)
    data.train = options.train_split
    encode = steps.encode_settings(encode_options, data_options)
    name = options.name or _name_of(options.model or options.run)
    target = steps.claim_rows(steps.row_folder(data, options.output_dir, name))
    publishing.check_push_to(options)
    if options.run is not None:
        source: object = Run.load_trec(options.run, data.collection.queries, data.collection.corpus)
    else:
        source = "bm25" if options.model == "bm25" else load_model(options.model, revision=options.model_revision)
    rows = steps.mined_rows(
        source,
        data,
        pool_options,
        encode,
        index=encode_options.index,
        seed=options.seed,
        include_unlabelled=options.include_unlabelled,
        filter_teacher=load_model(options.filter_teacher) if options.filter_teacher else None,
        source=name,
    )
    steps.save_rows(rows, data, target, name)
    logger.info("%s rows written to %s", f"{len(rows):,}", target)
    publishing.push_rows(rows, data_options, options, target)


def _name_of(origin: str) -> str:
    return Path(origin).name.removesuffix(".trec").replace("/", "_")


VERB = Verb(
    "mine",
    "Find hard negatives and write them as a row set.",
    (CollectionOptions, MineOptions, PoolOptions, IndexOptions),
    run,
    example="hf-distill mine --data my_collection --model bm25 --output_dir outputs/rows",
)
