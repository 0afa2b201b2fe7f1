"""Two teleportation episodes and what they forgot, by the verbs of the recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from hf_distill.cli.main import main
from hf_distill.cli.parsing import parse_settings
from hf_distill.cli.train import VERB
from hf_distill.data import RowSet, load_collection
from hf_distill.recipes import load_recipe
from hf_distill.trainers.base import read_sources

from .test_cli_workflow import COMMON, fails


MINING = ["--depth", "30", "--query_negatives", "5", "--positive_negatives", "4"]


def words(**options) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture()
def episodes(micro, tiny_bert, tmp_path):
    """Folders of two pools and of the models trained on them."""
    miner, previous = tiny_bert, []
    for number in (1, 2):
        pool, model = tmp_path / f"pool_{number}", tmp_path / f"model_{number}"
        main(["episode", *words(data=micro, model=miner, episode=number, output_dir=pool), *MINING, *previous])
        main(
            ["train", *words(data=micro, model=tiny_bert, rows=pool, output_dir=model, max_steps=8, stop_after=4)]
            + [*COMMON, "--negative_sampling", "window", "--learning_rate", "1e-3", "--eval_strategy", "no"]
        )
        miner, previous = model, ["--previous", str(pool)]
    return tmp_path


def test_episodes_and_forgetting(episodes, micro, capsys):
    collection = load_collection(micro)
    first, second = (
        RowSet.load(episodes / f"pool_{number}", collection.queries, collection.corpus) for number in (1, 2)
    )
    assert set(second.values_at("sources", 0)) >= {"positive", "query@1", "positive@1", "query@2"}
    assert second.documents_at(0)[: first.lengths[0]].tolist() == first.documents_at(0).tolist()
    history = json.loads((episodes / "model_1" / "history.json").read_text())
    assert max(entry["step"] for entry in history) == 4
    pools, models = [episodes / f"pool_{number}" for number in (1, 2)], [episodes / f"model_{n}" for n in (1, 2)]
    folder = episodes / "forgetting"
    main(
        ["forgetting", *words(data=micro, model=models[1], twin=models[0], output_dir=folder)]
        + ["--rows", *map(str, pools)]
    )
    figures = json.loads((folder / "metrics.json").read_text())["micro/train"]
    assert list(figures) == ["pretrained", "episode_1", "episode_2"]
    ranks = pq.read_table(folder / "ranks.parquet").to_pydict()
    places = [[one or 10**6 for one in ranks[name]] for name in figures]
    worse = sum(b > a for a, b in zip(places[1], places[2])) / len(places[0])
    assert figures["episode_2"]["forgetting"] == pytest.approx(worse)
    assert figures["episode_2"]["n_queries"] == len(places[0])
    assert "noise" in figures["episode_2"] and "forgetting" not in figures["pretrained"]
    negatives = json.loads((folder / "negatives.json").read_text())
    assert sum(negatives["first_supplied_by"][1]) == pytest.approx(1)
    assert negatives["shared_with"][0][1] == 1  # momentum: all of the first pool is in the second
    assert len(list((folder / "plots").glob("*.png"))) == 2
    assert "forgetting" in capsys.readouterr().out


def test_bad_input(micro, tiny_bert, tmp_path, capsys):
    message = fails(capsys, "episode", *words(data=micro, model="bm25", episode=2, output_dir=tmp_path / "x"), *MINING)
    assert "momentum needs the pool of the episode before" in message
    main(["mine", *words(data=micro, model="bm25", output_dir=tmp_path / "rows", mine_depth=10)])
    message = fails(
        capsys,
        "forgetting",
        *words(data=micro, rows=tmp_path / "rows", model=tiny_bert, output_dir=tmp_path / "y"),
    )
    assert "hf-distill episode" in message


@pytest.mark.parametrize("profile", ["paper", "paper_nq", "paper_triviaqa", "small", "ablation", "smoke"])
def test_the_recipe_is_complete(profile, micro):
    recipe = load_recipe("ance_tele", profile, [f"data={micro}"])
    assert list(recipe.stages)[:3] == ["pool_1", "model_1", "pool_2"]
    last = recipe.stages["model_3"].settings
    assert "stop_after" not in last and recipe.stages["model_1"].settings["stop_after"] > 0
    assert recipe.stages["pool_3"].settings["previous"] == "${pool_2}"


def test_the_recipe_weighs_sources(micro):
    overrides = ["sampling=random", "source_weights={query: 1, lookahead: 1, momentum: 2}"]
    settings = load_recipe("ance_tele", "small", [f"data={micro}", *overrides]).stages["model_2"].settings
    options, *_ = [one for one in parse_settings(VERB, {**settings, "output_dir": "o"}, "model_2")
                   if hasattr(one, "negative_sources")]  # fmt: skip
    assert options.negative_sampling == "random"
    assert read_sources(options) == {"query": 1, "lookahead": 1, "momentum": 2}
    assert "negative_sources" not in load_recipe("ance_tele", "small", [f"data={micro}"]).stages["model_2"].settings


@pytest.mark.distributed
def test_two_processes_mine_the_same_pool(micro, tiny_bert, tmp_path):
    mining = words(data=micro, model=tiny_bert, dtype="float32")
    command = [sys.executable, "-m", "hf_distill", "--launch", "cpu:2", "episode"]
    environment = {**os.environ, "HF_DISTILL_CACHE": str(tmp_path / "cache of two"), "OMP_NUM_THREADS": "1"}
    two = tmp_path / "two"
    subprocess.run([*command, *mining, *MINING, "--output_dir", str(two)], check=True, env=environment)
    one = tmp_path / "one"
    main(["episode", *mining, *MINING, "--output_dir", str(one)])
    for file in ("train-00000-of-00001.parquet", "mining/ranks.parquet"):
        assert (one / file).read_bytes() == (two / file).read_bytes()
