"""From pools of candidates to training examples: which positive, which negatives, in which order.

Every draw is a function of *(seed, epoch, row)* and of nothing else, so the examples are the same on one process or
eight, with or without loader workers, and after a resume in the middle of an epoch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..errors import InputError
from .lists import list_offsets
from .schema import SOURCE_GROUPS, SOURCES


if TYPE_CHECKING:
    import pyarrow as pa

    from .qrels import PositiveIndex
    from .rows import RowSet

RowKey = tuple[int, int]
"""A row's position and the epoch it is drawn for."""

_ROW_STREAM, ORDER_STREAM, BUFFER_STREAM = 0, 1, 2
_BLOCK_ROWS = 65536


class Example(NamedTuple):
    """One training example; everything in it is a position, the texts are looked up by the collator.

    Attributes:
        row: Position of the row in its row set.
        query: Position of the query.
        documents: `int64[1 + n]`, the positive first (an unlabelled row has candidates only).
        target: 0, the column of the positive, or -1 for an unlabelled row.
        positives: `int64[p]`, all known positives of the query, so that a loss can mask them elsewhere in the batch.
        scores: A teacher's scores of `documents` per column, each `float32[1 + n]`.
    """

    row: int
    query: int
    documents: np.ndarray
    target: int
    positives: np.ndarray
    scores: dict[str, np.ndarray]


