"""Teleportation negatives (ANCE-Tele, Sun et al. 2022, https://arxiv.org/abs/2210.17167): the negatives of an episode.

The pool of episode e, where the miner is the model of the episode before (in the first one the pretrained model):

    ANN_e(q) = n of the nearest passages of q;    LA_e(q) = n of the nearest passages of q's positive ("lookahead")
    T_e(q)   = T_{e-1}(q) + ANN_e(q) + LA_e(q)    ("momentum"; lists are put together and keep duplicates)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..console import get_logger, progress
from ..data.answers import AnswerMatcher
from ..data.qrels import Qrels
from ..data.rows import RowSet
from ..data.run import Run
from ..data.schema import SOURCE_GROUPS, SOURCES
from ..data.tables import Queries
from ..errors import InputError
from .encode import as_inference_model, encode_table, model_identity
from .index import EXACT, Index
from .mining import mine
from .pools import concatenate_pools
from .searching import cosine_of_raw_vectors, read_search, run_search, search
from .shards import ShardedJob, default_shard_rows, digest


if TYPE_CHECKING:
    from ..data import Collection

logger = get_logger(__name__)

# Raised by hand when the same key would give other neighbours.
TELEPORT_VERSION = 1

QUERY, POSITIVE = "query", "positive"
# By which weights in training name the sources of an episode: its own two, and all of the pool before.
LOOKAHEAD, MOMENTUM = "lookahead", "momentum"

_SHARD_QUERIES = 8192
_BLOCK_QUERIES = 1024


@dataclass(frozen=True)
class EpisodeOptions:
    """How the pool of an episode is made; the defaults are those of the released code for MS MARCO.

    Args:
        depth: Passages retrieved by both searches.
        pool_depth: Only the first so many that remain without positives are drawn from; None for all.
        query_negatives: Drawn from the neighbours of the query; 0 leaves them out.
        positive_negatives: Drawn from the neighbours of the positive; 0 leaves them out.
        momentum: Keep the pool of the episode before.
        keep_queries: Whose queries and positives a pool with momentum has: those of the `"previous"` pool, or those
            mined `"now"`.
        threshold: The lowest grade of a positive.
        seed: Of the draws, together with the episode, the source and the query.
    """

    depth: int = 200
    pool_depth: int | None = None
    query_negatives: int = 30
    positive_negatives: int = 30
    momentum: bool = True
    keep_queries: str = "previous"
    threshold: int = 1
    seed: int = 42

    def __post_init__(self) -> None:
        def refuse(problem: str, name: str, cure: str) -> None:
            raise InputError(problem, where=f"episode option {name!r}", cure=cure)

        if self.depth < 1:
            refuse(f"depth is {self.depth}", "depth", "Retrieve one passage at least")
        if self.pool_depth is not None and self.pool_depth < 1:
            refuse(f"{self.pool_depth} passages", "pool_depth", "Draw from one at least, or None for all")
        if min(self.query_negatives, self.positive_negatives) < 0:
            refuse("a negative number", "query_negatives, positive_negatives", "Use 0 or more")
        if not self.query_negatives and not self.positive_negatives:
            refuse("no negatives from either source", "query_negatives", "Ask for one at least")
        if self.keep_queries not in ("previous", "now"):
            refuse(f"{self.keep_queries!r} is not a choice", "keep_queries", "Use previous or now")

    @property
    def groups(self) -> list[str]:
        """Names for the sources of every pool, by which weights in training name them."""
        counts = {QUERY: self.query_negatives, LOOKAHEAD: self.positive_negatives, MOMENTUM: int(self.momentum)}
        return [name for name, count in counts.items() if count]


@dataclass
class Episode:
    """What the mining of an episode made.

    Attributes:
        number: From 1.
        rows: The pool; `sources` are `query@e` and `positive@e` with the episode e that a negative comes from, and
            `metadata["source_groups"]` says which of them are `query`, `lookahead` and `momentum` here.
        run: The neighbours of the queries: where the miner ranks the positives, for [`positive_ranks`].
        report: Counts, for the provenance card.
    """

    number: int
    rows: RowSet
    run: Run
    report: dict[str, Any] = field(default_factory=dict)


def mine_episode(
    retriever: Any,
    collection: Collection,
    split: str,
    number: int,
    *,
    previous: RowSet | None = None,
    options: EpisodeOptions | None = None,
    answers: Mapping[int, Sequence[str]] | None = None,
    query_positions: Sequence[int] | np.ndarray | None = None,
    factory: str = EXACT,
    dtype: str = "auto",
    token_budget: int | None = None,
    storage: str = "float32",
    device: Any = None,
    cache_dir: str | os.PathLike | None = None,
) -> Episode:
    """Mines the pool of one episode. Under accelerate all processes must call this, and get the same pool.

    Vectors, searches and pools are kept in the cache under keys of weights, texts and settings: killed at any moment
    and called again, it goes on and gives the same.

    Args:
        retriever: The miner: a model or `"bm25"`. The neighbours of a positive are found by its own passage vector
            where the retriever has one, else with its text as the query.
        collection: The collection.
        split: Whose queries to mine for.
        number: The episode, from 1.
        previous: The pool of the episode before, for momentum.
        options: See [`EpisodeOptions`].
        answers: For questions that are judged by answers, the answers of each query position: a passage with an
            answer in it (its title does not count) is no negative, and a query without judgements gets the first such
            passage among its neighbours as its positive.
        query_positions: Only these queries.
        factory: The index.
        dtype: Precision of encoding.
        token_budget: Tokens of a batch.
        storage: Precision of stored embeddings.
        device: Where to run.
        cache_dir: Instead of the default cache folder.

    Raises:
        InputError: If the depth exceeds the corpus, the previous pool is missing, of another episode or of other data,
            or no query keeps a negative.
    """
    options = options or EpisodeOptions()
    _check(collection, number, previous, options)
    settings = {"factory": factory, "dtype": dtype, "token_budget": token_budget, "storage": storage}
    settings |= {"device": device, "cache_dir": cache_dir}
    miner = _Miner(retriever, collection, options.depth, settings)
    queries = _queries(collection, split, options.threshold, answers, query_positions)
    found = _neighbours(miner, collection, split, queries, options.threshold, answers)
    parts = _draw_parts(found, split, number, options, answers, cache_dir)
    kept = previous if options.momentum else None
    rows = concatenate_pools(_in_order(parts, kept, options.keep_queries), cache_dir=cache_dir)
    groups = {part.group: [part.name] for part in parts}
    if options.momentum:
        groups[MOMENTUM] = [] if kept is None else _sources(kept)
    report = {
        "episode": number,
        "miner": miner.identity,
        "split": split,
        **asdict(options),
        "answers": answers is not None,
        "queries": len(found.queries),
        "rows": len(rows),
        "negatives": int((rows.lengths - rows.num_positives).sum()),
        "sources": {part.name: part.counts for part in parts},
        "previous": None if kept is None else kept.metadata.get("teleport"),
    }
    rows.metadata[SOURCE_GROUPS] = groups
    rows.metadata["teleport"] = report
    logger.info(
        "episode %d: %s queries, %s negatives%s",
        number,
        f"{len(rows):,}",
        f"{report['negatives']:,}",
        f", {len(rows) - len(found.queries):+,} queries against those mined now"
        if len(rows) != len(found.queries)
        else "",
    )
    return Episode(number, rows, found.run, report)


def first_positives(qrels: Qrels, queries: np.ndarray, threshold: int = 1) -> np.ndarray:
    """The anchor of each query's lookahead: its first positive in the order of the judgements, `int64[n]`."""
    relevant = np.flatnonzero(qrels.relevance >= threshold)
    found, first = np.unique(qrels.query[relevant], return_index=True)
    slots = np.minimum(np.searchsorted(found, queries), max(len(found) - 1, 0))
    if not len(found) or (found[slots] != queries).any():
        raise InputError("a query has no positive", where="lookahead", cure="Mine for queries with a positive")
    return qrels.document[relevant[first[slots]]]


