"""`hf-distill forgetting`: what every episode learned and forgot, and where its negatives came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import is_main_process, print_table
from ..errors import InputError
from ..files import read_json
from ..settings import option
from .episode import RANKS_COLUMN, RANKS_FILE
from .options import CollectionOptions, IndexOptions
from .parsing import Verb, require


if TYPE_CHECKING:
    import numpy as np


@dataclass
class ForgettingOptions:
    """What to compare."""

    _argument_group_name = "episodes"

    rows: list[str] | None = option(None, "The pools of the episodes in order, as hf-distill episode wrote them.")
    model: str | None = option(None, "The model that was trained on the last pool.")
    twin: str | None = option(
        None, "The same model from another seed: what differs between the two is the noise that forgetting has."
    )
    split: str = option("train", "Judgements of the pools' queries.")
    depth: int = option(100, "Ranks below count as not found.")
    output_dir: str | None = option(None, "Folder for metrics.json, ranks of each query, and plots.")


def run(data_options: CollectionOptions, options: ForgettingOptions, encode_options: IndexOptions) -> None:
    """Compares the episodes, prints tables, and keeps figures, ranks and plots."""
    require(
        "forgetting",
        data=(data_options.data, "the collection, a folder or Hub id"),
        rows=(options.rows, "the pools of the episodes in order"),
        model=(options.model, "the model that was trained on the last pool"),
        output_dir=(options.output_dir, "folder for figures and plots"),
    )
    import numpy as np

    from ..evaluation.forgetting import positive_ranks, write_forgetting
    from ..hub.manifest import write_manifest
    from ..models import load_model
    from . import row_sets, steps

    mined = [_miner_ranks(folder) for folder in options.rows]
    data = steps.Data.open(data_options)
    data.train = options.split
    collection, qrels = data.collection, data.collection.split(options.split)
    pools = [row_sets.named_rows(data, name) for name in options.rows]
    ids = list(mined[0])
    for name, ranks in zip(options.rows, mined):
        if set(ranks) != set(ids):
            raise InputError(
                f"its {len(ranks)} queries are not the {len(ids)} of {options.rows[0]}",
                where=name,
                cure="Mine all episodes for the same queries",
            )
    queries = collection.queries.positions(ids)
    encode = steps.encode_settings(encode_options, data_options)

    def ranks_of(origin: str) -> np.ndarray:
        found = steps.candidates_run(load_model(origin), data, queries, options.depth, encode, encode_options.index)
        return positive_ranks(found, qrels, queries, options.depth)

    ranks = [np.array([one[identifier] for identifier in ids]) for one in mined]
    ranks = np.stack([np.where(one > options.depth, 0, one) for one in ranks] + [ranks_of(options.model)])
    names = ["pretrained", *(f"episode_{number}" for number in range(1, len(options.rows) + 1))]
    twins = [None] * (len(names) - 1) + [ranks_of(options.twin) if options.twin is not None else None]
    if not is_main_process():
        return
    found = write_forgetting(
        options.output_dir,
        f"{collection.name}/{options.split}",
        ids,
        names,
        ranks,
        pools,
        other_seed=twins,
        depth=options.depth,
    )
    print_table(
        f"{collection.name}/{options.split}: {len(ids):,} queries",
        ["episode", f"RR@{options.depth}", "learning", "forgetting", "lost", "noise"],
        [
            [one.name, *(_percent(value) for value in (one.rr, one.learning, one.forgetting, one.lost, one.noise))]
            for one in found
        ],
    )
    write_manifest(options.output_dir, data=data.facts(), metrics=read_json(Path(options.output_dir) / "metrics.json"))


def _miner_ranks(folder: str) -> dict[str, int]:
    import pyarrow.parquet as pq

    path = Path(folder) / RANKS_FILE
    if not path.is_file():
        raise InputError(
            "it does not hold the ranks of its miner", where=folder, cure="Make it with hf-distill episode"
        )
    table = pq.read_table(path)
    return dict(zip(table.column("query_id").to_pylist(), table.column(RANKS_COLUMN).to_pylist()))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


VERB = Verb(
    "forgetting",
    "Say what each episode learned and forgot, and where its negatives came from.",
    (CollectionOptions, ForgettingOptions, IndexOptions),
    run,
    example="hf-distill forgetting --data my_collection --rows outputs/pool_1 outputs/pool_2 --model outputs/model_2 "
    "--output_dir outputs/forgetting",
)
