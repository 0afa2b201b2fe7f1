"""Hard negatives: what a retriever finds and nobody called relevant."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..console import get_logger
from ..data.rows import RowSet
from ..data.run import Run
from ..errors import InputError
from ..models.base import RetrievalModel
from .candidates import Candidates, KnownPositives
from .encode import as_inference_model, model_identity
from .index import EXACT
from .inference import InferenceModel
from .score import score_pairs, score_rows
from .shards import digest


if TYPE_CHECKING:
    from ..data import Collection

logger = get_logger(__name__)

# Raised by hand when the same key would give other rows.
MINE_VERSION = 1

_HISTOGRAM_BINS = 20


@dataclass(frozen=True)
class MiningOptions:
    """Which of the retrieved documents become negatives.

    Args:
        depth: How many documents are retrieved for each query.
        window: First and last rank that negatives are taken from; ranks count from 1 and count positives too.
        num_negatives: At most so many for each query; None for all that remain.
        margin: A candidate must score at least this much below the query's lowest positive.
        relative_margin: The same as a share of the positive's score: 0.05 keeps candidates below 95 % of it.
        max_score: Candidates above this score are dropped.
        min_score: Candidates below this score are dropped.
        sampling: `"top"` takes the best that remain, `"random"` a sample that depends on the seed, the query's id and
            the documents only, not on the other queries.
        seed: Of the sample.
        threshold: The lowest grade that makes a document a positive.
        include_unlabelled: Whether queries without any positive in any split become rows without positives.
        too_few: What happens to queries with fewer than `num_negatives`: `"keep"`, `"drop"` or `"error"`. Queries
            without a single negative are dropped always.
    """

    depth: int = 200
    window: tuple[int, int] | None = None
    num_negatives: int | None = None
    margin: float | None = None
    relative_margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None
    sampling: str = "top"
    seed: int = 42
    threshold: int = 1
    include_unlabelled: bool = False
    too_few: str = "keep"

    def __post_init__(self):
        def refuse(problem: str, name: str, cure: str) -> None:
            raise InputError(problem, where=f"mining option {name!r}", cure=cure)

        if self.depth < 1:
            refuse(f"depth is {self.depth}", "depth", "Retrieve one document at least")
        first, last = self.window or (1, self.depth)
        if not 1 <= first <= last:
            refuse(f"{self.window} is not a window", "window", "Give the first and the last rank, counted from 1")
        if first > self.depth:
            refuse(
                f"it begins at rank {first}, below the depth of {self.depth}",
                "window",
                "Raise the depth or start the window earlier",
            )
        if self.num_negatives is not None and self.num_negatives < 1:
            refuse(f"{self.num_negatives} negatives", "num_negatives", "Ask for one at least, or None for all")
        if self.sampling not in ("top", "random"):
            refuse(f"{self.sampling!r} is not a sampling", "sampling", "Use top or random")
        if self.too_few not in ("keep", "drop", "error"):
            refuse(f"{self.too_few!r} is not a choice", "too_few", "Use keep, drop or error")
        if self.relative_margin is not None and not 0 <= self.relative_margin < 1:
            refuse(f"{self.relative_margin} is not a share", "relative_margin", "Use a number from 0 to below 1")

    @property
    def filters(self) -> bool:
        """Whether any candidate is dropped by its score."""
        return any(value is not None for value in (self.margin, self.relative_margin, self.max_score, self.min_score))


def mine(
    retriever: Run | RetrievalModel | InferenceModel | str,
    collection: Collection,
    split: str | None,
    *,
    options: MiningOptions | None = None,
    query_positions: Sequence[int] | np.ndarray | None = None,
    filter_teacher: RetrievalModel | InferenceModel | None = None,
    source: str | None = None,
    factory: str = EXACT,
    dtype: str = "auto",
    token_budget: int | None = None,
    storage: str = "float32",
    device: Any = None,
    cache_dir: str | os.PathLike | None = None,
    **overrides: Any,
) -> RowSet:
    """Rows of queries with their positives first and hard negatives behind.

    Every document that any split calls relevant for a query is removed by its position (and it is checked at the end
    that none came through). Under accelerate all processes must call this; the rows are the same on any number.

    Args:
        retriever: A run, a dense or lexical model, or `"bm25"`.
        collection: The collection.
        split: Whose queries and positives; None for unlabelled queries only.
        options: See [`MiningOptions`]; or give its fields as keyword arguments.
        query_positions: Only these queries.
        filter_teacher: A model that scores every candidate and positive, for margin and score limits to refer to
            instead of the retriever's scores; its scores stand in the column `scores`.
        source: The name of these negatives in the column `sources`; by default the retriever's.
        factory: The index, see [`search`].
        dtype: Precision of encoding and scoring.
        token_budget: Tokens of a batch.
        storage: Precision of stored embeddings.
        device: Where to run.
        cache_dir: Instead of the default cache folder.
        **overrides: Fields of [`MiningOptions`].

    Returns:
        Rows with the columns `sources` (`"positive"` or the source), `ranks` (0 where a positive was not retrieved),
        `retriever_scores`, and `scores` where there was a teacher. A positive that was not retrieved has a dense
        retriever's true score, or else the score of the query's last result, which is not below its own. How the rows
        were made, what was dropped, and a histogram of the margins between positives and negatives stand in
        `metadata["mining"]`.

    Raises:
        InputError: On options that cannot be met, or if no query keeps a negative.
    """
    options = _options(options, overrides)
    depth = options.depth
    if depth > len(collection.corpus):
        logger.warning("depth %d is more than the %d passages; using all of them", depth, len(collection.corpus))
        depth = len(collection.corpus)
    settings = {"dtype": dtype, "token_budget": token_budget, "device": device}
    queries = _queries(collection, split, query_positions, options, retriever)
    run, made_by, scorer = _retrieve(retriever, collection, queries, depth, factory, storage, cache_dir, settings)
    missing = len(queries) - len(run)
    if run.documents.shape[1] < depth:
        logger.info("the run has at most %d documents for a query", run.documents.shape[1])
    known = KnownPositives(collection, split, options.threshold)
    source = source or made_by["name"]
    first, last = options.window or (1, depth)
    candidates = Candidates(run, known, (first, min(last, depth)), scorer)
    teacher = teacher_scores = None
    if filter_teacher is not None:
        judge = as_inference_model(filter_teacher, **settings)
        teacher, teacher_scores = model_identity(judge), _judge(judge, candidates, collection, storage, cache_dir)
    masks, report = _choose(candidates, options, collection)
    report["queries_without_results"] = missing
    metadata = {
        "made_by": "mine",
        "collection": collection.name,
        "split": split,
        "mining": {
            "retriever": made_by,
            "source": source,
            "filter_teacher": teacher,
            **{**asdict(options), "depth": depth, "window": [first, min(last, depth)]},
            **report,
        },
    }
    if teacher is not None:
        metadata["teachers"] = {"scores": teacher}
    key = {"teacher": None if teacher_scores is None else digest(teacher_scores), "options": asdict(options)}
    rows = _rows(candidates, masks, collection, source, metadata, key, cache_dir)
    _log(report)
    return rows


def _options(options: MiningOptions | None, overrides: dict[str, Any]) -> MiningOptions:
    unknown = set(overrides) - {field.name for field in fields(MiningOptions)}
    if unknown:
        raise InputError(
            f"unknown options {sorted(unknown)}",
            where="mine",
            cure=f"Known are {', '.join(field.name for field in fields(MiningOptions))}",
        )
    values = {**(asdict(options) if options else {}), **overrides}
    if values.get("window") is not None:
        values["window"] = tuple(values["window"])
    return MiningOptions(**values)


def _queries(
    collection: Collection,
    split: str | None,
    query_positions: Sequence[int] | np.ndarray | None,
    options: MiningOptions,
    retriever: Any,
) -> np.ndarray:
    """Positions of the queries to mine for: those of the split, and unlabelled ones where asked for."""
    labelled = np.empty(0, np.int64)
    if split is not None:
        labelled = collection.split(split).query_positions(options.threshold)
    elif not options.include_unlabelled:
        raise InputError("no split", where="mine", cure="Name a split, or ask for unlabelled queries")
    wanted = labelled
    if options.include_unlabelled:
        # Only queries that no split judges: test queries must not be trained on, labelled or not.
        free = np.ones(len(collection.queries), dtype=bool)
        for qrels in collection.qrels.values():
            free[qrels.query] = False
        wanted = np.union1d(labelled, np.flatnonzero(free))
    if query_positions is not None:
        asked = np.unique(np.asarray(query_positions, dtype=np.int64))
        stray = np.setdiff1d(asked, wanted)
        if len(stray):
            raise InputError(
                f"{len(stray)} queries are not among those of split {split!r}, for example "
                f"{collection.queries.ids_at(stray[:1])[0]!r}",
                where="query_positions",
                cure="Give queries with a positive there, or unlabelled ones with include_unlabelled",
            )
        wanted = asked
    if isinstance(retriever, Run) and query_positions is None:
        # A run of some of the queries asks for those.
        wanted = np.intersect1d(wanted, retriever.query)
    if not len(wanted):
        raise InputError(
            "no query to mine for",
            where=f"split {split!r} of {collection.name}",
            cure="Give a run of this split's queries, or lower the threshold",
        )
    return wanted


def _retrieve(
    retriever: Any,
    collection: Collection,
    queries: np.ndarray,
    depth: int,
    factory: str,
    storage: str,
    cache_dir: Any,
    settings: dict[str, Any],
) -> tuple[Run, dict[str, Any], Any]:
    """The run, who made it, and what scores positives that it lacks."""
    if isinstance(retriever, Run):
        if not len(retriever):
            raise InputError("the run is empty", where="mine", cure="Give a run with results")
        order = np.argsort(retriever.query)
        slots = np.searchsorted(retriever.query[order], queries)
        slots = np.minimum(slots, len(order) - 1)
        found = order[slots][retriever.query[order][slots] == queries]
        run = Run(retriever.query[found], retriever.documents[found, :depth], retriever.scores[found, :depth])
        run = run.sorted(collection.corpus)
        return run, {"name": "run", "content": digest(run.query, run.documents, run.scores)}, None
    if isinstance(retriever, str):
        if retriever != "bm25":
            raise InputError(f"{retriever!r} is not a retriever", where="mine", cure="Give a model, a run, or bm25")
        from .bm25 import bm25_search

        return bm25_search(collection, queries, depth, cache_dir=cache_dir), {"name": "bm25"}, None
    from .searching import search

    inference = as_inference_model(retriever, **settings)
    run = search(inference, collection, queries, depth, factory=factory, storage=storage, cache_dir=cache_dir)
    identity = model_identity(inference)
    made_by = {"name": Path(identity["model"]).name, "index": factory, "storage": storage, **identity}

    def scorer(query: np.ndarray, document: np.ndarray) -> np.ndarray:
        return score_pairs(
            inference, collection.queries, collection.corpus, query, document, storage=storage, cache_dir=cache_dir
        )

    return run, made_by, scorer


def _judge(
    judge: InferenceModel, candidates: Candidates, collection: Collection, storage: str, cache_dir: Any
) -> np.ndarray:
    """Gives the candidates the scores of a teacher; they are returned too."""
    everything = _rows(candidates, candidates.masks(), collection, "candidate", {}, {"all": True}, cache_dir)
    judged = score_rows(judge, everything, column="scores", storage=storage, cache_dir=cache_dir)
    scores = np.concatenate(
        [block.column("scores").combine_chunks().flatten().to_numpy() for block in judged.blocks()]
    )
    candidates.judge(scores)
    return scores


def _choose(
    candidates: Candidates, options: MiningOptions, collection: Collection
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Packed masks of the chosen documents of every block, and what to report."""
    masks, margins = [], []
    counts = dict.fromkeys(
        ("positives_removed", "filtered_by_score", "queries_without_reference", "queries_with_too_few",
         "queries_without_negatives", "rows", "unlabelled_rows", "negatives"), 0,
    )  # fmt: skip
    for block in candidates.blocks():
        eligible = block.eligible
        counts["positives_removed"] += int(block.is_positive.sum())
        if options.filters:
            kept = eligible & block.passes(options)
            counts["filtered_by_score"] += int((eligible & ~kept).sum())
            counts["queries_without_reference"] += int((np.isnan(block.reference) & (block.num_positives > 0)).sum())
            eligible = kept
        chosen = _sample(block, eligible, options, collection)
        found = chosen.sum(axis=1)
        counts["queries_without_negatives"] += int((found == 0).sum())
        if options.num_negatives is not None:
            few = found < options.num_negatives
            counts["queries_with_too_few"] += int(few.sum())
            if few.any() and options.too_few == "error":
                row = int(np.argmax(few))
                raise InputError(
                    f"query {collection.queries.ids_at(block.query[row : row + 1])[0]!r} keeps {found[row]} negatives "
                    f"of the {options.num_negatives} asked for",
                    where="mine",
                    cure="Raise the depth, loosen the filter, ask for fewer, or set too_few to keep or drop",
                )
            if options.too_few == "drop":
                chosen &= ~few[:, None]
        if (chosen & block.is_positive).any():
            raise AssertionError("a positive came through as a negative")
        kept_rows = chosen.any(axis=1)
        counts["rows"] += int(kept_rows.sum())
        counts["unlabelled_rows"] += int((kept_rows & (block.num_positives == 0)).sum())
        counts["negatives"] += int(chosen.sum())
        margin = (block.reference[:, None] - block.judged)[chosen]
        margins.append(margin[np.isfinite(margin)].astype(np.float32))
        masks.append(np.packbits(chosen, axis=1))
    if not counts["rows"]:
        raise InputError(
            f"no query keeps a negative ({counts['positives_removed']} results were positives, "
            f"{counts['filtered_by_score']} were filtered out)",
            where="mine",
            cure="Raise the depth, widen the window or loosen the filter",
        )
    if counts["queries_with_too_few"]:
        logger.warning(
            "%s of %s queries have fewer than %d negatives",
            f"{counts['queries_with_too_few']:,}",
            f"{len(candidates):,}",
            options.num_negatives,
        )
    return masks, {**counts, "margins": _histogram(np.concatenate(margins))}


