"""Scoring: pairs per second of a cross-encoder against `CrossEncoder.predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .common import (
    DTYPES,
    MAX_LENGTH,
    MODEL,
    Report,
    alternate,
    arguments,
    data_name,
    open_collection,
    ratios,
    say,
    scratch_folder,
    spread,
    timed,
)


PEER_BATCHES = (16, 32, 64)
TARGET = 1.2


def make_ranker(folder: Path) -> Any:
    """A cross-encoder on the benchmarks' encoder with a fresh head, as a checkpoint that both sides open."""
    import torch

    from hf_distill.models import CrossEncoderRanker

    torch.manual_seed(0)
    model = CrossEncoderRanker.from_pretrained(MODEL, max_length=MAX_LENGTH)
    model.save_pretrained(folder)
    return CrossEncoderRanker.from_pretrained(folder)


def peer_ranker(folder: Path, dtype: str) -> Any:
    """The same files, opened by sentence-transformers."""
    import torch
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(folder), max_length=MAX_LENGTH, model_kwargs={"dtype": getattr(torch, dtype)})


def row_set(collection: Any, queries: int, candidates: int) -> Any:
    """Rows of random candidates: as many pairs, with every passage several times, as mining would give."""
    from hf_distill.data import RowSet

    generator = np.random.default_rng(0)
    pool = generator.choice(len(collection.corpus), min(len(collection.corpus), 4 * candidates), replace=False)
    chosen = generator.choice(len(collection.queries), queries, replace=False)
    documents = [generator.choice(pool, candidates, replace=False) for _ in chosen]
    return RowSet.from_arrays(collection.queries, collection.corpus, chosen, documents, [0] * queries)


def main() -> None:
    args = arguments(
        __doc__,
        queries=(16, "queries"),
        candidates=(32, "candidates of each"),
        rounds=(7, "rounds of the two sides in turn"),
    )

    from hf_distill.retrieval import score_rows

    collection = open_collection("medquad", args.data)
    rows = row_set(collection, args.queries, args.candidates)
    query = np.repeat(rows.query, rows.lengths)
    document = np.concatenate([rows.documents_at(row) for row in range(len(rows))])
    pairs = list(zip(collection.queries.texts(query), collection.corpus.texts(document)))
    report = Report(args, "Scoring", ["precision", "what", "pairs/s"])
    reference = None
    with scratch_folder("ranker") as folder:
        model = make_ranker(folder)
        lengths = np.array([len(ids) for ids in model.processor().pairs(*zip(*pairs))[0]])
        for dtype in DTYPES:
            say(f"scoring, {dtype}")
            peer = peer_ranker(folder, dtype)
            batch = best_batch(peer, pairs)
            scores: dict[str, np.ndarray] = {}

            def ours(dtype=dtype, scores=scores) -> float:
                # A cache of its own each time: nothing is found done.
                with scratch_folder("scores") as cache:
                    start = timed(
                        lambda: scores.__setitem__("ours", flat(score_rows(model, rows, dtype=dtype, cache_dir=cache)))
                    )
                return start

            def theirs(peer=peer, batch=batch, scores=scores) -> float:
                return timed(lambda: scores.__setitem__("theirs", peer.predict(pairs, batch_size=batch)))

            seconds = alternate({"ours": ours, "peer": theirs}, args.rounds)
            if reference is None:
                reference = scores["theirs"]
            for side, values in scores.items():
                gap = float(np.abs(values - reference).max())
                allowed = 1e-4 if dtype == "float32" else 0.1
                line = f"{dtype}: scores of {side} differ from their float32 ones by at most {gap:.1e}"
                report.check(side == "theirs" or gap <= allowed, line)
            for side, label in (
                ("ours", "hf_distill `score_rows`, stored in shards"),
                ("peer", f"sentence-transformers `CrossEncoder.predict`, batch {batch}"),
            ):
                report.row(dtype, label, spread([len(pairs) / one for one in seconds[side]]))
            report.claim(dtype, ratios(seconds["ours"], seconds["peer"]), TARGET)
    report.finish(
        f"{len(pairs):,} pairs of {len(rows)} queries of {data_name(collection)}, {lengths.mean():.0f} "
        f"tokens on average, at most {lengths.max()}, in random order; a cross-encoder of six layers, tokenising "
        "included."
    )


def flat(rows: Any) -> np.ndarray:
    """All scores of a row set, one row after the other."""
    return np.concatenate([rows.values_at("scores", row) for row in range(len(rows))])


def best_batch(peer: Any, pairs: list[tuple[str, str]]) -> int:
    """The peer's fastest batch size on a part of the pairs."""
    part = pairs[: max(64, len(pairs) // 4)]
    peer.predict(part[:16], batch_size=16)
    rates = {size: len(part) / timed(lambda size=size: peer.predict(part, batch_size=size)) for size in PEER_BATCHES}
    say("  peer's pairs/s by batch size: " + ", ".join(f"{size}: {rate:.0f}" for size, rate in rates.items()))
    return max(rates, key=rates.get)


if __name__ == "__main__":
    main()
