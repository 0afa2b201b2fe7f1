"""Distillation of layers: cached against live, the joint step against its plain passes, what is held, and MaxSim."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .common import (
    MODEL,
    PeakMemory,
    Report,
    alternate,
    arguments,
    data_name,
    dense_model,
    in_own_process,
    mebibytes,
    open_collection,
    ratios,
    say,
    scratch_folder,
    spread,
    tell,
)
from .steps import common_arguments, largest_difference, run_trainer, training_rows


CACHED, LIVE = "cached layer scores", "live teacher"
JOINT, PLAIN = "joint step", "its plain passes"
OURS, PEER = "hf_distill", "sentence-transformers"


def multi_vector() -> Any:
    """A multi-vector model of the dense one's encoder, with a new projection: speed is all."""
    import torch

    from hf_distill.models import MultiVectorRetriever

    torch.manual_seed(0)
    return MultiVectorRetriever.from_pretrained(MODEL, query_length=32, passage_length=128)


def distil(teachers: list, student: Any, rows: Any, folder: Any, args: Any, steps: int, **more: Any) -> Any:
    """A trainer of LEAD on the rows."""
    from hf_distill.trainers import DistillTrainer, DistillTrainingArguments

    settings = DistillTrainingArguments(
        **common_arguments(folder, steps, args.dtype, args.batch),
        num_negatives=args.negatives,
        dropout=0.0,
        num_layer_pairs=2,
        **more,
    )
    return DistillTrainer(copy.deepcopy(student), settings, teachers, rows=rows)


def plain_passes(student: Any, teacher: Any, trainer: Any, args: Any) -> Callable[[], float]:
    """Forward, backward and optimiser steps of both models on a batch, without anything between them."""
    import torch

    from hf_distill.models import set_dropout

    models = [copy.deepcopy(one).requires_grad_(True) for one in (student, teacher)]
    for model in models:
        set_dropout(model, 0.0)
        model.train()
    trained = [[one for one in model.parameters() if one.requires_grad] for model in models]
    batch = next(iter(trainer.get_train_dataloader()))

    def run() -> float:
        optimisers = [torch.optim.AdamW(one, lr=2e-5) for one in trained]  # new ones, as a trainer's are
        start = time.perf_counter()
        for _ in range(args.steps):
            for model, name, optimiser in zip(models, ("student", "teacher"), optimisers):
                with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
                    output = model(**batch["tokens"][name])
                scores = model.batch_scores(output, batch, "global")
                torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)) * (1 + args.negatives)).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad()
        return time.perf_counter() - start

    return run


def forward_memory(args: Any) -> None:
    """Tells the bytes that a frozen forward of both models takes for layer scores, and those of its layers alone.

    `args.memory` is `chosen`, two layers as the loss is given them, or `whole`, every layer of every token.
    """
    import torch

    from hf_distill.data.collators import RetrievalCollator
    from hf_distill.data.negatives import TrainingRows

    rows = training_rows(open_collection("medquad", args.data), args.batch, args.negatives)
    models = {"student": dense_model(), "teacher": multi_vector()}
    readers = {name: model.processor() for name, model in models.items()}
    collator = RetrievalCollator(rows.queries, rows.corpus, readers, num_chunks={"query": 1, "passage": 4})
    examples = TrainingRows(rows, num_negatives=args.negatives)
    batch = collator([examples[row, 0] for row in range(args.batch)])
    outputs = []
    with torch.no_grad(), PeakMemory() as peak:
        for name, model in models.items():
            everything = {"layers": tuple(range(1, model.num_layers + 1)), "layer_tokens": True}
            wanted = {"layers": (2, model.num_layers)} if args.memory == "chosen" else everything
            outputs.append(model(**batch["tokens"][name], **wanted))
    layers = 0
    for output in outputs:
        tokens = getattr(output, "layer_tokens", None)
        for one in output.layers if tokens is None else tokens[:2]:
            layers += sum(part.numel() * 4 for part in (one if isinstance(one, tuple) else (one,)))
    tell(peak=peak.bytes, layers=layers)


