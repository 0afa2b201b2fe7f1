"""`hf-distill episode`: the pool of one teleportation episode, as a row set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..console import get_logger, is_main_process
from ..errors import InputError
from .options import CollectionOptions, EpisodeMiningOptions, IndexOptions, PoolsOfEpisodesOptions
from .parsing import Verb, require


if TYPE_CHECKING:
    from ..data import Queries
    from ..retrieval.teleport import EpisodeOptions


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
    from ..hub.manifest import note_files
    from ..hub.row_sets import write_pool_card
    from ..models import load_model
    from ..retrieval.teleport import mine_episode
    from . import folders, publishing, row_sets, steps

    wanted = episode_options(options, options.seed)
    data = steps.Data.open(data_options)
    data.train = options.train_split
    collection = data.collection
    qrels = collection.split(options.train_split)
    target = folders.claim_rows(row_sets.row_folder(data, options.output_dir, f"episode_{options.episode}"))
    publishing.check_push_to(options)
    answers = answers_by_position(options.answers, collection.queries)
    queries = row_sets.sampled_queries(data, options.max_queries, options.seed)
    miner = "bm25" if options.model == "bm25" else load_model(options.model, revision=options.model_revision)
    episode = mine_episode(
        miner,
        collection,
        options.train_split,
        options.episode,
        previous=row_sets.named_rows(data, options.previous) if options.previous else None,
        options=wanted,
        answers=answers,
        query_positions=queries,
        factory=encode_options.index,
        **steps.encode_settings(encode_options, data_options),
    )
    row_sets.save_rows(episode.rows, data, target, target.name)
    if is_main_process():
        ranks = positive_ranks(episode.run, qrels, episode.run.query)
        ids = collection.queries.ids_at(episode.run.query)
        write_ranks(target / RANKS_FILE, ids, [RANKS_COLUMN], ranks[None])
        write_pool_card(episode.rows, target)
        note_files(target, RANKS_FILE, "README.md")
    logger.info("%s rows written to %s", f"{len(episode.rows):,}", target)
    publishing.push_rows(episode.rows, data_options, options, target)


def episode_options(options: PoolsOfEpisodesOptions, seed: int) -> EpisodeOptions:
    """The person's wishes as those of [`mine_episode`]."""
    from ..retrieval.teleport import EpisodeOptions

    names = ("depth", "pool_depth", "query_negatives", "positive_negatives", "momentum", "keep_queries")
    return EpisodeOptions(**{name: getattr(options, name) for name in names}, seed=seed)


def answers_by_position(path: str | None, queries: Queries) -> dict[int, list[str]] | None:
    """The answers in a file, by the position of their query; those of unknown queries are passed over.

    Raises:
        InputError: If all are unknown.
    """
    from .select import read_answers

    if path is None:
        return None
    answers = read_answers(path)
    positions = queries.positions(list(answers))
    if (positions < 0).all():
        raise InputError("none of its queries is in the collection", where=path, cure="Check the query ids")
    return {int(position): texts for position, texts in zip(positions, answers.values()) if position >= 0}


VERB = Verb(
    "episode",
    "Mine the teleportation negatives of an episode (ANCE-Tele).",
    (CollectionOptions, EpisodeMiningOptions, IndexOptions),
    run,
    example="hf-distill episode --data my_collection --model outputs/model_1 --episode 2 "
    "--previous outputs/pool_1 --output_dir outputs/pool_2",
)
