"""`hf-distill episode`: the pool of one teleportation episode, as a row set."""

from __future__ import annotations

from ..console import get_logger, is_main_process
from ..errors import InputError
from .options import CollectionOptions, EpisodeMiningOptions, IndexOptions
from .parsing import Verb, require


logger = get_logger(__name__)

# Beside the rows: where the miner ranks the positives, from which forgetting is read.
RANKS_FILE = "mining/ranks.parquet"
RANKS_COLUMN = "miner"


def run(data_options: CollectionOptions, options: EpisodeMiningOptions, encode_options: IndexOptions) -> None:
    """Mines and saves the pool."""
    require(
        "episode",
        data=(data_options.data, "the collection, a folder or Hub id"),
        model=(options.model, "who mines: a Hub id, a folder, or bm25"),
        output_dir=(options.output_dir, "folder of the pool"),
    )
    from ..evaluation.forgetting import positive_ranks, write_ranks
    from ..models import load_model
    from ..retrieval.teleport import EpisodeOptions, mine_episode
    from . import steps
    from .select import read_answers

    wanted = EpisodeOptions(
        depth=options.depth,
        pool_depth=options.pool_depth,
        query_negatives=options.query_negatives,
        positive_negatives=options.positive_negatives,
        momentum=options.momentum,
        keep_queries=options.keep_queries,
        seed=options.seed,
    )
    data = steps.Data.open(data_options)
    data.train = options.train_split
    collection = data.collection
    qrels = collection.split(options.train_split)
    target = steps.claim_rows(steps.row_folder(data, options.output_dir, f"episode_{options.episode}"))
    answers = None
    if options.answers is not None:
        answers = _by_position(read_answers(options.answers), collection.queries, options.answers)
    queries = steps.sampled_queries(data, options.max_queries, options.seed)
    miner = "bm25" if options.model == "bm25" else load_model(options.model, revision=options.model_revision)
    episode = mine_episode(
        miner,
        collection,
        options.train_split,
        options.episode,
        previous=steps.named_rows(data, options.previous) if options.previous else None,
        options=wanted,
        answers=answers,
        query_positions=queries,
        factory=encode_options.index,
        **steps.encode_settings(encode_options, data_options),
    )
    steps.save_rows(episode.rows, data, target, target.name)
    if is_main_process():
        ranks = positive_ranks(episode.run, qrels, episode.run.query)
        ids = collection.queries.ids_at(episode.run.query)
        write_ranks(target / RANKS_FILE, ids, [RANKS_COLUMN], ranks[None])
    logger.info("%s rows written to %s", f"{len(episode.rows):,}", target)


def _by_position(answers: dict[str, list[str]], queries, where: str) -> dict[int, list[str]]:
    positions = queries.positions(list(answers))
    if (positions < 0).all():
        raise InputError("none of its queries is in the collection", where=where, cure="Check the query ids")
    return {int(position): texts for position, texts in zip(positions, answers.values()) if position >= 0}


VERB = Verb(
    "episode",
    "Mine the teleportation negatives of an episode (ANCE-Tele).",
    (CollectionOptions, EpisodeMiningOptions, IndexOptions),
    run,
    example="hf-distill episode --data my_collection --model outputs/model_1 --episode 2 "
    "--previous outputs/pool_1 --output_dir outputs/pool_2",
)
