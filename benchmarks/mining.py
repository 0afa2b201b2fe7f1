"""Mining of hard negatives: seconds and peak memory against `mine_hard_negatives`, and memory as a corpus grows."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from .common import (
    PeakMemory,
    Report,
    arguments,
    dense_model,
    in_own_process,
    mebibytes,
    open_collection,
    peer_model,
    ratios,
    say,
    scratch_folder,
    spread,
    tell,
    write_vectors,
)


NEGATIVES, DEPTH = 10, 100
WIDTH = 384
OURS, PEER, PEER_FAISS, INDEX = "hf_distill", "sentence-transformers", "sentence-transformers, FAISS", "index"


def task(args: Any) -> tuple[Any, np.ndarray]:
    """The collection cut to the wanted number of passages, and the queries to mine for."""
    from hf_distill.data import Collection, Qrels

    whole = open_collection("squad", args.data, args.passages)
    qrels = whole.qrels["train"]
    generator = np.random.default_rng(0)
    size = min(args.passages, len(whole.corpus))
    queries = np.sort(generator.choice(qrels.query_positions(), min(args.queries, len(qrels.query)), replace=False))
    chosen = qrels.subset(queries)
    needed = np.unique(chosen.document)
    others = generator.permutation(np.setdiff1d(np.arange(len(whole.corpus)), needed))[: max(0, size - len(needed))]
    corpus = np.sort(np.concatenate([needed, others]))
    local = Qrels(chosen.query, np.searchsorted(corpus, chosen.document), chosen.relevance)
    return Collection(whole.name, whole.queries, whole.corpus.select(corpus), {"train": local}), queries


def mine_ours(collection: Any, queries: np.ndarray, args: Any) -> dict[str, list[str]]:
    from hf_distill.retrieval import mine

    model = dense_model()
    start = time.perf_counter()
    with PeakMemory() as memory:
        rows = mine(
            model,
            collection,
            "train",
            query_positions=queries,
            depth=DEPTH,
            num_negatives=NEGATIVES,
            dtype=args.dtype,
            cache_dir=args.cache,
        )
    tell(seconds=time.perf_counter() - start, bytes=memory.bytes)
    texts = {}
    for row in range(len(rows)):
        positions = rows.documents_at(row)[rows.num_positives[row] :]
        texts[collection.queries.texts([rows.query[row]])[0]] = collection.corpus.texts(positions)
    return texts


def mine_peer(collection: Any, queries: np.ndarray, args: Any) -> dict[str, list[str]]:
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    model = peer_model(args.dtype)
    start = time.perf_counter()
    with PeakMemory() as memory:
        qrels = collection.qrels["train"]
        pairs = Dataset.from_dict(
            {
                "query": collection.queries.texts(qrels.query),
                "positive": collection.corpus.texts(qrels.document),
            }
        )
        mined = mine_hard_negatives(
            pairs,
            model,
            corpus=collection.corpus.texts(),
            num_negatives=NEGATIVES,
            range_max=DEPTH,
            output_format="labeled-list",
            batch_size=args.batch,
            use_faiss=args.side == PEER_FAISS,
            cache_folder=args.cache,
            verbose=False,
        )
    tell(seconds=time.perf_counter() - start, bytes=memory.bytes)
    return {row["query"]: [text for text, label in zip(row["positive"], row["labels"]) if not label] for row in mined}


def search_index(args: Any) -> dict[str, list[str]]:
    """Searches a store of random vectors that was written before."""
    from hf_distill.retrieval import EmbeddingStore, Index

    queries = np.random.default_rng(1).standard_normal((1000, WIDTH), dtype=np.float32)
    store = EmbeddingStore(Path(args.cache) / f"{args.passages}.npy")
    Index.build(store.rows(0, 1000)).search(queries[:10], DEPTH)
    start = time.perf_counter()
    with PeakMemory() as memory:
        Index.build(store).search(queries, DEPTH)
    tell(seconds=time.perf_counter() - start, bytes=memory.bytes)
    return {}


def measure(args: Any, side: str, cache: Path, **changed: Any) -> dict[str, Any]:
    """One run in a process of its own."""
    options = {"dtype": args.dtype, "passages": args.passages, "queries": args.queries, "batch": args.batch, **changed}
    # The collection itself is parsed once and for all by whoever opens it first; everything else lies in `cache`.
    found = in_own_process("mining", side=side, cache=cache, data=args.data, **options)
    say(f"  {side} {changed or ''}: {found['seconds']:.2f} s, {mebibytes(found['bytes'])}")
    return found


def best_batch(args: Any) -> int:
    """The peer's fastest batch size on a part of the passages."""
    model = peer_model(args.dtype)
    collection, _ = task(args)
    texts = collection.corpus.texts(np.arange(min(256, len(collection.corpus))))
    rates = {}
    for size in (16, 16, 32, 64):
        start = time.perf_counter()
        model.encode(texts, batch_size=size)
        rates[size] = time.perf_counter() - start
    return min(rates, key=rates.get)


