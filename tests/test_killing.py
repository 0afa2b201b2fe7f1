"""`kill -9` at twenty random moments, spread over the kinds of long work: run again, the same comes out.

Another kind of work joins by a function here, an entry in `_jobs` and its name in `KINDS`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from .killing import Job, digests, run, torture


def encode(folder: Path, data: str, dense: str) -> None:
    """All passages of a collection, in shards of four."""
    from hf_distill.data import load_collection
    from hf_distill.retrieval import encode_table

    encode_table(_slow(dense), load_collection(data).corpus, "passage", shard_rows=4)


def mine_rows(folder: Path, data: str, dense: str, ranker: str) -> None:
    """Negatives that a teacher has filtered, saved as a row set."""
    from hf_distill.data import load_collection
    from hf_distill.retrieval import mine

    rows = mine(
        _slow(dense), load_collection(data), "train", depth=10, num_negatives=4, sampling="random", margin=0.0,
        filter_teacher=_slow(ranker), max_score=5.0,
    )  # fmt: skip
    rows.save(folder / "rows")


def score(folder: Path, data: str, rows: str, ranker: str) -> None:
    """A cross-encoder's scores of a row set."""
    from hf_distill.data import RowSet, load_collection
    from hf_distill.retrieval import score_rows

    collection = load_collection(data)
    given = RowSet.load(rows, collection.queries, collection.corpus)
    score_rows(_slow(ranker), given).save(folder / "scored")


def everything_offline(folder: Path, **settings: str) -> None:
    """Encode, search, BM25, mine, score and re-rank, one after the other."""
    from .retrieval_run import main

    (folder / "output").mkdir(exist_ok=True)
    path = folder / "output" / "settings.json"
    path.write_text(json.dumps({**settings, "output": str(folder / "output"), "processes": 1, "pause": 0.002}))
    main(str(path))
    path.unlink()


def train(folder: Path, data: str, dense: str) -> None:
    """The verb, with a checkpoint every second step."""
    from hf_distill.cli.main import main

    main(["train", "--data", data, "--model", dense, "--output_dir", str(folder / "out"), *TRAINING])


def train_on_a_stream(folder: Path, data: str, dense: str, rows: str) -> None:
    """The same on rows that are read one after the other."""
    from hf_distill.cli.main import main

    flags = ["--rows", rows, "--streaming", "true", "--shuffle_buffer", "16"]
    main(["train", "--data", data, "--model", dense, "--output_dir", str(folder / "out"), *TRAINING, *flags])


def mine_pools(folder: Path, data: str, dense: str) -> None:
    """The pools of two teleportation episodes, the second with the first in it."""
    from hf_distill.data import load_collection
    from hf_distill.retrieval.teleport import EpisodeOptions, mine_episode

    collection, previous = load_collection(data), None
    options = EpisodeOptions(depth=20, query_negatives=5, positive_negatives=4)
    for number, model in enumerate((_slow(dense), "bm25"), start=1):
        previous = mine_episode(model, collection, "train", number, previous=previous, options=options).rows
        previous.save(folder / f"pool-{number}")


def episodes(folder: Path, data: str, dense: str) -> None:
    """Two episodes of mining and training, by the verb."""
    from hf_distill.cli.main import main

    flags = ["--episodes", "2", "--depth", "20", "--query_negatives", "5", "--positive_negatives", "4"]
    flags += [*TRAINING[: TRAINING.index("--mine_with")], "--max_steps", "4", "--stop_after", "3"]
    main(["tele", "--data", data, "--model", dense, "--output_dir", str(folder / "out"), *flags])


def pretrain(folder: Path, corpus: str, dense: str) -> None:
    """LexMAE on a corpus, and then on texts that are read in order."""
    from hf_distill.cli.main import main

    for out, texts in (("out", ["--data", str(Path(corpus).parent)]), ("streamed", ["--stream", corpus])):
        main(["pretrain", *texts, "--model", dense, "--output_dir", str(folder / out), *PRETRAINING])


def convert(folder: Path, source: str) -> None:
    """Foreign files into our layout."""
    from hf_distill.cli.main import main

    main(["convert", "--input", source, "--output_dir", str(folder / "out")])


TRAINING = ["--use_cpu", "true", "--per_device_train_batch_size", "4", "--num_negatives", "2", "--max_steps", "8"]
TRAINING += ["--save_steps", "2", "--eval_strategy", "no", "--report_to", "none", "--mine_with", "student"]
TRAINING += ["--mine_depth", "20", "--mine_negatives", "6", "--logging_steps", "4"]


PRETRAINING = ["--use_cpu", "true", "--per_device_train_batch_size", "4", "--max_steps", "6", "--save_steps", "2"]
PRETRAINING += ["--report_to", "none", "--logging_steps", "3", "--new_head", "identity", "--passage_length", "24"]


def without_report(folder: Path) -> dict[str, str]:
    """All files of a result but those that have times in them."""
    return {name: digest for name, digest in digests(folder / "out").items() if not name.startswith("run_manifest")}


