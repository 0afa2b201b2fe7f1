"""Lexical training: SPLADE steps against `SparseEncoderTrainer`, speed and memory; LED with scores cached or live."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from .common import (
    MAX_LENGTH,
    MODEL,
    PeakMemory,
    Report,
    alternate,
    arguments,
    data_name,
    dense_model,
    mebibytes,
    open_collection,
    ratios,
    say,
    scratch_folder,
    spread,
)
from .steps import (
    BATCH,
    SEED,
    common_arguments,
    largest_difference,
    peer_columns,
    run_ours,
    run_trainer,
    training_rows,
)


OURS, PEER = "hf_distill", "sentence-transformers"
CACHED, LIVE = "cached scores", "live teacher"
TARGETS = {"training": 1.3, "led": 3.0}
# Both sides' regulariser: passages and queries weighed alike.
WEIGHT = 0.002
LOSSES = f'["contrastive", {{"name": "flops", "weight": {WEIGHT}, "query_ratio": 0.75}}]'
LED = '[{"name": "contrastive"}, {"name": "rank_consistency", "teacher": "lexical"}]'


def lexical_model(**settings: Any) -> Any:
    """The encoder with a new head whose bias leaves it some hundred active terms, as a trained model has."""
    import torch

    from hf_distill.models import LexicalRetriever

    model = LexicalRetriever.from_pretrained(
        MODEL, new_head="identity", query_length=MAX_LENGTH, passage_length=MAX_LENGTH, **settings
    )
    with torch.no_grad():
        ids = torch.tensor([model.processor().passages(["the heart pumps blood through the body"])[0]])
        logits = model.backbone(input_ids=ids).logits.amax(1)[0]
        model.backbone.get_output_embeddings().bias -= logits.topk(300).values[-1]
    return model


def run_peer(
    folder: Path, columns: Any, work: Path, *, steps: int, dtype: str, batch: int
) -> tuple[float, list[float]]:
    """The same steps with `SparseEncoderTrainer`."""
    from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
    from sentence_transformers.sparse_encoder.callbacks.splade_callbacks import (
        SpladeRegularizerWeightSchedulerCallback,
    )
    from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss

    from hf_distill.models import set_dropout

    from .steps import _in_order

    model = SparseEncoder(str(folder), device="cpu")
    set_dropout(model, 0.0)
    loss = SpladeLoss(
        model,
        SparseMultipleNegativesRankingLoss(model, scale=1.0),
        document_regularizer_weight=WEIGHT,
        query_regularizer_weight=0.75 * WEIGHT,
    )
    settings = SparseEncoderTrainingArguments(**common_arguments(work, steps, dtype, batch), batch_sampler=_in_order)
    trainer = SparseEncoderTrainer(model=model, args=settings, train_dataset=columns, loss=loss)
    # It would let the regulariser grow over the first third of the steps; ours is constant here.
    trainer.remove_callback(SpladeRegularizerWeightSchedulerCallback)
    return run_trainer(trainer)


def led_steps(rows: Any, folder: Path, teacher: Any, name: str, args: Any) -> tuple[float, list[float]]:
    """Steps of a dense student that keeps the order of a lexical teacher."""
    from hf_distill.teachers import CachedScores, LiveTeacher
    from hf_distill.trainers import DistillTrainer, DistillTrainingArguments

    settings = DistillTrainingArguments(
        **common_arguments(folder, args.steps, args.dtype, args.batch),
        num_negatives=args.negatives,
        dropout=0.0,
        losses=LED,
    )
    voice = CachedScores("lexical", "scores_lexical") if name == CACHED else LiveTeacher("lexical", teacher)
    return run_trainer(DistillTrainer(dense_model(), settings, teachers=[voice], rows=rows))


def main() -> None:
    args = arguments(
        __doc__,
        steps=(1, "steps of a round"),
        rounds=(5, "rounds of the sides in turn"),
        dtype=("float32", "precision"),
        batch=(BATCH, "queries of a batch"),
        negatives=(7, "negatives of a query for LED"),
    )
    import torch

    from hf_distill.retrieval import score_rows

    collection = open_collection("medquad", args.data)
    report = Report(args, "Lexical training", ["what", "how", "examples/s", "memory"])
    peaks: dict[str, int] = {}
    losses: dict[str, list[float]] = {}
    with scratch_folder("lexical") as folder:
        say("SPLADE steps")
        rows = training_rows(collection, max(args.steps, 2) * args.batch, negatives=1)
        columns = peer_columns(rows)
        model = lexical_model()
        model.save_pretrained(folder / "start")

        def run(name: str, steps: int) -> float:
            common = {"steps": steps, "dtype": args.dtype, "batch": args.batch}
            with PeakMemory() as memory:
                if name == OURS:
                    settings = {"dropout": 0.0, "losses": LOSSES, **common}
                    seconds, losses[name] = run_ours(copy.deepcopy(model), rows, folder / "work", **settings)
                else:
                    seconds, losses[name] = run_peer(folder / "start", columns, folder / "work", **common)
            peaks[name] = max(peaks.get(name, 0), memory.bytes)
            return seconds

        for name in (OURS, PEER):
            run(name, 2)
        difference = largest_difference(losses[OURS], losses[PEER])
        shown = ", ".join(f"{a:.5f} and {b:.5f}" for a, b in zip(losses[OURS], losses[PEER]))
        report.check(difference <= (1e-4 if args.dtype == "float32" else 0.05), f"losses of both: {shown}")
        seconds = alternate({name: lambda name=name: run(name, args.steps) for name in (OURS, PEER)}, args.rounds)
        for name in (OURS, PEER):
            rate = [args.steps * args.batch / one for one in seconds[name]]
            report.row("SPLADE step", name, spread(rate, "{:.1f}"), mebibytes(peaks[name]))
        report.claim("SPLADE steps", ratios(seconds[OURS], seconds[PEER]), TARGETS["training"])
        report.claim("memory of a SPLADE step", [peaks[PEER] / max(peaks[OURS], 1)])

        say("LED steps")
        rows = training_rows(collection, max(args.steps, 2) * args.batch, args.negatives, seed=SEED)
        scored = score_rows(model, rows, column="scores_lexical", dtype=args.dtype, cache_dir=folder / "scores")
        teacher = copy.deepcopy(model).to(getattr(torch, args.dtype))
        for name in (CACHED, LIVE):
            losses[name] = led_steps(scored, folder / "work", teacher, name, args)[1]
        seconds = alternate(
            {
                name: lambda name=name: led_steps(scored, folder / "work", teacher, name, args)[0]
                for name in (CACHED, LIVE)
            },
            args.rounds,
        )
        shown = ", ".join(f"{a:.4f} and {b:.4f}" for a, b in zip(losses[CACHED], losses[LIVE]))
        report.check(largest_difference(losses[CACHED], losses[LIVE]) < 0.05, f"LED, cached and live: {shown}")
        for name in (CACHED, LIVE):
            rate = [args.steps * args.batch / one for one in seconds[name]]
            report.row("LED step", name, spread(rate, "{:.1f}"), "–")
        report.claim("LED, cached against live", ratios(seconds[CACHED], seconds[LIVE]), TARGETS["led"])
    report.finish(
        f"Batches of {args.batch} queries of {data_name(collection)}, at most {MAX_LENGTH} tokens, "
        f"{args.dtype}. SPLADE steps: both sides' own trainers, one other passage a query, contrastive loss and "
        f"FLOPS, no dropout; memory is the most taken above the start. LED: a dense student of the same size, "
        f"{args.negatives} negatives, rank consistency with a lexical teacher."
    )


if __name__ == "__main__":
    main()
