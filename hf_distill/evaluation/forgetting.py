"""What a sequence of checkpoints learned and forgot, and where its negatives came from.

A retriever that is trained in episodes, each on negatives mined with the last, changes its mind about many training
queries from one episode to the next, while the mean of a measure hardly moves. ANCE-Tele (Sun et al. 2022,
https://arxiv.org/abs/2210.17167) calls the part that gets worse *forgetting*.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.lists import list_offsets
from ..data.qrels import Qrels
from ..data.rows import RowSet
from ..data.run import Run
from ..data.schema import SOURCES
from ..errors import InputError
from ..files import atomic_path, write_json


DEPTH = 100
# Documents compared at once: bounded memory whatever the number of queries.
_BLOCK_CELLS = 1 << 22


@dataclass(frozen=True)
class Change:
    """What happened to the training queries between two episodes; shares are of all queries.

    Attributes:
        name: Of the later episode.
        n_queries: Queries compared.
        rr: Mean reciprocal rank of the later episode, `RR@100` as a rule.
        forgetting: Share whose best positive ranks lower than before, or is no longer found.
        learning: Share whose best positive ranks higher than before.
        forgotten: Queries of `forgetting`.
        learned: Queries of `learning`.
        mean_loss: Mean drop of the reciprocal rank of the forgotten queries.
        lost: Share that had a positive at rank 1 in some earlier episode, and no longer has.
        noise: Share that ranks lower under another seed of the *same* episode: what forgetting has to exceed to mean
            anything. None where no second seed was measured.
    """

    name: str
    n_queries: int
    rr: float
    forgetting: float | None = None
    learning: float | None = None
    forgotten: int | None = None
    learned: int | None = None
    mean_loss: float | None = None
    lost: float | None = None
    noise: float | None = None

    def as_dict(self) -> dict[str, float | int | str]:
        """The figures that there are, for `metrics.json`."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def positive_ranks(run: Run, qrels: Qrels, queries: np.ndarray, depth: int = DEPTH, threshold: int = 1) -> np.ndarray:
    """The best rank of a relevant document of each query.

    Args:
        run: Results; queries that it lacks count as not found.
        qrels: Judgements.
        queries: `int64[n]`, positions of the queries.
        depth: Results that are looked at.
        threshold: Lowest relevant grade.

    Returns:
        `int32[n]`: ranks from 1; 0 where no relevant document is among the first `depth`.
    """
    relevant = qrels.relevance >= threshold
    width = int(max(run.documents.max(initial=-1), qrels.document.max(initial=-1))) + 1
    known = np.unique(qrels.query[relevant] * width + qrels.document[relevant])
    order = np.argsort(run.query, kind="stable")
    slots = np.minimum(np.searchsorted(run.query[order], queries), max(len(order) - 1, 0))
    ranks = np.zeros(len(queries), np.int32)
    if not len(order) or not len(known):
        return ranks
    found = np.flatnonzero(run.query[order[slots]] == queries)
    step = max(1, _BLOCK_CELLS // max(1, min(depth, run.documents.shape[1])))
    for start in range(0, len(found), step):
        rows = found[start : start + step]
        documents = run.documents[order[slots[rows]], :depth]
        keys = queries[rows, None] * width + documents
        hits = (documents >= 0) & (known[np.minimum(np.searchsorted(known, keys), len(known) - 1)] == keys)
        ranks[rows] = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0)
    return ranks


def changes(names: Sequence[str], ranks: np.ndarray, other_seed: Sequence[np.ndarray | None] = ()) -> list[Change]:
    """Learning and forgetting from each episode to the next.

    With `rr_i(q)` the reciprocal of `rank_i(q)` (0 where not found),

        forgetting_i = |{q : rr_i(q) < rr_{i-1}(q)}| / |Q|,   learning_i = |{q : rr_i(q) > rr_{i-1}(q)}| / |Q|

    Ranks are compared as integers, so equal ranks never differ by rounding.

    Args:
        names: Of the episodes, in order.
        ranks: `int[episodes, queries]`, from [`positive_ranks`].
        other_seed: For each episode the ranks under another seed, or None: the noise floor.

    Raises:
        InputError: If the numbers of names, episodes or queries do not fit.
    """
    ranks = np.asarray(ranks)
    if ranks.ndim != 2 or len(names) != len(ranks) or not ranks.shape[1]:
        raise InputError(f"ranks of shape {ranks.shape} for {len(names)} episodes", where="forgetting")
    # Not found is worse than any rank.
    places = np.where(ranks == 0, np.iinfo(np.int32).max, ranks)
    reciprocal = np.where(ranks == 0, 0.0, 1.0 / np.maximum(ranks, 1))
    result = []
    for i, name in enumerate(names):
        noise = None
        if i < len(other_seed) and other_seed[i] is not None:
            twin = np.asarray(other_seed[i])
            if twin.shape != ranks[i].shape:
                raise InputError(f"{len(twin)} ranks instead of {ranks.shape[1]}", where=f"the other seed of {name}")
            noise = float((np.where(twin == 0, np.iinfo(np.int32).max, twin) > places[i]).mean())
        change = {"name": str(name), "n_queries": ranks.shape[1], "rr": float(reciprocal[i].mean()), "noise": noise}
        if i:
            worse, better = places[i] > places[i - 1], places[i] < places[i - 1]
            drop = (reciprocal[i - 1] - reciprocal[i])[worse]
            change |= {
                "forgetting": float(worse.mean()),
                "learning": float(better.mean()),
                "forgotten": int(worse.sum()),
                "learned": int(better.sum()),
                "mean_loss": float(drop.mean()) if len(drop) else 0.0,
                "lost": float(((places[:i] == 1).any(axis=0) & (places[i] != 1)).mean()),
            }
        result.append(Change(**change))
    return result


