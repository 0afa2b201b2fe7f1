"""`hf-distill pool`: the negatives of several row sets in one."""

from __future__ import annotations

from ..console import get_logger
from .options import CollectionOptions, PoolsOptions
from .parsing import Verb, require


logger = get_logger(__name__)


def run(data_options: CollectionOptions, options: PoolsOptions) -> None:
    """Puts pools one after another and saves them as one row set."""
    require(
        "pool",
        data=(data_options.data, "the collection, a folder or Hub id"),
        rows=(options.rows, "two or more row sets, names or folders"),
        output_dir=(options.output_dir, "folder of the new row set"),
    )
    from ..retrieval.pools import concatenate_pools
    from . import steps

    data = steps.Data.open(data_options)
    pools = [steps.named_rows(data, name) for name in options.rows]
    target = steps.row_folder(data, options.output_dir, options.name or "pool")
    rows = concatenate_pools(pools, duplicates=options.duplicates, cache_dir=data_options.cache_dir)
    steps.save_rows(rows, data, target, options.name or target.name)
    logger.info("%s rows of %d pools written to %s", f"{len(rows):,}", len(pools), target)


VERB = Verb(
    "pool",
    "Put the negatives of several row sets into one; --negative_sources weighs them in training.",
    (CollectionOptions, PoolsOptions),
    run,
    example="hf-distill pool --data my_collection --rows bm25_rows dense_rows lexical_rows --output_dir outputs/pool",
)