def without(run: Run, dropped: np.ndarray) -> Run:
    """A run without some of its documents; those behind move up.

    Args:
        run: The run.
        dropped: `bool[n, k]`.
    """
    order = np.argsort(dropped, axis=1, kind="stable")
    gone = np.take_along_axis(dropped, order, 1)
    documents = np.where(gone, -1, np.take_along_axis(run.documents, order, 1))
    scores = np.where(gone, -np.inf, np.take_along_axis(run.scores, order, 1))
    return Run(run.query, documents, scores)


def answer_mask(run: Run, collection: Collection, answers: Mapping[int, Sequence[str]]) -> np.ndarray:
    """Which documents of a run hold an answer of their query, `bool[n, k]`; titles do not count."""
    mask = np.zeros(run.documents.shape, dtype=bool)
    bar = progress(total=len(run), label="match answers", unit="query")
    for start in range(0, len(run), _BLOCK_QUERIES):
        documents = run.documents[start : start + _BLOCK_QUERIES]
        known = np.unique(documents[documents >= 0])
        texts = collection.corpus.texts(known, "{text}")
        for row, listed in enumerate(documents, start):
            matches = AnswerMatcher(answers.get(int(run.query[row]), ()))
            slots = np.searchsorted(known, listed)
            mask[row] = [one >= 0 and matches(texts[slot]) for one, slot in zip(listed.tolist(), slots.tolist())]
        bar.update(len(documents))
    bar.close()
    return mask


