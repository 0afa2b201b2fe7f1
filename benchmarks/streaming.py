"""Streamed rows: rows per second with the texts looked up, against rows that are held; memory of a million rows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .common import (
    PeakMemory,
    Report,
    alternate,
    arguments,
    dense_model,
    mebibytes,
    memory_now,
    ratios,
    say,
    scratch_folder,
    spread,
)


TARGET = 0.8
HELD, STREAMED = "held (`RowSet`, memory-mapped)", "streamed (`StreamedRows`, parquet)"
BATCH, NEGATIVES, DOCUMENTS = 32, 7, 30
WORDS, BLOCK = 60, 4096


def make_tables(passages: int, queries: int, folder: Path) -> tuple[Any, Any]:
    """Synthetic queries and passages, memory-mapped."""
    import numpy as np

    from hf_distill.data import Corpus, Queries
    from hf_distill.data.readers import Block

    vocabulary = np.array([f"word{number}" for number in range(5000)])
    generator = np.random.default_rng(0)

    def blocks(count: int, name: str, words: int) -> Iterator[Block]:
        for start in range(0, count, BLOCK):
            size = min(BLOCK, count - start)
            texts = [" ".join(line) for line in vocabulary[generator.integers(0, 5000, (size, words))]]
            ids = [f"{name[0]}{number}" for number in range(start, start + size)]
            yield Block({name: ids, "text": texts}, "synthetic", start + 1, "row")

    return (
        Queries.from_blocks(blocks(queries, "query_id", 8), "queries", where="synthetic", cache_dir=folder),
        Corpus.from_blocks(blocks(passages, "document_id", WORDS), "corpus", where="synthetic", cache_dir=folder),
    )


def write_rows(folder: Path, rows: int, queries: int, passages: int) -> Path:
    """Rows of one positive and 29 random others with scores, in parquet files as `RowSet.save` writes them."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    folder.mkdir()
    generator = np.random.default_rng(1)
    per_file = 60 * BLOCK
    for number, begin in enumerate(range(0, rows, per_file)):
        writer = None
        for start in range(begin, min(begin + per_file, rows), BLOCK):
            size = min(BLOCK, rows - start)
            # A stride without common factors with the corpus: 30 different passages in every row.
            first = generator.integers(0, passages, (size, 1))
            documents = (first + np.arange(DOCUMENTS) * 7919 * (1 + first % 13)) % passages
            offsets = pa.array(np.arange(size + 1) * DOCUMENTS, pa.int32())

            def ids(letter: str, values: Any) -> Any:
                return pc.binary_join_element_wise(letter, pa.array(values.ravel()).cast(pa.string()), "")

            table = pa.table(
                {
                    "query_id": ids("q", generator.integers(0, queries, size)),
                    "document_ids": pa.ListArray.from_arrays(offsets, ids("d", documents)),
                    "num_positives": pa.array(np.ones(size, np.int64)),
                    "scores": pa.ListArray.from_arrays(
                        offsets, pa.array(generator.normal(size=size * DOCUMENTS).astype(np.float32))
                    ),
                }
            )
            writer = writer or pq.ParquetWriter(folder / f"train-{number:05d}.parquet", table.schema)
            writer.write_table(table)
        writer.close()
    return folder


def loader(rows: Any, collator: Any) -> Iterator[Any]:
    """Batches as the trainer makes them, of an epoch of `rows`."""
    from torch.utils.data import DataLoader

    from hf_distill.data import EpochSampler, RowSet, StreamedTrainingRows, StreamSampler, TrainingRows

    options = {"num_negatives": NEGATIVES, "seed": 1, "score_columns": ["scores"]}
    if isinstance(rows, RowSet):
        dataset = TrainingRows(rows, **options)
        sampler: Any = EpochSampler(len(dataset), seed=1)
    else:
        dataset = StreamedTrainingRows(rows, **options)
        sampler = StreamSampler(dataset, BATCH, seed=1)
    return iter(DataLoader(dataset, BATCH, sampler=sampler, collate_fn=collator, drop_last=True))


