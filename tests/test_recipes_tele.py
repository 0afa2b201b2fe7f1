"""The recipe ance_tele end to end: its profile paper on a miniature of MS MARCO with titles, in RocketQA's files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_distill.recipes import load_recipe


def with_titles(folder: Path, micro: Path) -> Path:
    """The micro corpus as passages, titles, queries and judgements in files of their own; passages are numbered."""
    folder.mkdir()

    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (micro / name).read_text().splitlines()]

    passages = {one["_id"]: str(number) for number, one in enumerate(lines("corpus.jsonl"))}
    questions = {one["_id"]: str(1_000_000 + number) for number, one in enumerate(lines("queries.jsonl"))}
    for name, field in (("para.txt", "text"), ("para.title.txt", "title")):
        texts = [f"{passages[one['_id']]}\t{one.get(field) or '-'}\n" for one in lines("corpus.jsonl")]
        (folder / name).write_text("".join(texts))
    for split in ("train", "dev"):
        judged = [line.split("\t") for line in (micro / "qrels" / f"{split}.tsv").read_text().splitlines()[1:]]
        asked = {query for query, *_ in judged}
        texts = [f"{questions[one['_id']]}\t{one['text']}\n" for one in lines("queries.jsonl") if one["_id"] in asked]
        (folder / f"queries.{split}.tsv").write_text("".join(texts))
        found = [f"{questions[query]}\t0\t{passages[document]}\t1\n" for query, document, *_ in judged]
        (folder / f"qrels.{split}.tsv").write_text("".join(found))
    return folder


def test_the_published_numbers():
    for profile, queries, epochs, negatives, lengths, stop in (
        ("paper", 8, 3, (15, 31, 31), (32, 128), 20000),
        ("paper_nq", 32, 40, (3, 7, 11), (32, 156), 2000),
        ("paper_triviaqa", 32, 40, (3, 7, 11), (32, 156), 2000),
    ):
        stages = load_recipe("ance_tele", profile, ["data=D"]).stages
        models = [stages[f"model_{number}"].settings for number in (1, 2, 3)]
        assert tuple(one["num_negatives"] for one in models) == negatives
        assert [one.get("stop_after") for one in models] == [stop, stop, None]
        for one in models:
            assert (one["per_device_train_batch_size"], one["num_train_epochs"]) == (queries, epochs)
            assert (one["query_length"], one["passage_length"]) == lengths
            assert one["learning_rate"] == 5e-6 and one["warmup_steps"] == 0.1 and one["seed"] == 42
            assert one["negative_sampling"] == "window" and one.get("tied", True) == (profile == "paper")
        pools = [stages[f"pool_{number}"].settings for number in (1, 2, 3)]
        drawn = 30 if profile == "paper" else 80
        assert all((one["query_negatives"], one["positive_negatives"]) == (drawn, drawn) for one in pools)
        assert all(one["depth"] == 200 and one["momentum"] for one in pools)


@pytest.mark.slow
def test_paper_on_a_miniature(micro, tiny_bert_source, tmp_path):
    """Only sizes and the precision of GPUs are overridden."""
    sizes = ["query_negatives=4", "lookahead=4", "defaults.episode.depth=20", f"encoder={tiny_bert_source}"]
    sizes += ["defaults.train.max_steps=4", "defaults.train.stop_after=2", "defaults.train.passage_length=32"]
    sizes += ["defaults.train.use_cpu=true", "defaults.train.fp16=false", "defaults.train.report_to=none"]
    folder, data = tmp_path / "out", with_titles(tmp_path / "marco", micro)
    words = ["recipe", "ance_tele", "--profile", "paper", "--output_dir", str(folder), "--set", f"data={data}"]
    environment = {**os.environ, "HF_DISTILL_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hf_distill", *words, *sizes]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"bm25", "pretrained", "episode_1", "episode_2", "episode_3"} <= set(metrics["marco/dev"])
    changes = metrics["marco/train"]
    assert list(changes) == ["pretrained", "episode_1", "episode_2", "episode_3"]
    assert 0 <= changes["episode_3"]["forgetting"] <= 1
    for number, steps in ((1, 2), (2, 2), (3, 4)):
        history = json.loads((folder / f"stages/model_{number}/history.json").read_text())
        assert max(entry["step"] for entry in history) == steps
    groups = json.loads((folder / "stages/pool_3/metadata.json").read_text())["source_groups"]
    assert groups["momentum"] == ["positive@1", "positive@2", "query@1", "query@2"]
    assert "[SEP]" in (folder / "stages/model_3/hf_distill.json").read_text()
    assert "| `query@3` |" in (folder / "stages/pool_3/README.md").read_text()
