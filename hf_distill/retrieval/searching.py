"""Search of a whole corpus with a retriever of any kind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..data.run import Run
from ..errors import InputError
from ..models.base import RetrievalModel
from .encode import as_inference_model, encode_table, encode_texts
from .index import EXACT, Index, empty_index
from .inference import InferenceModel
from .inverted import InvertedIndex, parse_factory
from .multi_vector import TokenIndex
from .pisa import PisaIndex, check_pisa, is_pisa
from .plaid import check_plaid, is_plaid
from .shards import ShardedJob, default_shard_rows, working_folder, write_array


if TYPE_CHECKING:
    from ..data import Corpus, Queries

# Raised by hand when the same key would give another run.
SEARCH_VERSION = 1

_SHARD_QUERIES = 16384


class HasTexts(Protocol):
    """A collection, as far as searching needs one."""

    queries: Queries
    corpus: Corpus


def search(
    model: RetrievalModel | InferenceModel,
    collection: HasTexts,
    query_positions: Sequence[int] | np.ndarray | None = None,
    k: int = 100,
    *,
    factory: str = EXACT,
    search_options: str | None = None,
    dtype: str = "auto",
    token_budget: int | None = None,
    storage: str = "float32",
    device: Any = None,
    cache_dir: str | os.PathLike | None = None,
    keep: bool = True,
) -> Run:
    """The k best documents of each query.

    Embeddings, index and results are computed in shards, spread over accelerate's processes (all of which must call
    this), and kept in the cache under keys of weights, texts and settings, so that the second time nothing is
    computed. Memory does not grow with the corpus.

    Args:
        model: The model.
        collection: Anything with `queries` and `corpus`.
        query_positions: `int[n]`, the queries to search for; all by default.
        k: How many documents; the run is narrower if the corpus has fewer.
        factory: `"Flat"` (exact); for a dense model any factory string of FAISS, for a lexical one `"Impact"` or
            `"Pisa"`; for a multi-vector model a factory string of FAISS for an index over tokens, or `"Plaid"`, which
            finds the passages that exact MaxSim then ranks.
        search_options: FAISS parameters of searching, for example `"nprobe=32"`.
        dtype: Precision of encoding.
        token_budget: Tokens of an encoding batch.
        storage: Precision of stored embeddings, `"float32"` or `"float16"`; token vectors are always kept in float16.
        device: Where to run.
        cache_dir: Instead of the default cache folder.
        keep: False to leave nothing in the cache, for models that are still changing.
    """
    if k < 1:
        raise InputError(f"k is {k}", where="search", cure="Ask for one document at least")
    inference = as_inference_model(model, dtype=dtype, device=device, token_budget=token_budget)
    query = _all_or(query_positions, collection.queries)
    width = min(k, len(collection.corpus))
    if not len(query):
        return Run(query, np.empty((0, width), np.int64), np.empty((0, width), np.float32))
    with working_folder(cache_dir, keep) as folder:
        queries = encode_table(inference, _selected(collection.queries, query), "query", cache_dir=folder)
        if inference.representation == "tokens":
            storage = "float16"  # hundreds of vectors a passage
        vectors = encode_table(inference, collection.corpus, "passage", storage=storage, cache_dir=folder)
        rows = default_shard_rows(len(query), _SHARD_QUERIES)
        key = {
            "version": SEARCH_VERSION,
            "queries": queries.fingerprint,
            "vectors": vectors.fingerprint,
            "normalize": inference.representation == "dense" and cosine_of_raw_vectors(inference),
            "k": width,
            "factory": factory,
            "options": search_options,
            "shard_rows": rows,
        }
        job = ShardedJob.cached("search", key, -(-len(query) // rows), folder)
        if not job.is_complete_for_all():
            index = build_index(
                vectors, inference, factory, device=device, search_options=search_options, cache_dir=folder
            )
        run_search(job, rows, width, lambda start, stop: index.search(queries.rows(start, stop), width), len(query))
        documents, scores = read_search(job)
    return Run(query, documents, scores).sorted(collection.corpus)


class Searcher:
    """A corpus that answers single questions: model and index stay in memory between them.

    Args:
        model: A dense or lexical model, or `"bm25"`.
        corpus: The passages.
        factory: `"Flat"` (exact); for a dense model any factory string of FAISS, for a lexical one `"Impact"`.
        dtype: Precision of encoding.
        token_budget: Tokens of an encoding batch.
        storage: Precision of stored embeddings.
        device: Where to run.
        cache_dir: Instead of the default cache folder.
    """

    def __init__(
        self,
        model: RetrievalModel | InferenceModel | str,
        corpus: Corpus,
        *,
        factory: str = EXACT,
        dtype: str = "auto",
        token_budget: int | None = None,
        storage: str = "float32",
        device: Any = None,
        cache_dir: str | os.PathLike | None = None,
    ):
        self._bm25 = None
        if isinstance(model, str):
            if model != "bm25":
                raise InputError(f"{model!r} is not a model", where="Searcher", cure="Give a model, or bm25")
            from .bm25 import BM25Index

            self._bm25 = BM25Index(corpus, cache_dir=cache_dir)
            return
        self._model = as_inference_model(model, dtype=dtype, device=device, token_budget=token_budget)
        if self._model.representation == "tokens":
            storage = "float16"
        store = encode_table(self._model, corpus, "passage", storage=storage, cache_dir=cache_dir)
        self._index = build_index(store, self._model, factory, device=device, cache_dir=cache_dir)

    def __call__(self, question: str, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """Scores `float32[m]`, descending, and positions `int64[m]` of the m <= k best passages."""
        if self._bm25 is not None:
            scores, positions = self._bm25.search([question], k)
        else:
            scores, positions = self._index.search(encode_texts(self._model, [question], "query"), k)
        found = positions[0] >= 0
        return scores[0][found], positions[0][found]


def build_index(
    vectors: Any,
    model: RetrievalModel | InferenceModel,
    factory: str = EXACT,
    *,
    device: Any = None,
    search_options: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Index | InvertedIndex | PisaIndex | TokenIndex:
    """The index that suits a model's vectors.

    Args:
        vectors: A store or array of the passages' vectors.
        model: Who made them.
        factory: See [`search`].
        device: Where a dense model's index searches.
        search_options: FAISS parameters of searching.
        cache_dir: Instead of the default cache folder.
    """
    if model.representation == "sparse":
        engine = PisaIndex if is_pisa(factory) else InvertedIndex
        return engine.build(vectors, parse_factory(factory), cache_dir=cache_dir)
    if model.representation == "tokens":
        where = model.device if device is None else device
        return TokenIndex(vectors, factory, device=where, search_options=search_options, cache_dir=cache_dir)
    return Index.build(
        vectors,
        factory,
        normalize=cosine_of_raw_vectors(model),
        device=device,
        search_options=search_options,
        cache_dir=cache_dir,
    )


def check_factory(model: RetrievalModel, factory: str) -> None:
    """Raises [`InputError`] for an index that does not suit a model, before any work."""
    if model.representation == "sparse":
        parse_factory(factory)
        if is_pisa(factory):
            check_pisa()
    elif model.representation == "tokens" and is_plaid(factory):
        check_plaid(factory, width=model.token_size, normalized=model.config.normalize)
    elif factory != EXACT and model.representation != "pair":
        empty_index(factory, model.token_size if model.representation == "tokens" else model.embedding_size)


def cosine_of_raw_vectors(model: RetrievalModel | InferenceModel) -> bool:
    """Whether a model is compared by cosine while its vectors have any length."""
    config = (model._source if isinstance(model, InferenceModel) else model).config
    return config.similarity == "cosine" and not config.normalize


def run_search(job: ShardedJob, rows: int, width: int, find: Any, total: int) -> None:
    """Runs `find(start, stop)` for shards of `rows` queries and writes their scores and positions.

    A shard is one array `int32[n, 3, k]` in one atomic file: the bits of the scores, then the positions in two halves.
    """

    def write(shard: int, path: Path) -> None:
        start, stop = shard * rows, min((shard + 1) * rows, total)
        scores, positions = find(start, stop)
        packed = np.full((stop - start, 3, width), -1, dtype=np.int32)
        packed[:, 0] = np.float32(-np.inf).view(np.int32)
        packed[:, 0, : scores.shape[1]] = np.ascontiguousarray(scores, np.float32).view(np.int32)
        packed[:, 1, : scores.shape[1]] = positions >> 31
        packed[:, 2, : scores.shape[1]] = np.where(positions < 0, -1, positions & 0x7FFFFFFF)
        write_array(path, packed)

    sizes = [min(rows, total - shard * rows) for shard in range(job.num_shards)]
    job.run(write, "search", sizes=sizes, unit="query")


def read_search(job: ShardedJob) -> tuple[np.ndarray, np.ndarray]:
    """Documents `int64[n, k]` and scores `float32[n, k]` of all shards of `run_search`."""
    shards = [np.load(path, mmap_mode="r", allow_pickle=False) for path in job.paths()]
    # Filled shard by shard: half a million queries have results of gigabytes, which are held once.
    shape = (sum(len(shard) for shard in shards), shards[0].shape[2])
    documents, scores = np.empty(shape, np.int64), np.empty(shape, np.float32)
    start = 0
    for packed in shards:
        rows = slice(start, start + len(packed))
        scores[rows] = np.ascontiguousarray(packed[:, 0]).view(np.float32)
        high, low = packed[:, 1].astype(np.int64), packed[:, 2].astype(np.int64)
        documents[rows] = np.where(low < 0, -1, (high << 31) | low)
        start = rows.stop
    return documents, scores


def _all_or(positions: Sequence[int] | np.ndarray | None, queries: Queries) -> np.ndarray:
    query = np.arange(len(queries)) if positions is None else np.asarray(positions, dtype=np.int64)
    if len(np.unique(query)) != len(query):
        raise InputError("a query is listed twice", where="query_positions", cure="Give every query once")
    return query


def _selected(queries: Queries, positions: np.ndarray) -> Queries:
    whole = len(positions) == len(queries) and (positions == np.arange(len(queries))).all()
    return queries if whole else queries.select(positions)