def epoch_seconds(rows: Any, collator: Any) -> float:
    """Seconds of an epoch, from opening to the last batch."""
    start = time.perf_counter()
    for _ in loader(rows, collator):
        pass
    return time.perf_counter() - start


def first_batch_seconds(rows: Any, collator: Any) -> float:
    """Seconds until the first batch is there."""
    start = time.perf_counter()
    next(loader(rows, collator))
    return time.perf_counter() - start


def peak_of_epoch(rows: Any) -> tuple[int, int, float]:
    """The most memory that an epoch takes, what the process has then in all, and the seconds."""
    start = time.perf_counter()
    with PeakMemory() as peak:
        seen = sum(len(batch) for batch in loader(rows, list))
    assert seen == len(rows) // BATCH * BATCH
    return peak.bytes, memory_now("VmRSS") or 0, time.perf_counter() - start


def main() -> None:
    args = arguments(
        __doc__,
        rows=(1_000_000, "rows that are streamed for the memory"),
        passages=(1_000_000, "passages of the corpus"),
        timed=(60_000, "rows of an epoch for the speed"),
        tokenised=(8_192, "rows of an epoch for the speed with tokenising"),
        rounds=(5, "rounds of the sides in turn"),
    )

    from hf_distill.data import RetrievalCollator, RowSet, StreamedRows

    report = Report(args, "Streamed rows", ["rows", "what", "rows/s", "seconds to the first batch"])
    with scratch_folder("streaming") as folder:
        say(f"making {args.passages:,} passages and {args.rows:,} rows")
        queries, corpus = make_tables(args.passages, 20_000, folder)
        sizes = {"timed": args.timed, "tokenised": args.tokenised, "large": args.rows}
        for name, count in sizes.items():
            write_rows(folder / name, count, len(queries), len(corpus))
        processor = dense_model().processor()
        for name, what, encoders in (
            ("timed", "texts looked up", {}),
            ("tokenised", "and tokenised", {"student": processor}),
        ):
            say(f"rows a second, {what}")
            sides = {
                HELD: RowSet.load(folder / name, queries, corpus, cache_dir=folder),
                STREAMED: StreamedRows.open(folder / name, queries, corpus, cache_dir=folder),
            }
            collator = RetrievalCollator(queries, corpus, encoders, num_chunks=4)
            seconds = alternate(
                {side: lambda rows=rows, c=collator: epoch_seconds(rows, c) for side, rows in sides.items()},
                args.rounds,
            )
            for side, rows in sides.items():
                first = [first_batch_seconds(rows, collator) for _ in range(3)]
                rate = [len(rows) / one for one in seconds[side]]
                report.row(side, what, spread(rate, "{:,.0f}"), spread(first, "{:.2f}"))
            report.claim(f"streamed against held, {what}", ratios(seconds[STREAMED], seconds[HELD]), TARGET)
            del sides
        say("memory")
        for name in ("timed", "large"):
            rows = StreamedRows.open(folder / name, queries, corpus, cache_dir=folder)
            size = sum(file.stat().st_size for file in (folder / name).glob("*.parquet"))
            taken, resident, spent = peak_of_epoch(rows)
            line = (
                f"an epoch of {len(rows):,} rows ({mebibytes(size)} of parquet) takes at most {mebibytes(taken)} more "
                f"than before it; {mebibytes(resident)} resident with all libraries and mapped files; {spent:.0f} s"
            )
            report.check(taken < 600 * 2**20, line)
    report.finish(
        f"Rows of {DOCUMENTS} documents with scores over {args.passages:,} passages of {WORDS} words; a "
        f"batch is {BATCH} queries with {1 + NEGATIVES} passages each. Held rows have been looked up before; of "
        "streamed ones the parquet files are read, checked, shuffled and their identifiers looked up in the "
        "corpus while the batches are made, with a buffer of 10,000 rows. Both then look up the texts, and in the "
        "second part tokenise them, as the trainer does."
    )


if __name__ == "__main__":
    main()
