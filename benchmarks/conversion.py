"""Conversion of a collection as MS MARCO has it: passages per second and peak memory, as the collection grows."""

from __future__ import annotations

import csv
import importlib.metadata
import random
import shutil
import time
from pathlib import Path
from typing import Any

from .common import Report, arguments, in_own_process, mebibytes, memory_now, ratios, say, scratch_folder, spread, tell


OURS, PEER = "hf_distill", "datasets"
COLUMNS = ("document_id", "text")


def write_collection(path: Path, passages: int) -> None:
    """Lines of identifier and text, about 350 bytes each, as long as MS MARCO's; some begin with a quotation mark."""
    generator = random.Random(0)
    words = [f"{'abcde'[: generator.randrange(1, 6)]}{number:x}" for number in range(4096)]
    texts = [" ".join(generator.choices(words, k=generator.randrange(25, 75))) for _ in range(2000)]
    texts[::50] = [f'"{text}' for text in texts[::50]]
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{number}\t{texts[number % 2000]} {number}\n" for number in range(passages))


def convert_ours(source: str, target: str) -> None:
    from hf_distill.data.formats.conversion import convert, working_folder
    from hf_distill.data.formats.opening import open_inputs

    start = time.perf_counter()
    convert(open_inputs([source], cache_dir=working_folder(target) / ".cache"), target)
    tell(seconds=time.perf_counter() - start, bytes=memory_now("VmHWM"))


def convert_peer(source: str, target: str) -> None:
    import datasets

    start = time.perf_counter()
    features = datasets.Features({name: datasets.Value("string") for name in COLUMNS})
    options = {"sep": "\t", "quoting": csv.QUOTE_NONE, "names": COLUMNS, "na_filter": False}
    table = datasets.Dataset.from_csv(source, features=features, cache_dir=f"{target}.cache", **options)
    Path(target).mkdir()
    table.to_parquet(f"{target}/corpus.parquet")
    tell(seconds=time.perf_counter() - start, bytes=memory_now("VmHWM"))


def measure(side: str, source: Path, folder: Path) -> dict[str, Any]:
    """One conversion in a process of its own; what it wrote is gone afterwards."""
    target = folder / "out"
    found = in_own_process("conversion", side=side, data=source, target=target)
    found["rows"] = contents(target)
    for path in (target, Path(f"{target}.cache")):
        shutil.rmtree(path, ignore_errors=True)
    say(f"  {side}, {source.name}: {found['seconds']:.2f} s, peak {mebibytes(found['bytes'])}")
    return found


def contents(folder: Path) -> tuple[int, int]:
    """Rows, and characters of their texts."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    rows = characters = 0
    for path in folder.rglob("*.parquet"):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=["text"]):
                rows += batch.num_rows
                characters += pc.sum(pc.utf8_length(batch.column(0))).as_py()
    return rows, characters


def main() -> None:
    args = arguments(
        __doc__,
        passages=(1_000_000, "passages of the larger collection; the smaller one has a quarter"),
        rounds=(3, "rounds on the larger one"),
        side=(None, "run this side only, on the file in --data, and print what it took"),
        target=(None, "where it writes"),
    )
    if args.side is not None:
        (convert_ours if args.side == OURS else convert_peer)(args.data, args.target)
        return
    sizes = (args.passages // 4, args.passages)
    with scratch_folder("conversion") as folder:
        found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for size in sizes:
            source = folder / f"collection-{size}.tsv"
            write_collection(source, size)
            for number in range(args.rounds if size == sizes[-1] else 1):
                for side in (OURS, PEER) if number % 2 == 0 else (PEER, OURS):
                    found.setdefault((side, size), []).append(measure(side, source, folder))
            megabytes = source.stat().st_size / 1e6
            source.unlink()
    report = Report(args, "Conversion", ["what", "passages", "passages/s", "peak memory"])
    for (side, size), runs in found.items():
        rate = spread([size / run["seconds"] for run in runs], "{:,.0f}")
        report.row(side, f"{size:,}", rate, mebibytes(max(run["bytes"] for run in runs)))
    ours, theirs = found[OURS, sizes[-1]], found[PEER, sizes[-1]]
    seconds = [[run["seconds"] for run in runs] for runs in (ours, theirs)]
    report.claim("passages per second", ratios(*seconds))
    report.claim("the peer's peak memory over ours", [b["bytes"] / a["bytes"] for a, b in zip(ours, theirs)])
    growth = max(run["bytes"] for run in ours) / max(run["bytes"] for run in found[OURS, sizes[0]])
    report.claim_growth(f"our peak memory with {sizes[1]:,} passages against {sizes[0]:,}", growth, 1.25)
    written = {tuple(run["rows"]) for run in (*ours, *theirs)}
    report.check(
        len(written) == 1 and ours[0]["rows"][0] == sizes[1],
        "both sides wrote the same number of rows and of characters",
    )
    report.finish(
        f"A file of tab-separated passages ({sizes[1]:,} lines, {megabytes:,.0f} MB) to parquet, each "
        f"run in a process of its own, imports not counted. hf_distill checks every line and identifier, and that "
        f"none comes twice; the peer is `Dataset.from_csv` and `to_parquet` of datasets "
        f"{importlib.metadata.version('datasets')}, which does not. Peak memory is the whole process's, "
        "libraries included (`VmHWM`)."
    )


if __name__ == "__main__":
    main()
