"""A run that moves to another machine through the Hub (one on loopback)."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml


RECIPE = {
    "name": "sums",
    "variables": {"data": "???"},
    "stages": {
        "rows": {"verb": "mine", "data": "${data}", "model": "bm25", "amount": 3},
        "ranker": {"verb": "train", "data": "${data}", "model": "m/m", "rows": "${rows}", "amount": 1},
        "scored": {"verb": "score", "data": "${data}", "rows": "${rows}", "model": "${ranker}"},
        "student": {"verb": "train", "data": "${data}", "model": "m/m", "rows": "${scored}"},
    },
}


def run(path, folder, data, last=None, overrides=(), **options):
    """A run with a program that stands in for the commands; returns what happened to the stages."""
    from hf_distill.recipes import RecipeRun, load_recipe, processes, report, runner
    from tests.test_recipes_running import stand_in

    processes._start = stand_in
    runner.in_other_process = lambda *_: None
    report.in_other_process = lambda function, *arguments: function(*arguments)
    job = RecipeRun(load_recipe(path, overrides=[f"data={data}", *overrides]), folder, **options)
    actions = {name: decision.action for name, decision in job.decide().items()}
    job.run(last=last)
    return actions


@pytest.fixture()
def recipe(tmp_path) -> Path:
    path = tmp_path / "sums.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return path


def test_half_a_run_here_and_half_there(hub, hub_client, recipe, tmp_path, micro):
    hub_client(run, recipe, tmp_path / "whole", micro)
    hub_client(run, recipe, tmp_path / "here", micro, last="ranker", push_to="alice/sums")
    assert set(hub.repo("alice/sums").files("ranker")) >= {"total.json", "recipe_record.json"}
    assert set(hub.repo("alice/sums", "dataset").files("rows")) >= {"metadata.json", "recipe_record.json"}
    there = tmp_path / "there"
    actions = hub_client(run, recipe, there, micro, pull_from="alice/sums")
    assert actions == {"rows": "pulled", "ranker": "pulled", "scored": "new", "student": "new"}
    for stage in ("scored", "student"):
        names = ("total.json", "metrics.json")
        whole, moved = (
            [(tmp_path / place / "stages" / stage / n).read_text() for n in names] for place in ("whole", "there")
        )
        assert whole == moved
    assert (there / "stages/ranker/total.json").is_file() and not (there / "stages/ranker/recipe_record.json").exists()
    assert set(hub_client(run, recipe, there, micro).values()) == {"done"}


def test_only_what_is_needed_is_fetched(hub, hub_client, recipe, tmp_path, micro):
    hub_client(run, recipe, tmp_path / "here", micro, push_to="alice/sums")
    there = tmp_path / "there"
    actions = hub_client(run, recipe, there, micro, pull_from="alice/sums", overrides=["student.amount=5"])
    assert actions == {"rows": "pulled", "ranker": "pulled", "scored": "pulled", "student": "new"}
    assert (there / "stages/scored").is_dir() and not (there / "stages/ranker").exists()
    assert set(hub_client(run, recipe, there, micro, overrides=["student.amount=5"]).values()) == {"done"}


def test_other_settings_are_not_pulled(hub, hub_client, recipe, tmp_path, micro):
    hub_client(run, recipe, tmp_path / "here", micro, last="ranker", push_to="alice/sums")
    actions = hub_client(run, recipe, tmp_path / "there", micro, pull_from="alice/sums", overrides=["ranker.amount=9"])
    assert actions == {"rows": "pulled", "ranker": "new", "scored": "new", "student": "new"}


def test_a_hub_that_does_not_answer_loses_nothing(hub, hub_client, recipe, tmp_path, micro):
    hub.fail("POST", 403)
    hub_client(run, recipe, tmp_path / "here", micro, last="rows", push_to="alice/sums")
    assert any("stage rows is not pushed" in line for line in hub_client.log)
    hub.faults.clear()
    hub_client(run, recipe, tmp_path / "here", micro, last="rows", push_to="alice/sums")
    assert "recipe_record.json" in hub.repo("alice/sums", "dataset").files("rows")