def weights(folder: Path) -> dict[str, bytes]:
    """What a training is compared by; its report has times in it."""
    out = folder / "out"
    assert (out / "run_manifest.json").is_file()
    return {name: (out / name).read_bytes() for name in ("model.safetensors", "config.json", "modules.json")}


def pools_and_weights(folder: Path) -> dict[str, str]:
    """What episodes leave, without their checkpoints and reports."""
    kept = ("model.safetensors", ".parquet", "negatives.json")
    found = {name: one for name, one in digests(folder / "out").items() if name.endswith(kept)}
    return {name: one for name, one in found.items() if "checkpoint-" not in name}


def pretrained(folder: Path) -> dict[str, bytes]:
    """Model and decoder of both pre-trainings."""
    names = [f"{out}/{part}.safetensors" for out in ("out", "streamed") for part in ("model", "training_modules")]
    return {name: (folder / name).read_bytes() for name in names}


def _slow(source: str):
    """A model that sleeps at every batch, so that moments in the middle of the work are likely."""
    from hf_distill.models import load_model
    from hf_distill.retrieval.inference import InferenceModel

    from .retrieval_run import slow_down

    slow_down(0.003)
    return InferenceModel(load_model(source), dtype="float32", token_budget=128)


def _jobs(data: str, training_data: str, dense: str, ranker: str, rows: str, foreign: str) -> dict[str, Job]:
    models = {"dense": dense, "ranker": ranker}
    training = {"data": training_data, "dense": dense}
    return {
        "encode": Job(encode, 3, {"data": data, "dense": dense}),
        "mine": Job(mine_rows, 3, {"data": data, **models}),
        "score": Job(score, 2, {"data": data, "rows": rows, "ranker": ranker}),
        "everything offline": Job(everything_offline, 2, {"collection": data, **models}, result=without_started),
        "train": Job(train, 3, training, result=weights),
        "train on two processes": Job(train, 2, training, processes=2, result=weights),
        "train on a stream": Job(train_on_a_stream, 2, {**training, "rows": rows}, result=weights),
        "mine episodes": Job(mine_pools, 2, {"data": data, "dense": dense}),
        "episodes": Job(episodes, 2, training, result=pools_and_weights),
        "pretrain": Job(pretrain, 3, {"corpus": str(Path(data) / "corpus.jsonl"), "dense": dense}, result=pretrained),
        "convert": Job(convert, 3, {"source": foreign}, result=without_report),
    }


def without_started(folder: Path) -> dict[str, str]:
    """All files but marks of beginnings."""
    return {name: digest for name, digest in digests(folder).items() if "output/started" not in name}


KINDS = (
    "encode",
    "mine",
    "score",
    "everything offline",
    "train",
    "train on two processes",
    "train on a stream",
    "mine episodes",
    "episodes",
    "pretrain",
    "convert",
)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, micro, tiny_bert_source, tiny_ranker_source) -> dict[str, Job]:
    """The jobs on smoke-sized models and data."""

    from hf_distill.data import load_collection
    from hf_distill.retrieval import mine

    os.environ["HF_DISTILL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    rows = tmp_path_factory.mktemp("rows") / "rows"
    mine("bm25", load_collection(micro), "train", depth=20, num_negatives=8).save(rows)
    foreign = tmp_path_factory.mktemp("foreign")
    write_foreign(foreign, 20_000)
    # Without other splits nothing is measured or plotted, which is not what is tested here.
    training_data = shutil.copytree(micro, tmp_path_factory.mktemp("training") / "micro")
    for split in ("dev", "test"):
        (training_data / "qrels" / f"{split}.tsv").unlink()
    folders = (micro, training_data, tiny_bert_source, tiny_ranker_source, rows, foreign)
    return _jobs(*map(str, folders))


def write_foreign(folder: Path, passages: int) -> None:
    """MS MARCO's files of passages, queries and judgements."""
    words = [f"word{number}" for number in range(50)]
    lines = (f"{number}\t{' '.join(words[number % 40 : number % 40 + 9])} {number}\n" for number in range(passages))
    (folder / "collection.tsv").write_text("".join(lines))
    (folder / "queries.train.tsv").write_text("".join(f"{n}\tquestion {n}\n" for n in range(passages // 4)))
    (folder / "qrels.train.tsv").write_text("".join(f"{n}\t0\t{3 * n}\t1\n" for n in range(passages // 4)))


def test_twenty_kills(jobs):
    assert tuple(jobs) == KINDS
    assert sum(job.kills for job in jobs.values()) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.distributed] * ("two" in k)) for k in KINDS])
def test_killed_and_run_again_the_same_comes_out(kind, jobs, tmp_path):
    job = jobs[kind]
    run(job, tmp_path / "first")  # imports what the server has not, and would else count as work
    start = time.monotonic()
    run(job, tmp_path / "uninterrupted")
    seconds = time.monotonic() - start
    expected = job.outcome(tmp_path / "uninterrupted")
    assert expected and expected == job.outcome(tmp_path / "first")
    torture(job, tmp_path / "killed", expected, seconds, seed=KINDS.index(kind))