def main() -> None:
    args = arguments(
        __doc__,
        steps=(2, "steps of a round"),
        rounds=(5, "rounds of the sides in turn"),
        dtype=("float32", "precision of student and teacher"),
        batch=(16, "queries of a batch"),
        negatives=(3, "negatives of a query"),
        queries=(50, "queries whose candidates are re-ranked"),
        candidates=(100, "candidates of each"),
        memory=(None, "only what a forward holds, chosen or whole; asked for by the benchmark itself"),
    )
    if args.memory is not None:
        forward_memory(args)
        return
    import torch

    from hf_distill.models import student_from
    from hf_distill.retrieval import encode_texts, score_layers, score_rows
    from hf_distill.retrieval.multi_vector import pair_scores
    from hf_distill.teachers import CachedScores, JointTeacher, LiveTeacher

    collection = open_collection("medquad", args.data)
    rows = training_rows(collection, max(args.steps, 2) * args.batch, args.negatives)
    teacher, student = multi_vector(), student_from("layers:3:even", dense_model())
    report = Report(args, "Distillation of layers and multi-vector search", ["what", "how", "steps/s"])
    with scratch_folder("layers") as folder:
        say("layers: cached and live")
        scored = score_rows(teacher, rows, dtype=args.dtype, cache_dir=folder)
        scored = score_layers(teacher, scored, dtype=args.dtype, cache_dir=folder)
        losses: dict[str, list[float]] = {}
        terms = '[contrastive, {"name": "layer_alignment", "calibration": "z_norm", "calibrate_student": true}]'
        terms = terms.replace("contrastive", '{"name": "contrastive", "candidates": "own"}', 1)

        def frozen(name: str, steps: int) -> float:
            voice = LiveTeacher("teacher", copy.deepcopy(teacher))
            if name == CACHED:
                voice = CachedScores.from_rows("teacher", scored, "scores", "layer_scores_teacher")
            seconds, losses[name] = run_trainer(distil([voice], student, scored, folder, args, steps, losses=terms))
            return seconds

        for name in (CACHED, LIVE):
            frozen(name, 1)
        seconds = alternate({name: lambda name=name: frozen(name, args.steps) for name in (CACHED, LIVE)}, args.rounds)
        for name in (CACHED, LIVE):
            report.row("LEAD, teacher frozen", name, spread([args.steps / one for one in seconds[name]], "{:.2f}"))
        report.claim("LEAD with cached against live layers", ratios(seconds[CACHED], seconds[LIVE]))
        most = 1e-3 if args.dtype == "float32" else 0.1
        same = largest_difference(losses[CACHED], losses[LIVE]) <= most
        report.check(same, "losses of the steps are the same, cached and live")

        say("layers: joint step")

        def joint(steps: int) -> Any:
            voice = JointTeacher("teacher", copy.deepcopy(teacher))
            return distil([voice], student, rows, folder, args, steps, method="lead")

        trainer = joint(1)
        sides = {
            JOINT: lambda: run_trainer(joint(args.steps))[0],
            PLAIN: plain_passes(student, teacher, trainer, args),
        }
        for run in sides.values():
            run()
        seconds = alternate(sides, args.rounds)
        for name in (JOINT, PLAIN):
            report.row("joint training", name, spread([args.steps / one for one in seconds[name]], "{:.2f}"))
        report.claim("joint step against its plain passes", ratios(seconds[JOINT], seconds[PLAIN]), 1 / 1.1)

    say("layers: memory")
    shape = {"batch": args.batch, "negatives": args.negatives, "data": args.data}
    chosen, whole = (in_own_process("layers", memory=what, **shape) for what in ("chosen", "whole"))
    report.note(
        f"held and gathered for two pairs of layers: {mebibytes(chosen['layers'])}; the whole stacks: "
        f"{mebibytes(whole['layers'])}; peak of a frozen forward of both models: {mebibytes(chosen['peak'])}, with "
        f"the whole stacks {mebibytes(whole['peak'])}"
    )

    say("layers: MaxSim")
    corpus, generator = collection.corpus, np.random.default_rng(0)
    documents = generator.permutation(len(corpus))[: 10 * args.candidates]
    passages = encode_texts(teacher, corpus.texts(documents, teacher.config.template), dtype=args.dtype)
    queries = encode_texts(teacher, collection.queries.texts(np.arange(args.queries)), "query", dtype=args.dtype)
    lists = [generator.permutation(len(documents))[: args.candidates] for _ in range(args.queries)]
    cut = [torch.from_numpy(passages.rows(i, i + 1).vectors) for i in range(len(passages))]
    asked = [torch.from_numpy(queries.rows(i, i + 1).vectors) for i in range(len(queries))]
    found: dict[str, list[np.ndarray]] = {}

    def ours() -> float:
        start = time.perf_counter()
        cpu = torch.device("cpu")
        found[OURS] = [pair_scores(queries.rows(i, i + 1), passages, one, cpu) for i, one in enumerate(lists)]
        return time.perf_counter() - start

    def peer() -> float:
        from sentence_transformers.util.similarity import maxsim

        start = time.perf_counter()
        found[PEER] = [maxsim([asked[i]], [cut[j] for j in one])[0].numpy() for i, one in enumerate(lists)]
        return time.perf_counter() - start

    ours(), peer()
    seconds = alternate({OURS: ours, PEER: peer}, args.rounds)
    for name in (OURS, PEER):
        rate = [args.queries / one for one in seconds[name]]
        report.row(f"exact MaxSim of {args.candidates} candidates", name, spread(rate, "{:.0f}") + " queries/s")
    report.claim("exact MaxSim against sentence-transformers", ratios(seconds[OURS], seconds[PEER]), 1.0)
    off = max(float(np.abs(a - b).max()) for a, b in zip(found[OURS], found[PEER]))
    report.check(off < 1e-4, f"scores of both differ by at most {off:.1e}")
    report.finish(
        f"Batches of {args.batch} × (query, relevant passage, {args.negatives} others) of "
        f"{data_name(collection)} in {args.dtype}, no dropout; a multi-vector teacher of six layers, a dense "
        "student of three, two pairs of layers. The plain passes are forward, backward, clipping and AdamW of "
        "both models on a ready batch with their own contrastive losses. MaxSim is of ready token vectors, of "
        "passages drawn at random."
    )


if __name__ == "__main__":
    main()