def _answered_qrels(qrels: Qrels, run: Run, answered: np.ndarray, threshold: int) -> Qrels:
    """Judgements, with the first passage that holds an answer for a query that has none."""
    judged = np.isin(run.query, qrels.query_positions(threshold))
    rows = np.flatnonzero(~judged & answered.any(axis=1))
    best = run.documents[rows, answered[rows].argmax(axis=1)]
    logger.info("%s of %s queries take a positive from their answers", f"{len(rows):,}", f"{len(run):,}")
    return Qrels(
        np.concatenate([qrels.query, run.query[rows]]),
        np.concatenate([qrels.document, best]),
        np.concatenate([qrels.relevance, np.full(len(rows), threshold)]),
    )


def _queries(
    collection: Collection,
    split: str,
    threshold: int,
    answers: Mapping[int, Sequence[str]] | None,
    query_positions: Sequence[int] | np.ndarray | None,
) -> np.ndarray:
    """Positions of the queries to mine for: those with a positive or with answers."""
    queries = collection.split(split).query_positions(threshold)
    if answers is not None:
        queries = np.union1d(queries, np.fromiter(answers, np.int64, len(answers)))
    if query_positions is not None:
        queries = np.intersect1d(queries, np.asarray(query_positions, np.int64))
    if not len(queries):
        raise InputError("no query to mine for", where=f"split {split!r}", cure="Give queries with a positive")
    return queries


@dataclass(frozen=True)
class _Neighbours:
    """What the negatives of an episode are drawn from.

    Attributes:
        collection: Its judgements give each of the queries a positive.
        queries: `int64[n]`.
        run: The nearest passages of the queries.
        around: The nearest passages of their positives.
        answered: Which of `run` hold an answer, `bool[n, k]`; None without answers.
    """

    collection: Collection
    queries: np.ndarray
    run: Run
    around: Run
    answered: np.ndarray | None = None


def _neighbours(
    miner: _Miner,
    collection: Collection,
    split: str,
    queries: np.ndarray,
    threshold: int,
    answers: Mapping[int, Sequence[str]] | None,
) -> _Neighbours:
    """Both searches; with answers the second has to wait for the positives that the first one finds."""
    qrels = collection.split(split)
    if answers is None:
        anchors = first_positives(qrels, queries, threshold)
        return _Neighbours(collection, queries, *miner.both(queries, anchors))
    run = miner.of_queries(queries)
    answered = answer_mask(run, collection, answers)
    qrels = _answered_qrels(qrels, run, answered, threshold)
    queries = np.intersect1d(queries, qrels.query_positions(threshold))
    around = miner.of_passages(queries, first_positives(qrels, queries, threshold))
    judged = replace(collection, qrels={**collection.qrels, split: qrels})
    return _Neighbours(judged, queries, run, around, answered)


@dataclass(frozen=True)
class _Part:
    """What one source gives to the pool of an episode.

    Attributes:
        group: By which weights in training name the source.
        name: Of the source, with the episode.
        rows: Its negatives.
        counts: How many, and what was removed from its results.
    """

    group: str
    name: str
    rows: RowSet
    counts: dict[str, int]