def overlap(one: dict[str, list[str]], other: dict[str, list[str]]) -> float:
    """Share of negatives that both sides chose."""
    shared = [len({*one[query]} & {*other[query]}) / NEGATIVES for query in one.keys() & other.keys()]
    return float(np.mean(shared)) if shared else 0.0


def measure_index(args: Any, folder: Path, report: Report) -> None:
    """Memory of exact search over stores of growing size."""
    peaks = []
    sizes = [int(size) for size in args.vectors.split(",")]
    for size in sizes:
        path = folder / f"{size}.npy"
        write_vectors(path, size, WIDTH)
        found = measure(args, INDEX, folder, passages=size)
        path.unlink()
        peaks.append(found["bytes"])
        report.row(f"exact search, 1,000 queries in {size:,} vectors", f"{found['seconds']:.2f}", mebibytes(peaks[-1]))
    what = f"peak memory of exact search with {sizes[-1]:,} vectors against {sizes[-2]:,}"
    report.claim_growth(what, peaks[-1] / max(peaks[-2], 1), 1.1)


def main() -> None:
    args = arguments(
        __doc__,
        passages=(20_000, "passages of the corpus"),
        queries=(2000, "queries to mine for"),
        dtype=("bfloat16", "precision of both encoders"),
        rounds=(1, "rounds without anything in the cache"),
        warm=(5, "rounds with a warm cache"),
        vectors=("50000,200000,800000", "sizes of random stores whose search is measured"),
        batch=(0, "batch size of the peer; 0 tries which is its best"),
        side=(None, "run this side only, and print what it took"),
        cache=(None, "its cache"),
    )
    if args.side == INDEX:
        search_index(args)
        return
    if args.side is not None:
        collection, queries = task(args)
        # Fingerprints of texts and weights are part of the work; opening the collection is not.
        mined = (mine_ours if args.side == OURS else mine_peer)(collection, queries, args)
        Path(args.cache).mkdir(parents=True, exist_ok=True)
        (Path(args.cache) / "negatives.json").write_text(json.dumps(mined))
        return
    report = Report(args, "Mining", ["what", "seconds", "peak memory"])
    collection, queries = task(args)
    size = len(collection.corpus)
    args.batch = args.batch or best_batch(args)
    sides = (OURS, PEER, PEER_FAISS)
    cold: dict[str, list[dict]] = {OURS: [], PEER: []}
    warm: dict[str, list[dict]] = {side: [] for side in sides}
    with scratch_folder("mining") as folder:
        for number in range(args.rounds):
            say(f"mining {size:,} passages for {len(queries):,} queries, round {number + 1}")
            for side in (OURS, PEER) if number % 2 == 0 else (PEER, OURS):
                cold[side].append(measure(args, side, folder / f"{number}-{side[:4]}"))
        caches = {side: folder / f"0-{side[:4]}" for side in sides}
        for number in range(args.warm):
            for side in sides if number % 2 == 0 else reversed(sides):
                warm[side].append(measure(args, side, caches[side]))
        found = {side: json.loads((caches[side] / "negatives.json").read_text()) for side in (OURS, PEER)}
        shared = overlap(found[OURS], found[PEER])
        for label, runs in (("nothing cached", cold), ("warm cache", warm)):
            for side, results in runs.items():
                memory = mebibytes(max(one["bytes"] for one in results))
                report.row(f"{side}, {label}", spread([one["seconds"] for one in results], "{:.2f}"), memory)
        measure_index(args, folder, report)

    def seconds(runs: dict[str, list[dict]], side: str) -> list[float]:
        return [one["seconds"] for one in runs[side]]

    def best_peer(runs: dict[str, list[dict]]) -> str:
        return min((side for side in runs if side != OURS), key=lambda side: np.median(seconds(runs, side)))

    report.claim("nothing cached, seconds", ratios(seconds(cold, OURS), seconds(cold, PEER)), 1.2)
    best = best_peer(warm)
    report.claim(f"warm cache, seconds, against {best}", ratios(seconds(warm, OURS), seconds(warm, best)))
    memory = [b["bytes"] / a["bytes"] for a, b in zip(cold[OURS], cold[PEER])]
    report.claim("nothing cached, the peer's peak memory over ours", memory)
    enough = 0.98 if args.dtype == "float32" else 0.85
    report.check(shared >= enough, f"{shared:.1%} of the negatives are the same on both sides")
    report.finish(
        f"{NEGATIVES} negatives for each of {len(queries):,} queries from the best {DEPTH} of {size:,} "
        f"passages of {collection.name}, encoded in {args.dtype}, at most 128 tokens; from an opened collection "
        f"and model to negatives, each run in a process of its own. The peer encodes in batches of {args.batch}, "
        "its best, and keeps embeddings in its `cache_folder`. Peak memory is the process's own, above the loaded "
        "model; pages of mapped files do not count."
    )


if __name__ == "__main__":
    main()