class _Key(np.random.bit_generator.ISeedSequence):
    """A key as NumPy takes it without asking the system for entropy, which `Philox(key=...)` does and throws away."""

    def __init__(self, seed: int, epoch: int):
        self._key = np.array([seed % 2**64, epoch], np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return self._key


def random_stream(seed: int, epoch: int, row: int, purpose: int = _ROW_STREAM) -> np.random.Generator:
    """An independent random generator for one row in one epoch.

    Philox is a keyed counter: the key is *(seed, epoch)* and the row stands in the high words of the counter, so two
    streams never overlap, and starting one costs some microseconds.
    """
    counter = np.array([0, 0, row, purpose], np.uint64)
    return np.random.Generator(np.random.Philox(_Key(seed, epoch), counter=counter))


class TrainingRows(torch.utils.data.Dataset):
    """A row set as a `torch` dataset: `rows[row, epoch]` is the [`Example`] of that row in that epoch.

    Args:
        rows: The row set; a row is a query with its documents, positives first.
        num_negatives: How many negatives every example gets. A pool that is smaller is repeated cyclically, an empty
            one is an error.
        sampling: `"random"` draws without replacement and anew in every epoch; `"hardest"` takes the first ones in
            the order of the pool; `"window"` shuffles a row's pool once and takes the next ones in every epoch, so
            that none returns before all were seen (ANCE-Tele, Sun et al. 2022, https://arxiv.org/abs/2210.17167, with
            the generator of its released code).
        positive: `"first"` always takes the first positive; `"random"` draws one in every epoch; `"rotate"` takes the
            next one in every epoch.
        seed: Of all draws.
        sources: Share of the draws of every source of negatives, for example `{"bm25": 1, "teacher": 3}`; a source
            that is not named is not drawn from. The shares do not depend on how many documents a source has in the
            pool. A name may also be that of a group of sources in `rows.metadata["source_groups"]`, which have their
            share together. With `"hardest"` it only says which sources take part.
        score_columns: Columns of teacher scores to carry along with the documents.
        positives: All known positives of every query; without it, those of the row.
        first_row: Where these rows begin in a larger set that is not here: they are drawn as they would be there, and
            a source need not occur among them.

    Attributes:
        repeated: A sentence about the rows whose negatives stand more than once in an example; None if there are none.

    Raises:
        InputError: For a row without anything to draw from, an unknown column, source or option.
    """

    def __init__(
        self,
        rows: RowSet,
        *,
        num_negatives: int,
        sampling: str = "random",
        positive: str = "first",
        seed: int = 0,
        sources: Mapping[str, float] | None = None,
        score_columns: Sequence[str] = (),
        positives: PositiveIndex | None = None,
        first_row: int | None = None,
    ):
        _check_choice("sampling", sampling, ("random", "hardest", "window"))
        _check_choice("positive", positive, ("first", "random", "rotate"))
        if num_negatives < 0:
            raise InputError(f"{num_negatives} is not a number of negatives", where="num_negatives")
        self.rows, self.num_negatives, self.sampling, self.positive, self.seed = (
            rows,
            num_negatives,
            sampling,
            positive,
            seed,
        )
        self.positives, self.score_columns = positives, tuple(score_columns)
        self.first_row, self._whole = first_row or 0, first_row is None
        for column in self.score_columns:
            _check_column(rows, column)
        self._query, self._num_positives = rows.query, rows.num_positives
        self._weights = None if sources is None else self._read_sources(sources)
        self._check_pools()

    def __getstate__(self) -> dict[str, Any]:
        # The flat columns are views of the row set's memory map; a worker opens its own.
        return {name: value for name, value in self.__dict__.items() if name not in ("_query", "_num_positives")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._query, self._num_positives = self.rows.query, self.rows.num_positives

    def _read_sources(self, weights: Mapping[str, float]) -> dict[tuple[str, ...], float]:
        """The weights above 0, each of one source or of those of a group."""
        _check_column(self.rows, SOURCES)
        known = set().union(
            *(names.flatten().unique().to_pylist() for names in self.rows.table.column(SOURCES).chunks)
        )
        groups = {name: tuple(of) for name, of in self.rows.metadata.get(SOURCE_GROUPS, {}).items()}
        for name, weight in weights.items():
            if self._whole and name not in known and name not in groups:
                cure = f"The row set has {', '.join(sorted(map(repr, {*known, *groups})))}"
                raise InputError(f"no document has the source {name!r}", where="sources", cure=cure)
            if not 0 <= weight < float("inf"):
                raise InputError(
                    f"{weight} is not a weight", where=f"sources, {name!r}", cure="Use a number from 0 up"
                )
        shares = [(groups.get(name, (name,)), float(weight)) for name, weight in weights.items() if weight > 0]
        named = [source for group, _ in shares for source in group]
        doubled = next((source for source in named if named.count(source) > 1), None)
        if doubled is not None:
            raise InputError(
                f"the source {doubled!r} has two weights",
                where="sources",
                cure="Name it by itself, or one group that it is in",
            )
        if self.sampling != "random" and len({weight for _, weight in shares}) > 1:
            raise InputError(
                "different weights have no meaning when the order of the pool decides",
                where="sources",
                cure="Use sampling 'random', or give every source that takes part the weight 1",
            )
        return dict(shares)

    @property
    def _drawn_from(self) -> list[str]:
        return [source for group in self._weights for source in group]

    def _pool_sizes(self) -> np.ndarray:
        """`int64[rows]`, from how many documents the negatives of a row can be drawn."""
        if self._weights is None:
            return self.rows.lengths - self._num_positives
        sizes, start = np.zeros(len(self), np.int64), 0
        for block in self.rows.blocks(_BLOCK_ROWS):
            for names in block.column(SOURCES).chunks:
                sizes[start : start + len(names)] = self._allowed(names, self._num_positives[start:])
                start += len(names)
        return sizes

    def _allowed(self, names: pa.ListArray, num_positives: np.ndarray) -> np.ndarray:
        """How many negatives of every row of a chunk have a source that is drawn from."""
        import pyarrow as pa
        import pyarrow.compute as pc

        bounds = list_offsets(names).astype(np.int64)
        hits = pc.is_in(names.flatten(), value_set=pa.array(self._drawn_from, pa.string()))
        before = np.concatenate([[0], np.cumsum(hits.to_numpy(zero_copy_only=False))])
        first = np.minimum(bounds[:-1] + num_positives[: len(names)], bounds[1:])
        return before[bounds[1:]] - before[first]

    def _check_pools(self) -> None:
        wanted = self.num_negatives + (self._num_positives == 0)
        sizes = self._pool_sizes()
        empty = np.flatnonzero((wanted > 0) & (sizes == 0))
        if len(empty):
            among = "" if self._weights is None else f" from {', '.join(map(repr, self._drawn_from))}"
            raise InputError(
                f"{len(empty)} of {len(self)} rows have no candidates{among} to draw {self.num_negatives} negatives "
                f"from, for example query {self._query_id(empty[0])!r}",
                where=f"row {self.first_row + empty[0]}",
                cure="Mine negatives for these queries, drop the rows, or train with num_negatives 0",
            )
        few = np.flatnonzero(sizes < wanted)
        self.repeated = None
        if len(few):
            self.repeated = (
                f"{len(few):,} of {len(self):,} rows have fewer candidates than the {self.num_negatives} negatives of "
                f"an example, for example query {self._query_id(few[0])!r} with {sizes[few[0]]}; theirs are repeated. "
                "Mine more (--mine_negatives, --mine_depth) or lower --num_negatives."
            )

    def _query_id(self, row: int) -> str:
        return self.rows.queries.ids_at([int(self._query[row])])[0]

    @cached_property
    def max_positives(self) -> int:
        """The largest number of known positives of any row's query, by which a collator pads `positive_ids`."""
        most = int(self._num_positives.max(initial=0))
        if self.positives is None:
            return most
        return max([most, *(len(self._known_positives(row)) for row in range(len(self)))])

    def __len__(self) -> int:
        return len(self._query)

    def first_examples(self, number: int) -> list[Example]:
        """The examples of the first rows (at most `number`) in epoch 0, to look at before training."""
        return [self[row, 0] for row in range(min(number, len(self)))]

    def __getitem__(self, key: RowKey) -> Example:
        row, epoch = key
        documents = self.rows.documents_at(row)
        num_positives = int(self._num_positives[row])
        labelled = num_positives > 0
        stream = None
        if self.sampling == "random" or (self.positive == "random" and num_positives > 1):
            stream = random_stream(self.seed, epoch, self.first_row + row)
        places = np.empty(1 + self.num_negatives, np.int64)
        if labelled:
            places[0] = self._draw_positive(key, num_positives, stream)
        if len(places) > labelled:
            places[labelled:] = self._draw(key, num_positives, len(documents), len(places) - labelled, stream)
        return Example(
            row=self.first_row + int(row),
            query=int(self._query[row]),
            documents=documents[places],
            target=0 if labelled else -1,
            positives=self._known_positives(row),
            scores={name: self.rows.values_at(name, row)[places] for name in self.score_columns},
        )

    def _draw_positive(self, key: RowKey, num_positives: int, stream: np.random.Generator | None) -> int:
        if self.positive == "rotate":
            return (key[0] + self.seed + key[1]) % num_positives
        return int(stream.integers(num_positives)) if self.positive == "random" and num_positives > 1 else 0

    def _draw(self, key: RowKey, start: int, stop: int, count: int, stream: np.random.Generator | None) -> np.ndarray:
        """Positions in the row's list, all in `start:stop`: `int64[count]`."""
        row, epoch = key
        weights = self._document_weights(row, start)
        if self.sampling != "random":
            order = np.arange(stop - start) if weights is None else np.flatnonzero(weights)
            if self.sampling == "window":
                shuffled = order.tolist()
                # Seeded as in the released code, whose examples this draws.
                random.Random(int(row) + self.seed).shuffle(shuffled)
                order = np.roll(shuffled, -(epoch * count % len(shuffled)))
        elif weights is None:
            order = _smallest(stream.random(stop - start), count)
        else:
            # The exponential clocks of Efraimidis and Spirakis (2006): the first to ring is document i with
            # probability weight_i / sum of weights, and so on without replacement.
            candidates = np.flatnonzero(weights)
            clocks = stream.standard_exponential(stop - start)[candidates] / weights[candidates]
            order = candidates[_smallest(clocks, count)]
        return start + (order[:count] if len(order) >= count else np.resize(order, count))

    def _document_weights(self, row: int, start: int) -> np.ndarray | None:
        """Weight of every document of the pool: its group's share divided by the group's documents in the pool."""
        if self._weights is None:
            return None
        names = self.rows.values_at(SOURCES, row)[start:]
        weights = np.zeros(len(names))
        for group, weight in self._weights.items():
            here = np.isin(names, group)
            weights[here] = weight / max(int(here.sum()), 1)
        return weights

    def _known_positives(self, row: int) -> np.ndarray:
        own = self.rows.documents_at(row)[: self._num_positives[row]]
        if self.positives is None:
            return np.asarray(own, np.int64)
        known = self.positives.of(int(self._query[row]))
        # A mined row may hold a positive that the qrels lack (another split, a threshold); it counts all the same.
        return np.array(list(dict.fromkeys([*own.tolist(), *known.tolist()])), np.int64)


class EpochSampler(torch.utils.data.Sampler[RowKey]):
    """Yields `(row, epoch)` for every row once, in an order that is a function of the seed and the epoch.

    The epoch travels with the row, so workers that outlive an epoch draw the right negatives. Every process iterates
    the same sampler and takes its own batches from it (as accelerate's `BatchSamplerShard` does).

    Args:
        num_rows: Length of the dataset.
        seed: Of the order.
        shuffle: Without it, rows come in their own order.
    """

    def __init__(self, num_rows: int, seed: int = 0, shuffle: bool = True):
        self.num_rows, self.seed, self.shuffle, self.epoch = num_rows, seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration; trainers and accelerate call it at the start of each."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[RowKey]:
        epoch = self.epoch
        if not self.shuffle:
            yield from ((row, epoch) for row in range(self.num_rows))
            return
        order = random_stream(self.seed, epoch, 0, ORDER_STREAM).permutation(self.num_rows)
        for start in range(0, self.num_rows, _BLOCK_ROWS):
            yield from ((row, epoch) for row in order[start : start + _BLOCK_ROWS].tolist())


def _smallest(keys: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` smallest keys in ascending order (all of them where there are fewer)."""
    return np.argsort(keys, kind="stable")[:count]


def _check_column(rows: RowSet, name: str) -> None:
    if name not in rows.columns:
        has = ", ".join(map(repr, rows.columns)) or "none"
        raise InputError(f"the row set has no column {name!r}", where="row set", cure=f"Its columns are: {has}")


def _check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{value!r} is not one of {', '.join(map(repr, choices))}", where=option)
