"""Both searches of a teleportation episode over random vectors, against searching twice with FAISS."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from .common import (
    PeakMemory,
    Report,
    arguments,
    in_own_process,
    mebibytes,
    ratios,
    say,
    scratch_folder,
    spread,
    tell,
    write_vectors,
)


DEPTH, WIDTH = 200, 384
OURS, FAISS = "hf_distill, both in one pass", "FAISS IndexFlatIP, twice"
SIDES = {"ours": OURS, "faiss": FAISS}


def queries_and_anchors(count: int, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Random vectors of queries, and the passages that stand for their positives."""
    generator = np.random.default_rng(1)
    anchors = generator.integers(0, len(vectors), count)
    return generator.standard_normal((count, WIDTH), dtype=np.float32), np.asarray(vectors[anchors])


def search_ours(path: Path, count: int) -> np.ndarray:
    """Blocks of the file pass by once, for the vectors of queries and of positives together."""
    from hf_distill.retrieval import EmbeddingStore, Index

    query, positive = queries_and_anchors(count, np.load(path, mmap_mode="r"))
    index = Index.build(EmbeddingStore(path))
    found = index.search(np.stack([query, positive], axis=1).reshape(-1, WIDTH), DEPTH)[1]
    return np.stack([found[0::2], found[1::2]])


def search_faiss(path: Path, count: int) -> np.ndarray:
    """All vectors in memory, one search after the other."""
    import faiss

    query, positive = queries_and_anchors(count, np.load(path, mmap_mode="r"))
    index = faiss.IndexFlatIP(WIDTH)
    index.add(np.load(path))
    return np.stack([index.search(side, DEPTH)[1] for side in (query, positive)])


def one_side(args: Any) -> None:
    """Runs a side in this process and prints what it took."""
    search = {"ours": search_ours, "faiss": search_faiss}[args.side]
    import torch  # noqa: F401

    import hf_distill.retrieval  # noqa: F401 - loaded before the clock starts, like faiss

    start = time.perf_counter()
    with PeakMemory() as memory:
        found = search(Path(args.path), args.queries)
    seconds = time.perf_counter() - start
    np.save(Path(args.path).with_suffix(f".{args.side}.npy"), found)
    tell(seconds=seconds, bytes=memory.bytes)


def measure(path: Path, side: str, queries: int) -> dict[str, Any]:
    """One run in a process of its own."""
    found = in_own_process("neighbours", side=side, path=path, queries=queries)
    say(f"  {SIDES[side]}: {found['seconds']:.2f} s, {mebibytes(found['bytes'])}")
    return found


def main() -> None:
    args = arguments(
        __doc__,
        vectors=("100000,1000000", "numbers of vectors"),
        queries=(2000, "queries; each has a positive that is searched for as well"),
        rounds=(3, "rounds"),
        side=(None, "run this side only, and print what it took"),
        path=(None, "its vectors"),
    )
    if args.side is not None:
        one_side(args)
        return
    report = Report(args, "Neighbours of queries and of positives", ["what", "seconds", "peak memory"])
    peaks: list[int] = []
    with scratch_folder("neighbours") as folder:
        for size in map(int, args.vectors.split(",")):
            path = folder / f"{size}.npy"
            write_vectors(path, size, WIDTH)
            say(f"{args.queries:,} queries and their positives in {size:,} vectors")
            runs: dict[str, list[dict]] = {side: [] for side in SIDES}
            for number in range(args.rounds):
                for side in SIDES if number % 2 == 0 else reversed(SIDES):
                    runs[side].append(measure(path, side, args.queries))
            one, other = (np.load(path.with_suffix(f".{side}.npy")) for side in SIDES)
            report.check((one == other).mean() > 0.999, f"{size:,} vectors: the same neighbours on both sides")
            seconds = {side: [one["seconds"] for one in found] for side, found in runs.items()}
            for side, found in runs.items():
                memory = mebibytes(max(one["bytes"] for one in found))
                report.row(f"{SIDES[side]}, {size:,} vectors", spread(seconds[side], "{:.2f}"), memory)
            report.claim(f"{size:,} vectors, seconds", ratios(seconds["ours"], seconds["faiss"]))
            peaks.append(max(one["bytes"] for one in runs["ours"]))
            path.unlink()
    report.claim_growth("our peak memory, most vectors against fewest", peaks[-1] / max(peaks[0], 1), 1.1)
    report.finish(
        f"The {DEPTH} nearest of each of {args.queries:,} queries and of its positive among random "
        f"vectors of {WIDTH} dimensions in a file, float32, exact; each run in a process of its own."
    )


if __name__ == "__main__":
    main()
