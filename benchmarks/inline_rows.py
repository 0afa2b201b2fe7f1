"""Training rows of ids against the same rows with their texts inline: batches, training steps, and bytes on disk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .common import (
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
from .steps import BATCH, SEED, TEMPERATURE, common_arguments, largest_difference, run_trainer


IDS, INLINE = "ids", "texts inline"
BLOCK = 1024


def pool_of_ids(collection: Any, count: int, negatives: int) -> Any:
    """Rows of a query, its positive and random other passages, as an episode's pool is."""
    from hf_distill.data import RowSet

    generator = np.random.default_rng(0)
    qrels = collection.qrels["train"]
    chosen = generator.integers(0, len(qrels.query), count)
    positives = [qrels.positives().of(int(query)) for query in qrels.query[chosen]]
    documents = []
    for own in positives:
        others = np.setdiff1d(generator.choice(len(collection.corpus), negatives + len(own), replace=False), own)
        documents.append([own[0], *generator.permutation(others)[:negatives]])
    return RowSet.from_arrays(
        collection.queries, collection.corpus, qrels.query[chosen], documents, np.ones(count, np.int64)
    )


def with_texts(rows: Any, folder: Path) -> Any:
    """The same rows where every document is a text of its own, one row's after the other's, in one mapped file."""
    from hf_distill.data import Corpus, RowSet
    from hf_distill.data.readers import Block

    width = int(rows.lengths[0])

    def blocks() -> Iterator[Any]:
        for start in range(0, len(rows), BLOCK):
            stop = min(start + BLOCK, len(rows))
            documents = np.concatenate([rows.documents_at(row) for row in range(start, stop)])
            ids = [str(number) for number in range(start * width, stop * width)]
            yield Block(
                {"document_id": ids, "text": rows.corpus.texts(documents)}, "inline", start * width + 1, "document"
            )

    corpus = Corpus.from_blocks(blocks(), "corpus", where="inline", cache_dir=folder)
    own = np.arange(len(rows) * width).reshape(len(rows), width)
    return RowSet.from_arrays(rows.queries, corpus, rows.query, own, rows.num_positives)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def batches_seconds(rows: Any, collator: Any, negatives: int, count: int) -> float:
    """Seconds of making batches of the first `count` rows of an epoch, tokenised as the trainer does it."""
    from torch.utils.data import DataLoader

    from hf_distill.data import EpochSampler, TrainingRows

    dataset = TrainingRows(rows, num_negatives=negatives, sampling="window", seed=SEED)
    order = [key for key, _ in zip(EpochSampler(len(dataset), seed=SEED), range(count))]
    start = time.perf_counter()
    for _ in DataLoader(dataset, BATCH, sampler=order, collate_fn=collator):
        pass
    return time.perf_counter() - start


def training_seconds(model: Any, rows: Any, folder: Path, args: Any) -> tuple[float, list[float]]:
    """Seconds and losses of training steps."""
    import copy

    from hf_distill.trainers import RetrievalTrainer, RetrievalTrainingArguments

    settings = RetrievalTrainingArguments(
        **common_arguments(folder, args.steps, args.dtype, args.batch),
        num_negatives=args.negatives,
        negative_sampling="window",
        dropout=0.0,
        # Copies of a passage are not known as such where texts stand for them.
        losses='[{"name": "contrastive", "candidates": "global", "mask_false_negatives": false}]',
    )
    return run_trainer(RetrievalTrainer(copy.deepcopy(model), settings, rows=rows))


def main() -> None:
    args = arguments(
        __doc__,
        rows=(10_000, "rows of the pool"),
        pool=(60, "negatives of a row in the pool"),
        negatives=(15, "negatives of a row in a batch"),
        timed=(2048, "rows whose batches are timed"),
        batch=(8, "queries of a training batch"),
        steps=(8, "training steps of a round"),
        dtype=("bfloat16", "precision of training"),
        rounds=(5, "rounds of the two sides in turn"),
    )
    from hf_distill.data import RetrievalCollator, RowSet

    report = Report(args, "Rows of ids and rows of texts", ["rows", "what", "rows/s", "on disk"])
    collection = open_collection("medquad", args.data)
    model = dense_model(temperature=TEMPERATURE)
    with scratch_folder("inline_rows") as folder:
        pool_of_ids(collection, args.rows, args.pool).save(folder / "pool")
        pool = RowSet.load(folder / "pool", collection.queries, collection.corpus, cache_dir=folder / "cache")
        say(f"writing {args.rows * (1 + args.pool):,} texts of {args.rows:,} rows")
        sides = {IDS: pool, INLINE: with_texts(pool, folder / "inline")}
        sizes = {IDS: size_of(folder / "cache"), INLINE: size_of(folder / "inline")}
        collators = {
            name: RetrievalCollator(rows.queries, rows.corpus, {"student": model.processor()})
            for name, rows in sides.items()
        }
        timed = min(args.timed, args.rows)
        making = alternate(
            {
                name: lambda name=name: batches_seconds(sides[name], collators[name], args.negatives, timed)
                for name in sides
            },
            args.rounds,
        )
        losses: dict[str, list[float]] = {}

        def train(name: str) -> float:
            seconds, losses[name] = training_seconds(model, sides[name], folder / "out", args)
            return seconds

        train(IDS)
        training = alternate({name: lambda name=name: train(name) for name in sides}, args.rounds)
    report.check(
        largest_difference(losses[IDS], losses[INLINE]) <= (1e-4 if args.dtype == "float32" else 0.03),
        f"losses of the last step: {losses[IDS][-1]:.5f} with ids, {losses[INLINE][-1]:.5f} with texts",
    )
    for name in sides:
        rate = spread([timed / one for one in making[name]])
        report.row(name, f"batches of 1 + {args.negatives} texts, tokenised", rate, mebibytes(sizes[name]))
        trained = [args.steps * args.batch / one for one in training[name]]
        report.row(name, f"training, {args.batch} queries a step", spread(trained, "{:.1f}"), "")
    report.claim("making batches, rows/s", ratios(making[IDS], making[INLINE]))
    report.claim("training, rows/s", ratios(training[IDS], training[INLINE]))
    report.claim("bytes on disk, texts over ids", [sizes[INLINE] / sizes[IDS]], form="{:.0f}×")
    report.finish(
        f"{args.rows:,} rows of a positive and {args.pool} negatives from {data_name(collection)}, once as positions "
        "in the collection and once with every row's texts written out, both memory-mapped and drawn alike (window "
        "sampling). Ids also know which passages of a batch are the same, and encode them once; the ids' bytes are "
        "beside the collection's texts, which are there once for all pools."
    )


if __name__ == "__main__":
    main()
