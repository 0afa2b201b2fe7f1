"""Gradient caching: speed against no caching and `CachedMultipleNegativesRankingLoss`, and memory as batches grow."""

from __future__ import annotations

from typing import Any

from .common import (
    PeakMemory,
    Report,
    alternate,
    arguments,
    data_name,
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
)
from .steps import TEMPERATURE, largest_difference, peer_columns, run_ours, run_peer, training_rows


CHUNK = 32
PEER_CHUNKS = (16, 32, 64)
OURS, OURS_PLAIN, PEER = "hf_distill, cached", "hf_distill, not cached", "sentence-transformers, cached"


def cached_loss(chunk: int) -> Any:
    """Makes the peer's cached loss for chunks of `chunk` texts."""

    def make(model: Any) -> Any:
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

        return CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=chunk)

    return make


def run(side: str, models: dict[str, Any], rows: Any, batch: int, dtype: str, chunk: int) -> tuple[float, list[float]]:
    """One training step of one side without dropout; its seconds and its loss."""
    settings = {"steps": 1, "dtype": dtype, "dropout": 0.0, "batch": batch}
    with scratch_folder("caching") as folder:
        if side == PEER:
            return run_peer(models["peer"], peer_columns(rows), folder, loss=cached_loss(chunk), **settings)
        size = chunk if side == OURS else None
        return run_ours(models["ours"], rows, folder, gradient_cache_size=size, **settings)


def open_models(*names: str) -> dict[str, Any]:
    made = {"ours": lambda: dense_model(temperature=TEMPERATURE), "peer": peer_model}
    return {name: made[name]() for name in names}


def measure_memory(args: Any, side: str, batch: int, chunk: int) -> dict[str, Any]:
    """Peak memory and loss of one step in a process of its own."""
    options = {"batch": batch, "chunk": chunk, "dtype": args.dtype, "data": args.data}
    found = in_own_process("caching", side=side, **options)
    say(f"  {side}, batch {batch}: {mebibytes(found['bytes'])}, loss {found['loss']:.5f}")
    return found


def child(args: Any) -> None:
    """What runs in the process of its own."""
    collection = open_collection("medquad", args.data)
    models = open_models("peer" if args.side == PEER else "ours")
    rows = training_rows(collection, args.batch, negatives=1)
    with PeakMemory() as memory:
        _, losses = run(args.side, models, rows, args.batch, args.dtype, args.chunk)
    tell(bytes=memory.bytes, loss=losses[0])


def main() -> None:
    args = arguments(
        __doc__,
        batch=(64, "queries of a batch where speed is measured"),
        rounds=(5, "rounds of the two sides in turn, one step each"),
        memory=("32,512", "batch sizes where memory is measured"),
        plain=("32,64", "batch sizes where memory without caching is measured"),
        dtype=("bfloat16", "precision"),
        chunk=(CHUNK, "texts encoded at a time"),
        side=(None, "measure the memory of this side only, and print it"),
    )
    if args.side is not None:
        child(args)
        return
    report = Report(args, "Gradient caching", ["what", "examples/s", "peak memory"])
    collection = open_collection("medquad", args.data)
    models = open_models("ours", "peer")
    rows = training_rows(collection, args.batch, negatives=1)
    few = rows.select(range(max(1, args.batch // 2)))
    tries = {chunk: run(PEER, models, few, len(few), args.dtype, chunk)[0] for chunk in (PEER_CHUNKS[0], *PEER_CHUNKS)}
    peer_chunk = min(tries, key=tries.get)
    say("  peer's seconds by chunk: " + ", ".join(f"{chunk}: {one:.2f}" for chunk, one in tries.items()))
    run(OURS, models, few, len(few), args.dtype, args.chunk)
    losses: dict[str, list[float]] = {}

    def step(side: str, chunk: int) -> float:
        seconds, losses[side] = run(side, models, rows, args.batch, args.dtype, chunk)
        return seconds

    chunks = {OURS_PLAIN: args.chunk, OURS: args.chunk, PEER: peer_chunk}
    seconds = alternate({side: lambda side=side: step(side, chunks[side]) for side in chunks}, args.rounds)
    for other, name in ((PEER, "the peer's"), (OURS_PLAIN, "without caching")):
        report.check(
            largest_difference(losses[OURS], losses[other]) <= (1e-4 if args.dtype == "float32" else 0.03),
            f"batch {args.batch}: losses of the step, ours {losses[OURS][0]:.5f} and {name} {losses[other][0]:.5f}",
        )
    report.note(f"the peer's chunk of {peer_chunk} texts was its fastest of {PEER_CHUNKS} at batch {len(few)}")
    for name in chunks:
        report.row(f"{name}, batch {args.batch}", spread([args.batch / one for one in seconds[name]], "{:.1f}"), "")
    report.claim(f"{args.dtype}, examples/s", ratios(seconds[OURS], seconds[PEER]), 1.3)
    report.claim("examples/s with caching over those without", ratios(seconds[OURS], seconds[OURS_PLAIN]), 1 / 1.4)
    peaks: dict[tuple[str, int], int] = {}
    for side, sizes in ((OURS_PLAIN, args.plain), (OURS, args.memory), (PEER, args.memory)):
        for batch in map(int, sizes.split(",")):
            chunk = peer_chunk if side == PEER else args.chunk
            peaks[side, batch] = measure_memory(args, side, batch, chunk)["bytes"]
            report.row(f"{side}, batch {batch}", "", mebibytes(peaks[side, batch]))
    batches = [int(size) for size in args.memory.split(",")]
    growth = peaks[OURS, batches[-1]] / peaks[OURS, batches[0]]
    report.claim_growth(f"peak memory of ours at batch {batches[-1]} against batch {batches[0]}", growth, 1.25)
    largest = [peaks[PEER, size] / peaks[OURS, size] for size in batches]
    report.claim("peer's peak memory over ours", largest)
    report.finish(
        f"Contrastive steps with {args.dtype} autocast and no dropout on {data_name(collection)}: "
        f"(query, relevant passage, one other passage), chunks of {args.chunk} texts (ours). Ours recomputes "
        "activations inside one backward pass; the peer encodes twice around a gradient of embeddings. Peak "
        "memory is what one step of the trainer takes above the loaded model, in a process of its own: gradients "
        "(87 MiB) and the optimizer's state (174 MiB) included."
    )


if __name__ == "__main__":
    main()