def _sample(block: Any, eligible: np.ndarray, options: MiningOptions, collection: Collection) -> np.ndarray:
    """The eligible documents that are taken, as a mask."""
    wanted = options.num_negatives
    if wanted is None or wanted >= eligible.shape[1]:
        return eligible.copy()
    if options.sampling == "top":
        return eligible & (np.cumsum(eligible, axis=1) <= wanted)
    # A number for each query and document, the lowest ones are taken: a pool that changes a little changes the sample
    # a little, and other queries do not matter.
    seeds = np.array(
        [_hash(options.seed, identifier) for identifier in collection.queries.ids_at(block.query)], dtype=np.uint64
    )
    luck = _mix(seeds[:, None] ^ _mix(block.documents.astype(np.uint64)))
    luck[~eligible] = np.iinfo(np.uint64).max
    best = np.argsort(luck, axis=1, kind="stable")[:, :wanted]
    chosen = np.zeros_like(eligible)
    np.put_along_axis(chosen, best, True, axis=1)
    return chosen & eligible


def _rows(
    candidates: Candidates,
    masks: list[np.ndarray],
    collection: Collection,
    source: str,
    metadata: dict[str, Any],
    key: Any,
    cache_dir: str | os.PathLike | None,
) -> RowSet:
    def batches() -> Iterator[dict[str, Any]]:
        for block, mask in zip(candidates.blocks(), masks):
            chosen = np.unpackbits(mask, axis=1, count=block.documents.shape[1]).astype(bool)
            rows = np.flatnonzero(chosen.any(axis=1))
            if len(rows):
                yield _batch(block, chosen, rows, source)

    full_key = {
        "version": MINE_VERSION,
        "kind": "mine",
        "run": digest(candidates.run.query, candidates.run.documents, candidates.run.scores),
        "positives": candidates.known.fingerprint,
        "positive_scores": candidates.fingerprint,
        "chosen": digest(*masks),
        "source": source,
        **key,
    }
    return RowSet.from_batches(
        collection.queries, collection.corpus, batches(), full_key, metadata=metadata, cache_dir=cache_dir
    )


