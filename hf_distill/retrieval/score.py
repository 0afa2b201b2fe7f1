"""Scores of given query-passage pairs: a teacher's column of a row set, or a run in a new order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..console import get_logger
from ..data.run import Run
from ..errors import InputError
from ..models.base import RetrievalModel
from .encode import as_inference_model, encode_job, encode_table, model_identity
from .inference import InferenceModel
from .multi_vector import score_token_pairs
from .searching import HasTexts, cosine_of_raw_vectors
from .shards import ShardedJob, default_shard_rows, digest, working_folder, write_array
from .store import VectorStore


if TYPE_CHECKING:
    from ..data import Corpus, Queries, RowSet, TextTable

logger = get_logger(__name__)

# Raised by hand when the same key would give other scores.
SCORE_VERSION = 1

_SHARD_PAIRS = 16384
_BLOCK_NUMBERS = 2**24
_SPARSE_PAIRS = 65536
# How a row set's metadata calls who scored.
_KINDS = {"dense": "dense", "sparse": "lexical", "tokens": "multi-vector", "pair": "cross-encoder"}


def score_rows(
    model: RetrievalModel | InferenceModel,
    rows: RowSet,
    *,
    column: str = "scores",
    dtype: str = "auto",
    token_budget: int | None = None,
    storage: str = "float32",
    device: Any = None,
    cache_dir: str | os.PathLike | None = None,
) -> RowSet:
    """A row set with one more column: the model's score of every document of every row.

    A cross-encoder scores each distinct pair of a shard once, in length-sorted batches; shards are spread over
    accelerate's processes (all of which must call this), kept, and completed after a kill. A dense model scores by
    the inner product (or cosine) of its cached embeddings, without temperature.

    Args:
        model: The teacher.
        rows: The candidates.
        column: `"scores"` for the primary teacher, `"scores_<name>"` for others, `"retriever_scores"`.
        dtype: `"auto"`, `"float32"` or `"bfloat16"` arithmetic.
        token_budget: Most tokens of a batch, padding included.
        storage: Precision of a dense model's stored embeddings.
        device: Where to run.
        cache_dir: Instead of the default cache folder.

    Returns:
        The rows; who scored and how stands in `metadata["teachers"][column]`.
    """
    from ..data import schema

    if not schema.is_score_column(column):
        raise InputError(
            f"{column!r} is no column of scores", where="column", cure="Use scores or scores_<name of the teacher>"
        )
    inference = as_inference_model(model, dtype=dtype, device=device, token_budget=token_budget)
    lengths = rows.lengths
    scores = score_pairs(
        inference,
        rows.queries,
        rows.corpus,
        np.repeat(rows.query, lengths),
        flat_documents(rows),
        storage=storage,
        cache_dir=cache_dir,
    )
    kind = _KINDS[inference.representation]
    texts = {"queries_fingerprint": rows.queries.fingerprint, "corpus_fingerprint": rows.corpus.fingerprint}
    return rows.with_column(column, scores, kind=kind, **texts, **model_identity(inference))


def score_from_run(rows: RowSet, run: str | os.PathLike | Run, column: str = "scores") -> RowSet:
    """A row set with the scores of a TREC run, so that any system that writes one can teach.

    Args:
        rows: The candidates.
        run: A TREC file, or a run.
        column: The new column.

    Raises:
        InputError: If a document of a row has no score in the run; the message names query and document.
    """
    where = "run"
    if not isinstance(run, Run):
        where = str(run)
        run = Run.load_trec(run, rows.queries, rows.corpus)
    size = len(rows.corpus)
    present = run.documents >= 0
    keys = (run.query[:, None] * size + run.documents)[present]
    order = np.argsort(keys)
    keys, values = keys[order], run.scores[present][order]
    query, documents = np.repeat(rows.query, rows.lengths), flat_documents(rows)
    wanted = query * size + documents
    slots = np.minimum(np.searchsorted(keys, wanted), max(0, len(keys) - 1))
    missing = keys[slots] != wanted if len(keys) else np.ones(len(wanted), dtype=bool)
    if missing.any():
        first = int(np.argmax(missing))
        raise InputError(
            f"{int(missing.sum()):,} of {len(wanted):,} candidates have no score, for example document "
            f"{rows.corpus.ids_at(documents[first : first + 1])[0]!r} of query "
            f"{rows.queries.ids_at(query[first : first + 1])[0]!r}",
            where=where,
            cure="Let the run score every candidate of the rows, positives included, or mine the rows from the run",
        )
    return rows.with_column(column, values[slots], kind="run", run=where, content=digest(keys, values))


def rerank(
    model: RetrievalModel | InferenceModel,
    run: Run,
    collection: HasTexts,
    *,
    depth: int | None = None,
    dtype: str = "auto",
    token_budget: int | None = None,
    storage: str = "float32",
    device: Any = None,
    cache_dir: str | os.PathLike | None = None,
    keep: bool = True,
) -> Run:
    """A run's documents in the order of a model's scores.

    Args:
        model: Usually a cross-encoder; a dense model scores the candidates by its embeddings.
        run: The candidates.
        collection: Anything with the `queries` and the `corpus` of the run.
        depth: How many of each query's documents to score; the others are left out. All by default.
        dtype: `"auto"`, `"float32"` or `"bfloat16"` arithmetic.
        token_budget: Most tokens of a batch, padding included.
        storage: Precision of a dense model's stored embeddings.
        device: Where to run.
        cache_dir: Instead of the default cache folder.
        keep: False to leave nothing in the cache, for models that are still changing.
    """
    if depth is not None:
        run = run.cut(depth)
    present = run.documents >= 0
    scores = np.full(run.documents.shape, -np.inf, dtype=np.float32)
    if present.any():
        inference = as_inference_model(model, dtype=dtype, device=device, token_budget=token_budget)
        query = np.broadcast_to(run.query[:, None], present.shape)[present]
        with working_folder(cache_dir, keep) as folder:
            scores[present] = score_pairs(
                inference,
                collection.queries,
                collection.corpus,
                query,
                run.documents[present],
                storage=storage,
                cache_dir=folder,
            )
    return Run(run.query, run.documents, scores).sorted(collection.corpus)


def score_pairs(
    inference: InferenceModel,
    queries: Queries,
    corpus: Corpus,
    query: np.ndarray,
    document: np.ndarray,
    *,
    storage: str = "float32",
    cache_dir: str | os.PathLike | None = None,
) -> np.ndarray:
    """Scores `float32[n]` of the pairs of `query` and `document`, both `int64[n]` positions."""
    if inference.representation == "pair":
        return _score_by_reading(inference, queries, corpus, query, document, cache_dir)
    return _score_by_embeddings(inference, queries, corpus, query, document, storage, cache_dir)


def flat_documents(rows: RowSet) -> np.ndarray:
    """The documents of all rows one after the other, `int64[rows.lengths.sum()]`."""
    parts = [block.column("documents").combine_chunks().flatten().to_numpy() for block in rows.blocks()]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _score_by_reading(
    inference: InferenceModel,
    queries: Queries,
    corpus: Corpus,
    query: np.ndarray,
    document: np.ndarray,
    cache_dir: str | os.PathLike | None,
) -> np.ndarray:
    if not len(query):
        return np.empty(0, np.float32)
    size = default_shard_rows(len(query), _SHARD_PAIRS, 512)
    key = {
        "version": SCORE_VERSION,
        **inference.key(),
        "queries": queries.fingerprint,
        "corpus": corpus.fingerprint,
        "pairs": digest(query, document),
        "shard_pairs": size,
    }
    info = {"model": str(inference._source.name_or_path or ""), "texts": corpus.where}
    job = ShardedJob.cached("scores", key, -(-len(query) // size), cache_dir, info=info)

    def pairs(shard: int) -> tuple[list[str], list[str], np.ndarray]:
        part = slice(shard * size, (shard + 1) * size)
        unique, inverse = np.unique(query[part] * len(corpus) + document[part], return_inverse=True)
        return (
            _texts(queries, unique // len(corpus)),
            _texts(corpus, unique % len(corpus), inference.processor.template),
            inverse,
        )

    def write(shard: int, path: Path) -> None:
        questions, passages, inverse = pairs(shard)
        scores = inference.score(*inference.processor.pairs(questions, passages), job.advance)
        write_array(path, scores[inverse])

    sizes = [min(size, len(query) - shard * size) for shard in range(job.num_shards)]
    job.run(write, "score", sizes=sizes, unit="pair")
    return np.concatenate([np.load(path, allow_pickle=False) for path in job.paths()])


def _score_by_embeddings(
    inference: InferenceModel,
    queries: Queries,
    corpus: Corpus,
    query: np.ndarray,
    document: np.ndarray,
    storage: str,
    cache_dir: str | os.PathLike | None,
) -> np.ndarray:
    left, query = _vectors(inference, queries, query, "query", "float32", cache_dir)
    right, document = _vectors(inference, corpus, document, "passage", storage, cache_dir)
    if inference.representation == "tokens":
        return score_token_pairs(left, right, query, document, inference.device)
    cosine = cosine_of_raw_vectors(inference)
    scores = np.empty(len(query), dtype=np.float32)
    sparse = inference.representation == "sparse"
    size = _SPARSE_PAIRS if sparse else max(1024, _BLOCK_NUMBERS // left.dim)
    for start in range(0, len(query), size):
        part = slice(start, start + size)
        if sparse:
            product = left.take_sparse(query[part]).multiply(right.take_sparse(document[part]))
            scores[part] = product.sum(axis=1).A1
            continue
        a, b = left.take(query[part]), right.take(document[part])
        product = np.einsum("nd,nd->n", a, b)
        if cosine:
            product /= np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
        scores[part] = product
    return scores


def _vectors(
    inference: InferenceModel,
    table: TextTable,
    positions: np.ndarray,
    kind: str,
    storage: str,
    cache_dir: str | os.PathLike | None,
) -> tuple[VectorStore, np.ndarray]:
    """A store that has the vectors of `positions`, and where they are in it.

    The whole table is encoded if it is there already or if most of it is asked for; else only what is asked for.
    """
    used = np.unique(positions)
    whole = encode_job(inference, table, kind, storage=storage, cache_dir=cache_dir)[0].is_complete_for_all()
    if whole or 2 * len(used) >= len(table):
        return encode_table(inference, table, kind, storage=storage, cache_dir=cache_dir), positions
    logger.info("encoding the %s %s in use, of %s", f"{len(used):,}", table.noun, f"{len(table):,}")
    store = encode_table(inference, table.select(used), kind, storage=storage, cache_dir=cache_dir)
    return store, np.searchsorted(used, positions)


def _texts(table: TextTable, positions: np.ndarray, template: str | None = None) -> list[str]:
    """Texts at positions that repeat: each is fetched once."""
    unique, inverse = np.unique(positions, return_inverse=True)
    texts = table.texts(unique, template=template)
    return [texts[number] for number in inverse.tolist()]
