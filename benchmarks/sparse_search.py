"""Exact search of learned sparse vectors: the inverted index against sparse products, and how it grows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .common import PeakMemory, Report, alternate, arguments, mebibytes, ratios, say, spread, timed


TERMS = 30_000
DOCUMENT_TERMS, QUERY_TERMS = 123, 33
FLOATS, IMPACTS, SCIPY, TOPN = "hf_distill, Flat", "hf_distill, Impact", "scipy CSR product", "sparse_dot_topn"
TARGET = 2.0


def learned_vectors(rows: int, nonzeros: int, seed: int) -> Any:
    """Vectors like SPLADE's: a background of frequent terms, and terms of one of 300 topics.

    Returns:
        `scipy.sparse.csr_matrix[rows, TERMS]` of float32.
    """
    from scipy.sparse import csr_matrix

    shared = np.random.default_rng(0)
    topics = shared.integers(0, TERMS, (300, 400))
    generator = np.random.default_rng(seed)
    background = nonzeros // 2
    frequent = np.minimum((TERMS ** generator.random((rows, background))).astype(np.int64), TERMS - 1)
    # Rank and number of a term have nothing to do with each other in a vocabulary.
    frequent = shared.permutation(TERMS)[frequent]
    own = topics[generator.integers(0, 300, rows)[:, None], generator.integers(0, 400, (rows, nonzeros - background))]
    terms = np.concatenate([frequent, own], axis=1)
    weights = generator.gamma(2.0, 0.4, terms.shape).astype(np.float32)
    matrix = csr_matrix((weights.ravel(), terms.ravel(), np.arange(0, terms.size + 1, nonzeros)), (rows, TERMS))
    matrix.sum_duplicates()
    return matrix


def by_scipy(documents: Any, queries: Any, k: int, block: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """The ordinary way: a sparse product for some queries at a time, and a partial sort."""
    transposed = documents.T.tocsr()
    scores, places = [], []
    for start in range(0, queries.shape[0], block):
        dense = (queries[start : start + block] @ transposed).toarray()
        best = np.argpartition(-dense, k - 1, axis=1)[:, :k]
        found = np.take_along_axis(dense, best, 1)
        order = np.argsort(-found, axis=1)
        scores.append(np.take_along_axis(found, order, 1))
        places.append(np.take_along_axis(best, order, 1))
    return np.concatenate(scores), np.concatenate(places)


def by_topn(documents: Any, queries: Any, k: int, threads: int) -> Callable[[], Any] | None:
    """sparse_dot_topn, if it is installed."""
    try:
        from sparse_dot_topn import sp_matmul_topn
    except ImportError:
        return None
    transposed = documents.T.tocsr()
    return lambda: sp_matmul_topn(queries, transposed, top_n=k, n_threads=threads, sort=True)


def main() -> None:
    args = arguments(
        __doc__,
        passages=(100_000, "passages"),
        grown=(1_000_000, "passages of the larger collection"),
        queries=(1000, "queries of a round"),
        depth=(1000, "results of a query"),
        rounds=(5, "rounds of the sides in turn"),
    )
    import torch

    from hf_distill.retrieval import InvertedIndex

    queries = learned_vectors(args.queries, QUERY_TERMS, seed=1)
    report = Report(args, "Exact search of sparse vectors", ["passages", "engine", "queries/s"])
    seconds: dict[str, list[float]] = {}
    for passages in (args.passages, args.grown):
        say(f"sparse search, {passages:,} passages")
        documents = learned_vectors(passages, DOCUMENT_TERMS, seed=2)
        indexes = {}
        for name, scale in ((FLOATS, None), (IMPACTS, 100)):
            start = time.perf_counter()
            with PeakMemory() as memory:
                indexes[name] = InvertedIndex.build(documents, scale)
            building = time.perf_counter() - start
            indexes[name].search(queries[:4], 10)  # compiled, or read from the disk
            report.note(
                f"{passages:,} passages, {name}: built in {building:.1f} s, {mebibytes(indexes[name].num_bytes)}, "
                f"{mebibytes(memory.bytes)} more at the most"
            )
        contestants = {
            name: lambda index=index: timed(lambda: index.search(queries, args.depth))
            for name, index in indexes.items()
        }
        if passages == args.passages:
            contestants[SCIPY] = lambda documents=documents: timed(lambda: by_scipy(documents, queries, args.depth))
            if (run := by_topn(documents, queries, args.depth, torch.get_num_threads())) is not None:
                contestants[TOPN] = lambda run=run: timed(run)
            expected = by_scipy(documents, queries[:50], args.depth)[0]
            found = indexes[FLOATS].search(queries[:50], args.depth)[0]
            worst = float(np.abs(found / expected - 1).max())
            report.check(worst < 1e-5, f"scores of both sides differ by {worst:.1e} at the most")
        found_seconds = alternate(contestants, args.rounds)
        for name, one in found_seconds.items():
            report.row(f"{passages:,}", name, spread([args.queries / value for value in one]))
        if passages == args.passages:
            seconds = found_seconds
        else:
            growth = [b / a for a, b in zip(seconds[FLOATS], found_seconds[FLOATS])]
            size = args.grown / args.passages
            report.note(f"{size:.0f} times the passages take {spread(growth, '{:.1f}')} times the seconds")
    for name in (SCIPY, TOPN):
        if name in seconds:
            report.claim(f"{FLOATS} against {name}", ratios(seconds[FLOATS], seconds[name]), TARGET)
    report.finish(
        f"{args.queries:,} queries of {QUERY_TERMS} terms, passages of {DOCUMENT_TERMS}, {TERMS:,} terms "
        f"(half a Zipf background, half the terms of one of 300 topics); the best {args.depth:,} of each query, "
        "exact on all sides."
    )


if __name__ == "__main__":
    main()
