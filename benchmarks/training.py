"""Training steps: examples per second against `SentenceTransformerTrainer` with the same loss, rows and dropout."""

from __future__ import annotations

from .common import (
    DTYPES,
    Report,
    alternate,
    arguments,
    data_name,
    dense_model,
    open_collection,
    peer_model,
    ratios,
    say,
    scratch_folder,
    spread,
)
from .steps import BATCH, TEMPERATURE, largest_difference, peer_columns, run_ours, run_peer, training_rows


TARGET = 1.3
DROPOUTS = (0.1, 0.0)
OURS, PEER, PEER_EAGER = "hf_distill", "sentence-transformers", "sentence-transformers, eager attention"


def main() -> None:
    args = arguments(
        __doc__,
        steps=(1, "steps of a round"),
        rounds=(5, "rounds of the sides in turn"),
        dtypes=(",".join(DTYPES), "precisions"),
        batch=(BATCH, "queries of a batch"),
    )

    collection = open_collection("medquad", args.data)
    # Two steps, so that the first update is compared too.
    rows = training_rows(collection, max(args.steps, 2) * args.batch, negatives=1)
    columns = peer_columns(rows)
    ours = dense_model(temperature=TEMPERATURE)
    peers = {PEER: peer_model(), PEER_EAGER: peer_model(attention="eager")}
    report = Report(args, "Training steps", ["precision", "dropout", "trainer", "examples/s"])
    with scratch_folder("training") as folder:
        for dtype in args.dtypes.split(","):
            for dropout in DROPOUTS:
                say(f"training, {dtype}, dropout {dropout}")
                losses: dict[str, list[float]] = {}
                settings = {"dtype": dtype, "dropout": dropout, "batch": args.batch}

                def run(name: str, steps: int, settings=settings) -> tuple[float, list[float]]:
                    if name == OURS:
                        return run_ours(ours, rows, folder, steps=steps, **settings)
                    return run_peer(peers[name], columns, folder, steps=steps, **settings)

                names = (OURS, *peers)
                for name in names:  # also the first calls of all kernels, which are not timed
                    losses[name] = run(name, 2 if dropout == 0 else 1)[1]
                seconds = alternate({name: lambda name=name: run(name, args.steps)[0] for name in names}, args.rounds)
                for name in names:
                    rate = [args.steps * args.batch / one for one in seconds[name]]
                    report.row(dtype, str(dropout), name, spread(rate, "{:.1f}"))
                label = f"{dtype}, dropout {dropout}"
                for name in peers:
                    note = "" if name == PEER else ", the peer set to eager attention by hand"
                    report.claim(label + note, ratios(seconds[OURS], seconds[name]), TARGET)
                if dropout == 0:
                    # bfloat16 rounds a step's gradients differently wherever the order of operations differs.
                    most = 1e-4 if dtype == "float32" else 0.03
                    difference = largest_difference(losses[OURS], losses[PEER])
                    shown = ", ".join(f"{a:.5f} and {b:.5f}" for a, b in zip(losses[OURS], losses[PEER]))
                    line = f"{label}: losses of the steps, ours and the peer's: {shown}"
                    report.check(difference <= most, line)
    report.finish(
        f"Both sides' own trainers: batches of {args.batch} × (query, relevant passage, one other "
        f"passage) of {data_name(collection)}, the same rows in the same order, at most 128 tokens, contrastive "
        "loss over all passages of the batch, AdamW, gradients clipped; loading and tokenising included. Weights "
        "are float32; bfloat16 means autocast. No text repeats, so nothing is saved by leaving copies out."
    )


if __name__ == "__main__":
    main()
