"""`hf-distill mine`: hard negatives of every training query, as a row set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..console import get_logger
from ..errors import InputError
from ..settings import option
from .options import CollectionOptions, IndexOptions, PoolOptions, PushToOptions
from .parsing import Verb, require


logger = get_logger(__name__)


@dataclass
class MineOptions(PushToOptions):
    """What to mine with, and where the rows go."""

    _argument_group_name = "mining"

    model: str | None = option(None, "What finds the candidates: a Hub id or folder of a bi-encoder, or bm25.")
    model_revision: str | None = option(None, "Its branch, tag or commit.")
    run: str | None = option(None, "Take the candidates of this TREC run instead.")
    train_split: str = option("train", "Judgements whose queries get rows.")
    include_unlabelled: bool = option(False, "Also make rows for queries without a positive.")
    filter_teacher: str | None = option(
        None, "A model whose scores are used for --mine_margin instead of the retriever's."
    )
    name: str | None = option(None, "Name of the row set. Default: the model's.")
    seed: int = option(42, "Seed of all samples.")
    output_dir: str | None = option(
        None, "Folder of the row set. Default: inside the collection, if that is a folder in this project's layout."
    )


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
    from . import folders, publishing, row_sets, steps

    data = steps.Data.open(data_options)
    data.train = options.train_split
    encode = steps.encode_settings(encode_options, data_options)
    name = options.name or _name_of(options.model or options.run)
    target = folders.claim_rows(row_sets.row_folder(data, options.output_dir, name))
    publishing.check_push_to(options)
    if options.run is not None:
        source: object = Run.load_trec(options.run, data.collection.queries, data.collection.corpus)
    else:
        source = "bm25" if options.model == "bm25" else load_model(options.model, revision=options.model_revision)
    rows = row_sets.mined_rows(
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
    row_sets.save_rows(rows, data, target, name)
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
