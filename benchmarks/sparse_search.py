"""Exact search of learned sparse vectors: the inverted index against sparse products, and how it grows."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .common import (
    PeakMemory,
    Report,
    alternate,
    arguments,
    mebibytes,
    ratios,
    say,
    scratch_folder,
    spread,
    timed,
)


TERMS = 30_000
DOCUMENT_TERMS, QUERY_TERMS = 123, 33
FLOATS, IMPACTS = "hf_distill, Flat", "hf_distill, Impact"
SCIPY, TOPN, PISA = "scipy CSR product", "sparse_dot_topn", "PISA, same impacts"
TARGET = 2.0
# The long search: shorter queries, so that it ends in minutes, in shards of this many.
SHORT_QUERY_TERMS, SHARD_QUERIES, LONG_DEPTH = 11, 16384, 100


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


def by_pisa(documents: Any, queries: Any, k: int, folder: Path, report: Report) -> Callable[[], Any] | None:
    """PISA, if it is installed."""
    from hf_distill.errors import InputError
    from hf_distill.retrieval.pisa import PisaIndex, check_pisa, write_pisa

    try:
        check_pisa()
    except InputError:
        return None
    start = time.perf_counter()
    write_pisa(folder, documents)
    report.note(f"{documents.shape[0]:,} passages, {PISA}: built in {time.perf_counter() - start:.1f} s")
    index = PisaIndex(folder, *documents.shape)
    return lambda: index.search(queries, k)


def long_search(index: Any, queries: int, folder: Path) -> str:
    """Very many queries as `search` takes them, a shard of results at a time: does it keep its speed and memory?"""
    from hf_distill.retrieval.searching import read_search, run_search
    from hf_distill.retrieval.shards import ShardedJob

    rates = []

    def find(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        block = learned_vectors(stop - start, SHORT_QUERY_TERMS, seed=start + 10)
        seconds, found = time.perf_counter(), index.search(block, LONG_DEPTH)
        rates.append((stop - start) / (time.perf_counter() - seconds))
        return found

    job = ShardedJob(folder, {"queries": queries}, -(-queries // SHARD_QUERIES))
    with PeakMemory() as searching:
        run_search(job, SHARD_QUERIES, LONG_DEPTH, find, queries)
    with PeakMemory() as reading:
        documents, _ = read_search(job)
    return (
        f"{len(documents):,} queries of {SHORT_QUERY_TERMS} terms over {len(index):,} passages, {LONG_DEPTH} found of "
        f"each: {spread(rates[:5])} queries/s in the first five shards, {spread(rates[-5:])} in the last; "
        f"{mebibytes(searching.bytes)} while searching, {mebibytes(reading.bytes)} for all results at the end"
    )


def build_indexes(documents: Any, report: Report) -> dict[str, Any]:
    """Our index over weights and over impacts; what they took is noted."""
    from hf_distill.retrieval import InvertedIndex

    indexes = {}
    for name, scale in ((FLOATS, None), (IMPACTS, 100)):
        start = time.perf_counter()
        with PeakMemory() as memory:
            indexes[name] = InvertedIndex.build(documents, scale)
        building = time.perf_counter() - start
        indexes[name].search(documents[:4], 10)  # compiled, or read from the disk
        report.note(
            f"{documents.shape[0]:,} passages, {name}: built in {building:.1f} s, "
            f"{mebibytes(indexes[name].num_bytes)}, {mebibytes(memory.bytes)} more at the most"
        )
    return indexes


def main() -> None:
    args = arguments(
        __doc__,
        passages=(100_000, "passages"),
        grown=(1_000_000, "passages of the larger collection"),
        queries=(500, "queries of a round"),
        depth=(1000, "results of a query"),
        rounds=(5, "rounds of the sides in turn"),
        many=(500_000, "queries of the long search"),
    )
    import torch

    queries = learned_vectors(args.queries, QUERY_TERMS, seed=1)
    report = Report(args, "Exact search of sparse vectors", ["passages", "engine", "queries/s"])
    seconds: dict[int, dict[str, list[float]]] = {}
    with scratch_folder("sparse_search") as folder:
        for passages in (args.passages, args.grown):
            say(f"sparse search, {passages:,} passages")
            documents = learned_vectors(passages, DOCUMENT_TERMS, seed=2)
            indexes = build_indexes(documents, report)
            contestants: dict[str, Callable[[], Any] | None] = {
                FLOATS: lambda index=indexes[FLOATS]: index.search(queries, args.depth),
                IMPACTS: lambda index=indexes[IMPACTS]: index.search(queries, args.depth),
                SCIPY: lambda documents=documents: by_scipy(documents, queries, args.depth),
                TOPN: by_topn(documents, queries, args.depth, torch.get_num_threads()),
            }
            if passages == args.passages:
                contestants[PISA] = by_pisa(documents, queries, args.depth, folder / "pisa", report)
            expected = by_scipy(documents, queries[:50], args.depth)[0]
            found = indexes[FLOATS].search(queries[:50], args.depth)[0]
            worst = float(np.abs(found / expected - 1).max())
            report.check(worst < 1e-5, f"scores of both sides differ by {worst:.1e} at the most")
            seconds[passages] = alternate(
                {name: lambda run=run: timed(run) for name, run in contestants.items() if run}, args.rounds
            )
            for name, one in seconds[passages].items():
                report.row(f"{passages:,}", name, spread([args.queries / value for value in one]))
            for name in (SCIPY, TOPN):
                if name in seconds[passages]:
                    faster = ratios(seconds[passages][FLOATS], seconds[passages][name])
                    report.claim(f"{FLOATS} against {name}, {passages:,} passages", faster, TARGET)
            if passages == args.passages:
                say(f"sparse search, {args.many:,} queries")
                report.note(long_search(indexes[IMPACTS], args.many, folder / "search"))
    growth = [b / a for a, b in zip(*(one[FLOATS] for one in seconds.values()))]
    report.note(
        f"{args.grown / args.passages:.0f} times the passages take {spread(growth, '{:.1f}')} times the seconds"
    )
    report.finish(
        f"{args.queries:,} queries of {QUERY_TERMS} terms, passages of {DOCUMENT_TERMS}, {TERMS:,} terms "
        f"(half a Zipf background, half the terms of one of 300 topics); the best {args.depth:,} of each query, "
        "exact on all sides. Peers that are not installed are left out."
    )


if __name__ == "__main__":
    main()
