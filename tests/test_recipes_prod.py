"""The recipe prod end to end: its smoke profile, killed and not, and the profile paper on a miniature of MS MARCO."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_distill.cli.main import main
from hf_distill.recipes import load_recipe


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """One cache for the whole module: what a stage has encoded another one finds."""
    return {**os.environ, "HF_DISTILL_CACHE": str(tmp_path_factory.mktemp("prod-cache")), "OMP_NUM_THREADS": "1"}


def command(profile: str, folder: Path, *overrides: str, until: str | None = None) -> list[str]:
    words = [sys.executable, "-m", "hf_distill", "recipe", "prod", "--profile", profile, "--output_dir", str(folder)]
    words += [word for override in overrides for word in ("--set", override)]
    return [*words, *(["--until", until] if until else [])]


def run(words: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, micro, tiny_bert_source, environment) -> tuple[Path, list[str]]:
    """The whole smoke profile, not interrupted."""
    folder = tmp_path_factory.mktemp("smoke") / "out"
    overrides = [f"data={micro}", f"encoder={tiny_bert_source}"]
    run(command("smoke", folder, *overrides), environment)
    return folder, overrides


@pytest.mark.parametrize("profile", ["paper", "paper_document", "paper_nq", "small", "smoke"])
def test_every_profile_is_a_graph(profile):
    recipe = load_recipe("prod", profile, ["data=D", *(["answers=A"] if profile == "paper_nq" else [])])
    assert {"student_warm", "tpd_dense", "tpd_ranker", "tpd_large", "selected", "dpd", "figures"} <= set(recipe.stages)


def test_the_published_numbers():
    """The table of the specification: learning rate, warm-up, steps, batch, negatives, weights, temperature."""
    stages = load_recipe("prod", "paper", ["data=D"]).stages
    table = {
        "student_warm": (2e-5, 4000, 40000, 16, 1),
        "teacher_warm": (2e-5, 4000, 40000, 16, 1),
        "student_strong": (2e-5, 1000, 10000, 16, 1),
        "teacher_strong": (2e-5, 1000, 10000, 16, 1),
        "tpd_dense": (5e-5, 4000, 40000, 16, 1),
        "ranker_small": (1e-5, 1000, 6000, 4, 15),
        "tpd_ranker": (5e-5, 4000, 40000, 8, 15),
        "ranker_large": (5e-6, 600, 6000, 4, 15),
        "tpd_large": (5e-5, 4000, 40000, 8, 15),
        "dpd": (1e-5, 200, 2000, 8, 15),
    }
    names = ("learning_rate", "warmup_steps", "max_steps", "per_device_train_batch_size", "num_negatives")
    for name, row in table.items():
        assert tuple(stages[name].settings[field] for field in names) == row, name
    losses = {loss["name"]: loss for loss in stages["tpd_large"].settings["losses"]}
    assert [losses[name]["weight"] for name in ("contrastive", "kl", "lwf")] == [0.1, 0.9, 1.0]
    assert losses["kl"]["temperature"] == losses["lwf"]["temperature"] == 4
    assert [loss["name"] for loss in stages["tpd_dense"].settings["losses"]] == ["contrastive", "kl"]
    assert stages["dpd"].settings["negative_sampling"] == "hardest"
    assert stages["refresh_2"].settings["model"] == "${teacher_strong}", "the teacher mines, not the student"
    assert stages["refresh_3"].settings["model"] == "${tpd_ranker}"
    mined = {name: stages[name].settings for name in ("refresh_1", "refresh_4")}
    assert mined["refresh_1"]["mine_depth"] == 200 and mined["refresh_1"]["mine_negatives"] == 100
    assert mined["refresh_4"]["mine_negatives"] == 200, "all that the student finds is scored"
    assert stages["ranker_small"].settings["gradient_accumulation_steps"] == 8
    assert stages["ranker_small"].settings["passage_length"] == 192


def test_passages_with_an_answer_are_no_negatives_on_nq():
    stages = load_recipe("prod", "paper_nq", ["data=D", "answers=A"]).stages
    cleaned = {name for name, stage in stages.items() if stage.settings.get("answers") == "A"}
    assert cleaned == {"cleaned_base", "cleaned_1", "cleaned_2", "cleaned_3", "selected"}
    for name, stage in stages.items():
        if stage.kind.trains:
            assert stage.settings["rows"].strip("${}") in cleaned, name
    assert {stages[f"refresh_{number}"].settings["mine_depth"] for number in (1, 2, 3, 4)} == {100}


@pytest.mark.slow
def test_smoke(smoke, environment):
    folder, overrides = smoke
    metrics = json.loads((folder / "metrics.json").read_text())["micro/test"]
    assert {"bm25", "student_before", "teacher", "tpd_dense", "tpd_ranker", "tpd_large", "dpd"} <= set(metrics)
    rows = json.loads((folder / "stages/selected/metadata.json").read_text())
    assert rows["selection"]["queries"] >= rows["rows"] > 0
    manifest = json.loads((folder / "stages/dpd/run_manifest.json").read_text())
    teachers = [teacher["name"] for teacher in manifest["models"]["teachers"]]
    assert "teacher" in teachers
    assert "lwf" in manifest["training"]["losses"]
    assert (folder / "report.html").stat().st_size > 10_000
    card = (folder / "stages/dpd/README.md").read_text()
    assert card.count("# How it was made: Recipe prod, profile smoke") == 1 and "| tpd_ranker | distill |" in card
    begin = time.perf_counter()
    run(command("smoke", folder, *overrides), environment)
    assert time.perf_counter() - begin < 20, "a second or two on a quiet machine"
    for record in (folder / "records").glob("[!c]*.json"):
        assert json.loads(record.read_text())["starts"] == 1


@pytest.mark.slow
def test_killed_and_started_again_the_result_is_the_same(smoke, tmp_path, environment):
    """The recipe is killed three times, in the middle of trainings, of mining, or between; it starts with no cache."""
    whole, overrides = smoke
    words = command("smoke", tmp_path / "out", *overrides, until="tpd_ranker")
    environment = {**environment, "HF_DISTILL_CACHE": str(tmp_path / "cache")}
    generator = random.Random(1)
    for number in range(3):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        # After some more checkpoints or finished stages, and a moment: wherever that is.
        seen = len(list(tmp_path.glob("out/stages/*/*")))
        while process.poll() is None and len(list(tmp_path.glob("out/stages/*/*"))) < seen + 3 + number:
            time.sleep(0.02)
        time.sleep(generator.uniform(0, 0.5))
        assert process.poll() is None, "the recipe ended before it was killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    run(words, environment)
    same_results(whole, tmp_path / "out", "student_warm", "teacher_warm", "tpd_dense", "ranker_small", "tpd_ranker")


def same_results(one: Path, other: Path, *stages: str) -> None:
    """Weights and measures of stages in two runs."""
    for stage in stages:
        ours, theirs = (folder / "stages" / stage for folder in (other, one))
        assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes(), stage
        figures = [json.loads((place / "metrics.json").read_text()) for place in (ours, theirs)]
        for values in (systems for one in figures for systems in one["micro/test"].values()):
            values.pop("passages_per_second", None)
        assert figures[0] == figures[1], stage


@pytest.mark.slow
def test_half_a_run_here_and_half_there(smoke, tmp_path, hub, environment):
    """The first half is pushed; the second half runs in another folder, with another cache, from the Hub alone."""
    whole, overrides = smoke
    here, there = shutil.copytree(whole, tmp_path / "here"), tmp_path / "there"
    first = {**environment, **hub.environment(tmp_path / "home", token="hf_alice")}
    run([*command("smoke", here, *overrides, until="tpd_ranker"), "--push_to", "alice/prod"], first)
    shutil.rmtree(here)
    rows, models = ("base", "refresh_1"), ("student_warm", "teacher_warm", "tpd_dense", "ranker_small", "tpd_ranker")
    pushed = {name: hub.repo("alice/prod", "dataset").files(name) for name in rows}
    pushed |= {name: hub.repo("alice/prod").files(name) for name in models}
    assert all("recipe_record.json" in files for files in pushed.values())
    assert not any("tpd_large" in repo.branches for repo in hub.repos.values()), "the other half is not there"
    second = {**environment, **hub.environment(tmp_path / "other home", token="hf_alice")}
    second["HF_DISTILL_CACHE"] = str(tmp_path / "other cache")
    run([*command("smoke", there, *overrides), "--pull_from", "alice/prod"], second)
    records = {path.stem: json.loads(path.read_text()) for path in (there / "records").glob("[!c]*.json")}
    assert {name for name, record in records.items() if record["remote"] is not None} == {*rows, *models}
    assert not (there / "stages/base").exists(), "what no stage reads is not fetched"
    same_results(whole, there, "ranker_large", "tpd_large", "dpd")


def marco(folder: Path, micro: Path) -> Path:
    """The micro corpus in the files of MS MARCO passage ranking: numbers as identifiers, tab-separated, triples."""
    folder.mkdir()
    documents = [json.loads(line) for line in (micro / "corpus.jsonl").read_text().splitlines()]
    queries = [json.loads(line) for line in (micro / "queries.jsonl").read_text().splitlines()]
    passage = {document["_id"]: str(number) for number, document in enumerate(documents)}
    question = {query["_id"]: str(1_000_000 + number) for number, query in enumerate(queries)}
    texts = [f"{passage[one['_id']]}\t{one.get('title', '')} {one['text']}\n" for one in documents]
    (folder / "collection.tsv").write_text("".join(texts))
    generator, triples = random.Random(0), []
    for split in ("train", "dev"):
        judged = [line.split("\t") for line in (micro / "qrels" / f"{split}.tsv").read_text().splitlines()[1:]]
        used = {line[0] for line in judged}
        asked = [f"{question[one['_id']]}\t{one['text']}\n" for one in queries if one["_id"] in used]
        (folder / f"queries.{split}.tsv").write_text("".join(asked))
        lines = [f"{question[query]}\t0\t{passage[document]}\t1\n" for query, document, *_ in judged]
        (folder / f"qrels.{split}.tsv").write_text("".join(lines))
        if split == "train":
            for query, document, *_ in judged:
                others = [number for number in passage.values() if number != passage[document]]
                triples += [f"{question[query]}\t{passage[document]}\t{one}\n" for one in generator.sample(others, 8)]
    (folder / "qidpidtriples.train.full.2.tsv").write_text("".join(triples))
    return folder


@pytest.mark.slow
def test_paper_on_a_miniature(micro, tiny_bert_source, tmp_path, environment):
    """Only sizes are overridden."""
    sizes = ["warm_steps=2", "strong_steps=2", "ranker_steps=2", "tpd_steps=2", "dpd_steps=2", 'student_layers="2"']
    sizes += ["query_length=16", "passage_length=32", "pair_length=48", "negatives=3"]
    sizes += ["defaults.train.use_cpu=true", "defaults.distill.use_cpu=true", "defaults.mine.mine_depth=30"]
    sizes += [f"defaults.{verb}.report_to=none" for verb in ("train", "distill")]
    sizes += ["selected.rule=student >= 1 and teacher >= 1", f"encoder={tiny_bert_source}"]
    sizes += [f"large_encoder={tiny_bert_source}"]
    data = marco(tmp_path / "marco", micro)
    folder = tmp_path / "out"
    run(command("paper", folder, f"data={data}", *sizes), environment)
    metrics = json.loads((folder / "metrics.json").read_text())["marco/dev"]
    assert set(metrics["dpd"]) >= {"RR@10", "R@50", "R@1000"}
    student = json.loads((folder / "stages/dpd/hf_distill.json").read_text())
    assert "[SEP]" in json.dumps(student)
    assert (folder / "stages/tpd_large/query_model").is_dir() or (folder / "stages/tpd_large/modules.json").is_file()
    rows = json.loads((folder / "stages/refresh_1/metadata.json").read_text())
    assert rows["mining"]["depth"] == 30


def test_a_dry_run_names_what_is_wrong(micro, tiny_bert_source, tmp_path, capsys):
    words = [
        "recipe",
        "prod",
        "--profile",
        "smoke",
        "--set",
        f"data={micro}",
        f"encoder={tiny_bert_source}",
        "--dry_run",
    ]
    with pytest.raises(SystemExit):
        main([*words, "--output_dir", str(tmp_path), "--set", "dpd.negative_samplin=hardest"])
    assert "stage 'dpd', field 'negative_samplin'" in capsys.readouterr().err
    main([*words, "--output_dir", str(tmp_path / "out")])
    shown = capsys.readouterr()
    assert "operations" in shown.out and "in all" in shown.out
    assert not (tmp_path / "out" / "stages").exists()
