"""Episodes in one process: finished ones are kept, cut-off ones go on, and the verbs give the same weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from hf_distill.cli.main import main
from hf_distill.data import RowSet, load_collection
from hf_distill.errors import InputError
from hf_distill.models import load_model
from hf_distill.retrieval.teleport import EpisodeOptions
from hf_distill.trainers import TeleTrainer, TeleTrainingArguments

from .conftest import MICRO
from .test_cli_episodes import MINING, words


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return load_collection(MICRO, cache_dir=tmp_path_factory.mktemp("collection"))


def episodes(folder, model, collection, cache, callbacks=None, tied=True, **settings) -> TeleTrainer:
    settings = {"episodes": 2, "max_steps": 8, "stop_after": 4, "num_negatives": 3, **settings}
    args = TeleTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        save_steps=2,
        eval_strategy="no",
        report_to="none",
        **settings,
    )
    mining = EpisodeOptions(depth=30, query_negatives=5, positive_negatives=4)
    return TeleTrainer(
        load_model(model, **({} if tied else {"tied": False})),
        args,
        collection,
        episode=mining,
        retrieval={"cache_dir": cache, "dtype": "float32"},
        callbacks=callbacks,
    )


def weights(folder) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


def assert_equal(one, other) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, msg=name)


@pytest.fixture()
def straight(tiny_bert, collection, tmp_path):
    trainer = episodes(tmp_path / "straight", tiny_bert, collection, tmp_path / "cache")
    return trainer, trainer.train()


def test_episodes(straight, tiny_bert, collection, tmp_path):
    trainer, changes = straight
    folder = tmp_path / "straight"
    assert [change.name for change in changes] == ["pretrained", "episode_1", "episode_2"]
    assert [json.loads((folder / f"episode_{n}" / "episode.json").read_text())["steps"] for n in (1, 2)] == [4, 8]
    assert_equal(weights(folder), weights(folder / "episode_2"))
    assert_equal(trainer.model.state_dict(), weights(folder))
    pool = RowSet.load(folder / "episode_2" / "pool", collection.queries, collection.corpus)
    assert set(pool.values_at("sources", 0)) >= {"query@1", "positive@1"}
    assert (folder / "forgetting" / "plots" / "negatives.png").is_file()
    # Again: nothing is trained, and the same is there.
    state = (folder / "episode_1" / "model.safetensors").stat().st_mtime_ns
    again = episodes(folder, tiny_bert, collection, tmp_path / "cache").train()
    assert again == changes
    assert (folder / "episode_1" / "model.safetensors").stat().st_mtime_ns == state
    with pytest.raises(InputError, match="episode 1 of other settings"):
        episodes(folder, tiny_bert, collection, tmp_path / "cache", weight_decay=0.5).train()


def test_a_cut_off_episode_goes_on(straight, tiny_bert, collection, tmp_path):
    folder = tmp_path / "parts"
    shutil.copytree(tmp_path / "straight", folder)
    # As after a kill in the second episode, behind its checkpoint of step 6.
    (folder / "episode_2" / "episode.json").unlink()
    (folder / "episode_2" / "model.safetensors").unlink()
    shutil.rmtree(folder / "episode_2" / "checkpoint-8")
    episodes(folder, tiny_bert, collection, tmp_path / "cache").train()
    assert_equal(weights(folder), weights(tmp_path / "straight"))


def test_the_verbs_give_the_same_weights(straight, tiny_bert, tmp_path):
    miner, previous = tiny_bert, []
    for number in (1, 2):
        pool, model = tmp_path / f"pool_{number}", tmp_path / f"model_{number}"
        main(
            ["episode", *words(data=MICRO, model=miner, episode=number, output_dir=pool, dtype="float32")]
            + [*MINING, *previous]
        )
        stop = ["--stop_after", "4"] if number == 1 else []
        options = words(
            data=MICRO, model=tiny_bert, rows=pool, output_dir=model, max_steps=8, save_steps=2, use_cpu="true",
            per_device_train_batch_size=8, num_negatives=3, learning_rate=1e-3, eval_strategy="no", report_to="none",
            negative_sampling="window", positive_sampling="rotate",
        )  # fmt: skip
        main(["train", *options, *stop])
        miner, previous = model, ["--previous", str(pool)]
    assert_equal(weights(tmp_path / "model_2"), weights(tmp_path / "straight"))


def test_one_command(straight, tiny_bert, tmp_path, capsys):
    folder = tmp_path / "command"
    options = words(
        data=MICRO, model=tiny_bert, output_dir=folder, episodes=2, max_steps=8, stop_after=4, save_steps=2,
        use_cpu="true", per_device_train_batch_size=8, num_negatives=3, learning_rate=1e-3, eval_strategy="no",
        report_to="none", dtype="float32",
    )  # fmt: skip
    main(["tele", *options, *MINING])
    assert_equal(weights(folder), weights(tmp_path / "straight"))
    figures = json.loads((folder / "metrics.json").read_text())["micro/test"]
    assert set(figures) == {"bm25", "before", "episode_1", "episode_2"}
    assert (
        "ANCE-Tele" in (folder / "README.md").read_text()
        and "teleportation" in (folder / "README.md").read_text().lower()
    )
    manifest = json.loads((folder / "run_manifest.json").read_text())
    assert manifest["training"]["steps"] == 12 and manifest["data"]["rows"]["provenance"]["teleport"]["episode"] == 2


def test_weighted_sources_and_two_towers(tiny_bert, collection, tmp_path):
    """Of the first pool, which has none before it, the weight of momentum is nobody's."""
    weights = '{"query": 1, "lookahead": 1, "momentum": 2}'
    trainer = episodes(
        tmp_path / "out", tiny_bert, collection, tmp_path / "cache", tied=False,
        negative_sampling="random", negative_sources=weights, gradient_cache_size=4,
    )  # fmt: skip
    trainer.train()
    model = load_model(tmp_path / "out")
    assert not model.config.tied
    towers = [next(tower.parameters()) for tower in model.towers.values()]
    assert len(towers) == 2 and not torch.equal(*towers), "trained apart"


def test_bad_input(tiny_bert, collection, tmp_path):
    with pytest.raises(InputError, match="episode_negatives"):
        episodes(tmp_path / "a", tiny_bert, collection, tmp_path, episode_negatives="3")
    with pytest.raises(InputError, match="'querry' is no source of every episode.*query, lookahead, momentum"):
        episodes(tmp_path / "a", tiny_bert, collection, tmp_path, negative_sources='{"querry": 1}')
    with pytest.raises(InputError, match="'window' takes negatives as they come"):
        episodes(tmp_path / "a", tiny_bert, collection, tmp_path, negative_sources='{"query": 1, "momentum": 2}')
    with pytest.raises(InputError, match="0 episodes"):
        episodes(tmp_path / "a", tiny_bert, collection, tmp_path, episodes=0)
    with pytest.raises(InputError, match="go on by themselves"):
        episodes(tmp_path / "a", tiny_bert, collection, tmp_path).train("a/checkpoint-2")
