"""`hf-distill pool`: the negatives of several row sets in one."""

from __future__ import annotations

from dataclasses import dataclass

from ..console import get_logger
from ..settings import option
from .options import CollectionOptions
from .parsing import Verb, require


logger = get_logger(__name__)


@dataclass
class PoolsOptions:
    """Row sets whose negatives are put one after another."""

    _argument_group_name = "row sets"

    rows: list[str] | None = option(None, "Names or folders of row sets; queries and positives are the first one's.")
    duplicates: bool = option(
        True, "Keep a negative once for each source that has it, so that it is drawn that much more often."
    )
    name: str | None = option(None, "Name of the row set. Default: that of its folder.")
    output_dir: str | None = option(None, "Folder of the row set.")


def run(data_options: CollectionOptions, options: PoolsOptions) -> None:
    """Puts pools one after another and saves them as one row set."""
    require(
        "pool",
        data=(data_options.data, "the collection, a folder or Hub id"),
        rows=(options.rows, "two or more row sets, names or folders"),
        output_dir=(options.output_dir, "folder of the new row set"),
    )
    from ..retrieval.pools import concatenate_pools
    from . import folders, row_sets, steps

    data = steps.Data.open(data_options)
    pools = [row_sets.named_rows(data, name) for name in options.rows]
    target = folders.claim_rows(row_sets.row_folder(data, options.output_dir, options.name or "pool"))
    rows = concatenate_pools(pools, duplicates=options.duplicates, cache_dir=data_options.cache_dir)
    row_sets.save_rows(rows, data, target, options.name or target.name)
    logger.info("%s rows of %d pools written to %s", f"{len(rows):,}", len(pools), target)


VERB = Verb(
    "pool",
    "Put the negatives of several row sets into one; --negative_sources weighs them in training.",
    (CollectionOptions, PoolsOptions),
    run,
    example="hf-distill pool --data my_collection --rows bm25_rows dense_rows lexical_rows --output_dir outputs/pool",
)
