"""Encoding: passages per second against `SentenceTransformer.encode`, and against the machine's matrix products."""

from __future__ import annotations

from typing import Any

import numpy as np

from .common import (
    DTYPES,
    Report,
    alternate,
    arguments,
    data_name,
    dense_model,
    distinct_texts,
    open_collection,
    peer_model,
    ratios,
    say,
    scratch_folder,
    spread,
    timed,
)
from .peak import matmul_peak


PEER_BATCHES = (16, 32, 64, 128)
TARGET = 1.2


def useful_flops(lengths: np.ndarray, config: Any) -> float:
    """Floating point operations of a BERT-like encoder on texts of these lengths, without any padding."""
    width, inner = config.hidden_size, config.intermediate_size
    linear = 2.0 * (4 * width * width + 2 * width * inner) * lengths
    attention = 4.0 * width * lengths.astype(float) ** 2
    return config.num_hidden_layers * float((linear + attention).sum())


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows."""
    one, other = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (one, other))
    return (one * other).sum(1)


def best_batch(peer: Any, texts: list[str]) -> tuple[int, dict[int, float]]:
    """The peer's fastest batch size, each at the better of two tries."""
    peer.encode(texts[:64], batch_size=32)
    rates = {}
    for size in PEER_BATCHES:
        seconds = min(timed(lambda size=size: peer.encode(texts, batch_size=size)) for _ in range(2))
        rates[size] = len(texts) / seconds
    say("  peer's passages/s by batch size: " + ", ".join(f"{size}: {rate:.0f}" for size, rate in rates.items()))
    return max(rates, key=rates.get), rates


def main() -> None:
    args = arguments(
        __doc__,
        passages=(512, "passages to encode in a round"),
        rounds=(7, "rounds of the two sides in turn"),
    )

    from hf_distill.data import Corpus
    from hf_distill.retrieval import InferenceModel, encode_table, encode_texts

    collection = open_collection("medquad", args.data)
    texts = distinct_texts(collection, args.passages)
    model = dense_model()
    lengths = np.array([len(ids) for ids in model.processor().passages(texts)])
    flops = useful_flops(lengths, model.backbone.config)
    table = Corpus.from_records(
        [{"document_id": str(number), "title": "", "text": text} for number, text in enumerate(texts)]
    )
    report = Report(args, "Encoding", ["precision", "what", "passages/s", "best GFLOP/s", "of the peak"])
    reference = None
    for dtype in DTYPES:
        say(f"encoding, {dtype}")
        peak, kernel = matmul_peak(dtype)
        inference = InferenceModel(model, dtype=dtype)
        peer = peer_model(dtype)
        batch, rates = best_batch(peer, texts[: max(128, len(texts) // 4)])
        encode_texts(inference, texts[:64])
        vectors: dict[str, np.ndarray] = {}

        def ours(inference=inference, vectors=vectors) -> float:
            return timed(lambda: vectors.__setitem__("ours", encode_texts(inference, texts)))

        def theirs(peer=peer, batch=batch, vectors=vectors) -> float:
            return timed(lambda: vectors.__setitem__("theirs", peer.encode(texts, batch_size=batch)))

        def to_disk(inference=inference) -> float:
            with scratch_folder("encode") as folder:
                return timed(lambda: encode_table(inference, table, "passage", cache_dir=folder))

        seconds = alternate({"ours": ours, "peer": theirs, "ours to disk": to_disk}, args.rounds)
        # On a machine that is not quiet the second measurement may see more of it.
        peak, kernel = max((peak, kernel), matmul_peak(dtype))
        if reference is None:
            reference = vectors["theirs"]
        close = 0.9999 if dtype == "float32" else 0.999
        for side, vector in vectors.items():
            found = cosines(vector.astype(np.float32), reference)
            line = f"{dtype}: cosine of {side} to their float32 vectors at least {found.min():.6f}"
            # The peer's own bfloat16 is reported but not asserted.
            if vector is not reference:
                report.check(side == "theirs" or found.min() >= close, line)
        for name, label in (
            ("ours", "hf_distill `encode_texts`"),
            ("ours to disk", "hf_distill `encode_table`, stored in shards"),
            ("peer", f"sentence-transformers `encode`, batch {batch}"),
        ):
            rate = [len(texts) / one for one in seconds[name]]
            reached = flops * 1e-9 / min(seconds[name])
            report.row(dtype, label, spread(rate), f"{reached:.0f}", f"{reached / peak:.0%}")
        report.claim(f"{dtype}, in memory", ratios(seconds["ours"], seconds["peer"]), TARGET)
        report.claim(f"{dtype}, to disk", ratios(seconds["ours to disk"], seconds["peer"]), TARGET)
        report.note(f"{dtype}: the machine's best matrix product: {peak:.0f} GFLOP/s ({kernel})")
        report.note(
            f"{dtype}: the peer's passages/s by batch size, when its best was chosen: "
            + ", ".join(f"{size}: {rate:.0f}" for size, rate in rates.items())
        )
    report.finish(
        f"{len(texts):,} passages of {data_name(collection)}, {lengths.mean():.0f} tokens on average, at "
        f"most {lengths.max()}, in random order; tokenising included. Both sides sort by length. GFLOP/s are "
        "useful ones: padding does not count. The last column compares them with the fastest matrix product "
        "of the same precision that was found on this machine."
    )


if __name__ == "__main__":
    main()