def negative_keys(rows: RowSet, sources: Sequence[str] | None = None) -> np.ndarray:
    """The distinct (query, negative) pairs of a row set as sorted `int64` keys, comparable between row sets of one
    collection.

    Args:
        rows: The row set.
        sources: Count only negatives of these sources.

    Raises:
        InputError: If the row set names no sources, though they are asked for.
    """
    if sources is not None and SOURCES not in rows.columns:
        raise InputError("the row set does not name its sources", where="negative composition")
    parts, start = [np.empty(0, np.int64)], 0
    for block in rows.blocks():
        documents = block.column("documents").combine_chunks()
        bounds = list_offsets(documents).astype(np.int64)
        row = np.repeat(np.arange(len(block)), np.diff(bounds))
        place = np.arange(len(row)) - (bounds - bounds[0])[row]
        wanted = place >= rows.num_positives[start + row]
        if sources is not None:
            names = block.column(SOURCES).combine_chunks().flatten()
            wanted &= pc.is_in(names, value_set=pa.array(list(sources), pa.string())).to_numpy(zero_copy_only=False)
        keys = rows.query[start + row] * len(rows.corpus) + documents.flatten().to_numpy()
        parts.append(np.unique(keys[wanted]))
        start += len(block)
    return np.unique(np.concatenate(parts))


def composition(keys: Sequence[np.ndarray]) -> np.ndarray:
    """Where the negatives of each episode appeared first.

    Args:
        keys: For each episode its negatives, from [`negative_keys`].

    Returns:
        `float64[episodes, episodes]`: row i, column j is the share of the negatives of episode i that episode j was
        the first to supply; rows sum to 1 (to 0 for an episode without negatives), and columns after i are 0.
    """
    shares = np.zeros((len(keys), len(keys)))
    for i, here in enumerate(keys):
        left = np.asarray(here)
        for j in range(i + 1):
            known = np.isin(left, keys[j], assume_unique=True)
            shares[i, j] = known.sum() / max(len(here), 1)
            left = left[~known]
    return shares


def overlap(keys: Sequence[np.ndarray]) -> np.ndarray:
    """`float64[episodes, episodes]`: the share of the negatives of episode i that episode j has as well."""
    shares = [[np.isin(a, b, assume_unique=True).mean() if len(a) else 0.0 for b in keys] for a in keys]
    return np.array(shares, dtype=np.float64).reshape(len(keys), len(keys))


def write_ranks(path: str | os.PathLike, query_ids: Sequence[str], names: Sequence[str], ranks: np.ndarray) -> Path:
    """Writes every query's ranks as Parquet: `query_id`, and one `int32` column for each episode (0: not found)."""
    import pyarrow.parquet as pq

    columns = {"query_id": pa.array(list(query_ids), pa.string())}
    columns |= {str(name): pa.array(row, pa.int32()) for name, row in zip(names, ranks)}
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns), temporary)
    return Path(path)


def read_ranks(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """What [`write_ranks`] wrote, without the ids: `int32[queries]` by episode."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return {name: table.column(name).to_numpy() for name in table.column_names if name != "query_id"}


def write_forgetting(
    folder: str | os.PathLike,
    dataset: str,
    query_ids: Sequence[str],
    names: Sequence[str],
    ranks: np.ndarray,
    pools: Sequence[RowSet] = (),
    *,
    other_seed: Sequence[np.ndarray | None] = (),
    depth: int = DEPTH,
) -> list[Change]:
    """Writes what episodes learned and forgot: `metrics.json`, `ranks.parquet`, `negatives.json` and two plots.

    Args:
        folder: Where to.
        dataset: `"<collection>/<split>"`.
        query_ids: The compared queries.
        names: Of the models in order, the pretrained one first.
        ranks: `int[models, queries]`, from [`positive_ranks`].
        pools: The pool of each episode, that is of each model but the first.
        other_seed: See [`changes`].
        depth: Of the ranks.
    """
    from .plots import plot_composition, plot_forgetting
    from .report import update_metrics

    folder = Path(folder)
    found = changes(names, ranks, other_seed)
    for change in found:
        figures = {name: value for name, value in change.as_dict().items() if name not in ("name", "rr")}
        update_metrics(folder / "metrics.json", dataset, change.name, {**figures, f"RR@{depth}": change.rr})
    write_ranks(folder / "ranks.parquet", query_ids, names, ranks)
    plot_forgetting(found, folder / "plots" / "forgetting.png")
    if pools:
        keys = [negative_keys(pool) for pool in pools]
        shares = composition(keys)
        content = {"first_supplied_by": shares.tolist(), "shared_with": overlap(keys).tolist()}
        write_json(folder / "negatives.json", {"episodes": list(names[1:]), **content})
        plot_composition(shares, names[1:], folder / "plots" / "negatives.png")
    return found