def _batch(block: Any, chosen: np.ndarray, rows: np.ndarray, source: str) -> dict[str, Any]:
    """The arguments of `RowSet.from_arrays` for the rows of a block: positives first, then negatives by rank."""
    row_of_negative, column = np.nonzero(chosen)
    keep = np.isin(block.positive_row, rows)
    owner = np.concatenate([block.positive_row[keep], row_of_negative])
    order = np.argsort(owner, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(block.query))[rows])])
    offsets = pa.array(offsets, pa.int32())

    def lists(positive: np.ndarray, negative: np.ndarray, kind: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([positive[keep], negative])[order], kind))

    names = pa.DictionaryArray.from_arrays(
        pa.array((order >= keep.sum()).astype(np.int8)), pa.array(["positive", source])
    ).cast(pa.string())
    batch = {
        "query": block.query[rows],
        "documents": lists(block.positive_document, block.documents[chosen], pa.int64()),
        "num_positives": block.num_positives[rows],
        "sources": pa.ListArray.from_arrays(offsets, names),
        "ranks": lists(block.positive_rank, column + 1, pa.int32()),
        "retriever_scores": lists(block.positive_score, block.scores[chosen], pa.float32()),
    }
    if block.positive_judged is not None:
        batch["scores"] = lists(block.positive_judged, block.judged[chosen], pa.float32())
    return batch


def _log(report: Mapping[str, Any]) -> None:
    without = report["queries_without_negatives"]
    logger.info(
        "mined %s rows: %s negatives, %s positives removed from the results%s",
        f"{report['rows']:,}",
        f"{report['negatives']:,}",
        f"{report['positives_removed']:,}",
        f"; {without:,} queries had none left and are dropped" if without else "",
    )


def _histogram(margins: np.ndarray) -> dict[str, list]:
    if not len(margins):
        return {"edges": [], "counts": []}
    counts, edges = np.histogram(margins.astype(np.float64), bins=_HISTOGRAM_BINS)
    return {"edges": [round(float(edge), 6) for edge in edges], "counts": counts.tolist()}


def _hash(seed: int, identifier: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {identifier}".encode(), digest_size=8).digest(), "little")


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every bit of the input changes half of the output's."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
