"""Negative pools of several origins as one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ..data.lists import list_offsets
from ..data.rows import RowSet
from ..data.schema import DOCUMENTS, SOURCE_GROUPS, SOURCES, per_document_type
from ..errors import InputError


# Raised by hand when the same key would give other rows.
POOLS_VERSION = 1

_BLOCK_ROWS = 16384


def concatenate_pools(
    pools: Sequence[RowSet],
    *,
    duplicates: bool = True,
    cache_dir: str | os.PathLike | None = None,
) -> RowSet:
    """Puts the negatives of several row sets one after another.

    Queries, their order and their positives are those of the first row set; from the others come the negatives of
    those queries, in the order of the row sets. A negative that is a positive of the first row set is dropped. Blocks
    of rows are worked on, so memory does not grow with their number.

    Args:
        pools: Row sets of one collection, each with `sources`.
        duplicates: Keep a negative once for each source that has it, so that it is drawn that much more often; False
            keeps the first.
        cache_dir: Instead of the default cache folder.

    Returns:
        The row set, with the per-document columns that all of them have. `metadata["pools"]` says how each was made.

    Raises:
        InputError: If a row set names no sources, or is of other queries or another corpus.
    """
    if not pools:
        raise InputError("no row set", where="concatenate_pools", cure="Give one at least")
    first = pools[0]
    for number, pool in enumerate(pools, 1):
        where = f"row set {number}"
        if SOURCES not in pool.columns:
            raise InputError(
                "it does not say where its negatives come from", where=where, cure=f"Add a column {SOURCES!r}"
            )
        for name in ("queries", "corpus"):
            if getattr(pool, name).fingerprint != getattr(first, name).fingerprint:
                raise InputError(
                    f"its {name} are not those of the first one", where=where, cure="Mine both on one collection"
                )
    columns = [name for name in first.columns if all(name in pool.columns for pool in pools)]
    row_of = [_RowOf(pool) for pool in pools]

    def batches() -> Iterator[dict[str, Any]]:
        for start in range(0, len(first), _BLOCK_ROWS):
            query = first.query[start : start + _BLOCK_ROWS]
            yield _batch(query, [_part(pool, of(query), columns) for pool, of in zip(pools, row_of)], duplicates)

    key = {
        "version": POOLS_VERSION,
        "kind": "pools",
        "pools": [pool.fingerprint for pool in pools],
        "duplicates": duplicates,
    }
    # What the first one says of its own making stands in `pools`, as that of the others.
    common = {name: value for name, value in first.metadata.items() if name not in ("mining", SOURCE_GROUPS)}
    metadata = {**common, "made_by": "pools", "duplicates": duplicates}
    metadata["pools"] = [pool.metadata for pool in pools]
    return RowSet.from_batches(first.queries, first.corpus, batches(), key, metadata=metadata, cache_dir=cache_dir)


class _RowOf:
    """Which row of a row set is a query's; -1 for none."""

    def __init__(self, rows: RowSet):
        self.order = np.argsort(rows.query, kind="stable")
        self.query = rows.query[self.order]

    def __call__(self, query: np.ndarray) -> np.ndarray:
        slot = np.minimum(np.searchsorted(self.query, query), len(self.query) - 1)
        return np.where(self.query[slot] == query, self.order[slot], -1)


def _part(pool: RowSet, row: np.ndarray, columns: Sequence[str]) -> dict[str, Any]:
    """The documents of some rows, flat: their row among `row`, whether positive, and their entries."""
    owner = np.flatnonzero(row >= 0)
    table = pool.table.take(row[owner])
    lists = {name: table.column(name).combine_chunks() for name in (DOCUMENTS, *columns)}
    lengths = np.diff(list_offsets(lists[DOCUMENTS]))
    place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return {
        "owner": np.repeat(owner, lengths),
        "positive": place < np.repeat(pool.num_positives[row[owner]], lengths),
        "entries": {name: values.flatten() for name, values in lists.items()},
    }


def _batch(query: np.ndarray, parts: list[dict[str, Any]], duplicates: bool) -> dict[str, Any]:
    """The arguments of `RowSet.from_arrays` for the rows of `query`."""
    # Of the first row set everything, of the others the negatives.
    wanted = [np.ones(len(part["owner"]), dtype=bool) if part is parts[0] else ~part["positive"] for part in parts]
    owner = np.concatenate([part["owner"][kept] for part, kept in zip(parts, wanted)])
    positive = np.concatenate([part["positive"][kept] for part, kept in zip(parts, wanted)])
    entries = {
        name: pa.concat_arrays([part["entries"][name].filter(pa.array(kept)) for part, kept in zip(parts, wanted)])
        for name in parts[0]["entries"]
    }
    documents = entries[DOCUMENTS].to_numpy()
    source = entries[SOURCES].dictionary_encode().indices.to_numpy(zero_copy_only=False)
    # Sorted by row and document, a positive leads; what equals it is no negative.
    order = np.lexsort((np.arange(len(owner)), ~positive, documents, owner))
    leads = _changes(owner[order], documents[order])
    leader = order[np.flatnonzero(leads)[np.cumsum(leads) - 1]]
    dropped = np.zeros(len(order), dtype=bool)
    dropped[order] = ~leads & (positive[leader] | (not duplicates))
    again = np.lexsort((np.arange(len(owner)), source, documents, owner))
    dropped[again] |= ~_changes(owner[again], documents[again], source[again])
    chosen = np.flatnonzero(~dropped)
    chosen = chosen[np.lexsort((~positive[chosen], owner[chosen]))]
    offsets = pa.array(np.concatenate([[0], np.cumsum(np.bincount(owner[chosen], minlength=len(query)))]), pa.int32())
    taken = pa.array(chosen)
    return {
        "query": query,
        "num_positives": np.bincount(owner[positive], minlength=len(query)),
        **{
            name: pa.ListArray.from_arrays(offsets, values.take(taken).cast(_type(name)))
            for name, values in entries.items()
        },
    }


def _changes(*sorted_keys: np.ndarray) -> np.ndarray:
    """Whether an entry differs from the one before it in any of the keys."""
    different = np.ones(len(sorted_keys[0]), dtype=bool)
    different[1:] = np.any([key[1:] != key[:-1] for key in sorted_keys], axis=0)
    return different


def _type(name: str) -> pa.DataType:
    return pa.int64() if name == DOCUMENTS else per_document_type(name)