def _draw_parts(
    found: _Neighbours,
    split: str,
    number: int,
    options: EpisodeOptions,
    answers: Mapping[int, Sequence[str]] | None,
    cache_dir: Any,
) -> list[_Part]:
    """Draws from both searches, as many as the options say."""
    parts = []
    for source, group, run, count in (
        (QUERY, QUERY, found.run, options.query_negatives),
        (POSITIVE, LOOKAHEAD, found.around, options.positive_negatives),
    ):
        if not count:
            continue
        answered = None
        if answers is not None:
            # Matching reads every passage that was found: once for the queries' own.
            answered = found.answered if source == QUERY else answer_mask(run, found.collection, answers)
            run = without(run, answered)
        name = f"{source}@{number}"
        rows = _draw(run, found.collection, split, name, count, number, options, cache_dir)
        parts.append(_Part(group, name, rows, _counts(rows, answered)))
    return parts


def _counts(rows: RowSet, answered: np.ndarray | None) -> dict[str, int]:
    """What a source gave, and what was removed from its results."""
    mining = rows.metadata["mining"]
    counts = {name: mining[name] for name in ("negatives", "positives_removed", "seed")}
    return counts if answered is None else {**counts, "answers_removed": int(answered.sum())}


def _in_order(parts: list[_Part], previous: RowSet | None, keep_queries: str) -> list[RowSet]:
    """The pools to put together; the first one says which queries and positives the result has."""
    own = [part.rows for part in parts]
    if previous is None:
        return own
    return [previous, *own] if keep_queries == "previous" else [*own, previous]


def _sources(rows: RowSet) -> list[str]:
    """Where the negatives of a pool come from."""
    names: set[str] = set()
    for block in rows.blocks():
        names.update(block.column(SOURCES).combine_chunks().flatten().unique().to_pylist())
    return sorted(names - {POSITIVE})


def _check(collection: Collection, number: int, previous: RowSet | None, options: EpisodeOptions) -> None:
    where = f"episode {number}"
    if number < 1:
        raise InputError("episodes count from 1", where=where)
    if options.depth > len(collection.corpus):
        raise InputError(
            f"the depth is {options.depth}, and the corpus has {len(collection.corpus)} passages",
            where=where,
            cure="Lower the depth",
        )
    if number == 1 and previous is not None:
        raise InputError(
            "the first episode has no pool before it", where=where, cure="Leave out the previous pool, or count on"
        )
    if number > 1 and options.momentum and previous is None:
        raise InputError(
            "momentum needs the pool of the episode before", where=where, cure="Give it, or turn momentum off"
        )
    if previous is not None:
        made = previous.metadata.get("teleport", {}).get("episode")
        if made is not None and made != number - 1:
            raise InputError(
                f"the previous pool is that of episode {made}", where=where, cure=f"Give that of episode {number - 1}"
            )
        if previous.corpus.fingerprint != collection.corpus.fingerprint:
            raise InputError(
                "the previous pool was mined on another corpus",
                where=where,
                cure="Mine all episodes on one collection",
            )
        if previous.queries.fingerprint != collection.queries.fingerprint:
            raise InputError(
                "the previous pool was mined for other queries",
                where=where,
                cure="Mine all episodes on one collection",
            )


def _draw(
    run: Run,
    collection: Collection,
    split: str,
    source: str,
    count: int,
    number: int,
    options: EpisodeOptions,
    cache_dir: Any,
) -> RowSet:
    if options.pool_depth is not None:
        from .candidates import KnownPositives

        known = KnownPositives(collection, split, options.threshold)
        run = without(run, known.contains(run.query[:, None], run.documents)).cut(options.pool_depth)
    return mine(
        run,
        collection,
        split,
        depth=options.depth,
        num_negatives=count,
        sampling="random",
        # Another draw for each episode and source, the same one for each run of the recipe.
        seed=int(digest(np.array([options.seed, number]), np.frombuffer(source.encode(), np.uint8)), 16) % 2**31,
        threshold=options.threshold,
        source=source,
        cache_dir=cache_dir,
    )


