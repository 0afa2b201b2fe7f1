"""Pools of teleportation episodes on the Hub: a card for each episode, and the rows come back."""

from __future__ import annotations

import json

import pytest

from hf_distill.data import RowSet, load_collection

from .hub_client import verb


MINING = ["--depth", "30", "--query_negatives", "5", "--positive_negatives", "4"]


@pytest.fixture()
def pools(hub, hub_client, micro, tiny_bert, tmp_path):
    """The pools of two episodes: the first pushed when it was mined, the second later."""
    first, second = tmp_path / "pool_1", tmp_path / "pool_2"
    words = ["episode", "--data", micro, *MINING]
    one = [*words, "--model", tiny_bert, "--output_dir", first, "--push_to", "alice/pool_1"]
    assert hub_client(verb, *one) == (0, "")
    assert hub_client(verb, *words, "--model", "bm25", "--episode", "2", "--previous", first, "--seed", "7",
                      "--output_dir", second) == (0, "")  # fmt: skip
    assert hub_client(verb, "push", second, "--repo_id", "alice/pools", "--revision", "episode_2") == (0, "")
    return first, second


def facts(folder):
    return json.loads((folder / "metadata.json").read_text())["teleport"]


def line_of(source, miner, index, most, drawn, seed):
    return f"| `{source}` | `{miner}` | {index} | 30 | {most} | {drawn['negatives']:,} | " + (
        f"{drawn['positives_removed']:,} | {seed} |"
    )


def test_each_episode_has_a_card_of_its_negatives(hub, pools, tiny_bert, micro):
    collection = load_collection(micro)
    first, second = map(facts, pools)
    assert first["sources"]["query@1"]["positives_removed"] > 0 and second["previous"]["episode"] == 1
    rows = RowSet.load(pools[1], collection.queries, collection.corpus)
    counted = [name for row in range(len(rows)) for name in rows.values_at("sources", row)]
    for one in (first, second):
        for source, drawn in one["sources"].items():
            assert counted.count(source) == drawn["negatives"], source
    of_first = [
        line_of("query@1", tiny_bert, "Flat", 5, first["sources"]["query@1"], 42),
        line_of("positive@1", tiny_bert, "Flat", 4, first["sources"]["positive@1"], 42),
    ]
    of_second = [
        line_of("query@2", "bm25", "BM25", 5, second["sources"]["query@2"], 7),
        line_of("positive@2", "bm25", "BM25", 4, second["sources"]["positive@2"], 7),
    ]
    cards = {
        "first": hub.repo("alice/pool_1", "dataset").files()["README.md"].decode(),
        "second": hub.repo("alice/pools", "dataset").files("episode_2")["README.md"].decode(),
        "saved": (pools[1] / "README.md").read_text(),
    }
    assert "Negatives of episode 1 of ANCE-Tele for queries of *micro*" in cards["first"]
    assert all(line in cards["first"] for line in of_first) and "query@2" not in cards["first"]
    for name in ("second", "saved"):
        assert "Negatives of episode 2 of ANCE-Tele for queries of *micro*" in cards[name]
        places = [cards[name].index(line) for line in [*of_first, *of_second]]
        assert places == sorted(places), "episode by episode"
        assert f"Retriever of episode 1: `{tiny_bert}`" in cards[name] and "Code: hf_distill" in cards[name]
        assert rows.fingerprint in cards[name] and "hf_alice" not in cards[name]


def _come_back(repo, revision, folder):
    from hf_distill.data import load_collection

    load_collection(repo, revision=revision).rows("pool_2").save(folder)


def test_a_pushed_pool_comes_back_whole(hub_client, pools, tmp_path):
    import pyarrow.parquet as pq

    hub_client(_come_back, "alice/pools", "episode_2", tmp_path / "back")
    columns = ["query_id", "document_ids", "num_positives", "sources"]
    (back,), (sent,) = (sorted(folder.glob("*.parquet")) for folder in (tmp_path / "back", pools[1]))
    assert pq.read_table(back, columns=columns).equals(pq.read_table(sent, columns=columns))
    assert facts(tmp_path / "back") == facts(pools[1])


@pytest.mark.slow
def test_a_recipe_pushes_the_card_with_the_pool(hub, hub_client, micro, tiny_bert, tmp_path):
    words = ["recipe", "ance_tele", "--profile", "smoke", "--set", f"data={micro}", f"encoder={tiny_bert}"]
    words += ["--until", "pool_1", "--output_dir", tmp_path / "out", "--push_to", "alice/tele"]
    assert hub_client(verb, *words)[0] == 0
    files = hub.repo("alice/tele", "dataset").files("pool_1")
    assert {"README.md", "metadata.json", "run_manifest.json"} <= set(files)
    assert "| `positive@1` |" in files["README.md"].decode()