class _Miner:
    """Finds the neighbours of queries and of passages."""

    def __init__(self, retriever: Any, collection: Collection, depth: int, settings: dict[str, Any]):
        self.collection, self.depth = collection, depth
        self.cache_dir = settings["cache_dir"]
        self.search = {name: settings[name] for name in ("factory", "storage", "device")}
        self.lexical = isinstance(retriever, str)
        if self.lexical:
            if retriever != "bm25":
                raise InputError(f"{retriever!r} is no retriever", where="episode", cure="Give a model, or bm25")
            self.identity: dict[str, Any] = {"name": "bm25"}
            return
        encoding = {name: settings[name] for name in ("dtype", "device", "token_budget")}
        self.model = as_inference_model(retriever, **encoding)
        self.identity = {"index": settings["factory"], "storage": settings["storage"], **model_identity(self.model)}

    @property
    def has_vectors(self) -> bool:
        return not self.lexical and self.model.model.representation == "dense"

    def both(self, queries: np.ndarray, anchors: np.ndarray) -> tuple[Run, Run]:
        """Neighbours of queries and of their anchors, in one pass over the index where there are vectors."""
        if self.has_vectors:
            found = self._pass(queries, [self._query_vectors(queries), self._passages().take(anchors)])
            return found[0], found[1]
        return self.of_queries(queries), self.of_passages(queries, anchors)

    def of_queries(self, queries: np.ndarray) -> Run:
        """Neighbours of queries."""
        if self.lexical:
            from .bm25 import bm25_search

            return bm25_search(self.collection, queries, self.depth, cache_dir=self.cache_dir)
        return search(self.model, self.collection, queries, self.depth, cache_dir=self.cache_dir, **self.search)

    def of_passages(self, queries: np.ndarray, anchors: np.ndarray) -> Run:
        """Neighbours of passages, each listed under its query."""
        if self.has_vectors:
            return self._pass(queries, [self._passages().take(anchors)])[0]
        texts = self.collection.corpus.texts(anchors)
        # Numbered, because one passage may be the anchor of several queries.
        stand_in = Queries.from_records([{"query_id": str(i), "text": text} for i, text in enumerate(texts)])
        anchored = replace(self.collection, queries=stand_in, qrels={})
        if self.lexical:
            from .bm25 import bm25_search

            found = bm25_search(anchored, np.arange(len(texts)), self.depth, cache_dir=self.cache_dir)
        else:
            found = search(self.model, anchored, None, self.depth, cache_dir=self.cache_dir, **self.search)
        return Run(queries[found.query], found.documents, found.scores)

    def _query_vectors(self, queries: np.ndarray) -> np.ndarray:
        table = self.collection.queries.select(queries)
        return encode_table(self.model, table, "query", cache_dir=self.cache_dir).rows(0, len(queries))

    def _passages(self) -> Any:
        return encode_table(
            self.model,
            self.collection.corpus,
            "passage",
            storage=self.search["storage"],
            cache_dir=self.cache_dir,
        )

    def _pass(self, queries: np.ndarray, sides: list[np.ndarray]) -> list[Run]:
        """One search for several vectors of each query: every block of the index is read once for all of them."""
        passages = self._passages()
        normalize = cosine_of_raw_vectors(self.model)
        # The vectors of a query stand side by side, so that a shard holds all of some queries.
        vectors = np.stack(sides, axis=1).reshape(len(queries) * len(sides), -1)
        rows = default_shard_rows(len(vectors), _SHARD_QUERIES)
        key = {
            "version": TELEPORT_VERSION,
            "vectors": passages.fingerprint,
            "searched": digest(vectors),
            "normalize": normalize,
            "k": self.depth,
            "factory": self.search["factory"],
            "shard_rows": rows,
        }
        job = ShardedJob.cached("search", key, -(-len(vectors) // rows), self.cache_dir)
        if not job.is_complete_for_all():
            index = Index.build(
                passages,
                self.search["factory"],
                normalize=normalize,
                device=self.search["device"],
                cache_dir=self.cache_dir,
            )
        run_search(
            job, rows, self.depth, lambda start, stop: index.search(vectors[start:stop], self.depth), len(vectors)
        )
        documents, scores = read_search(job)
        return [
            Run(queries, documents[side :: len(sides)], scores[side :: len(sides)]).sorted(self.collection.corpus)
            for side in range(len(sides))
        ]
