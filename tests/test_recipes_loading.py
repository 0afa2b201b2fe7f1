"""Recipes: references, profiles, overrides, order, and the sentences for what is wrong in them."""

from __future__ import annotations

from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.errors import InputError
from hf_distill.recipes.loading import load_recipe, merged, recipe_folders, recipe_path


BASE = {
    "name": "little",
    "variables": {"data": "???", "encoder": "some/encoder", "both": ["${encoder}", "other/encoder"], "unset": None},
    "defaults": {"train": {"data": "${data}", "max_steps": 10, "seed": 1}},
    "stages": {
        "figures": {"verb": "evaluate", "data": "${data}", "model": ["bm25", "${ranker}", "${both}", "${unset}"]},
        "rows": {"verb": "mine", "data": "${data}", "model": "bm25"},
        "ranker": {"verb": "train", "model": "${encoder}", "rows": "${rows}", "max_steps": 20, "seed": "${unset}"},
    },
    "profiles": {
        "small": {"variables": {"encoder": "tiny/encoder"}, "stages": {"ranker": {"learning_rate": 1e-3}}},
        "smoke": {"extends": "small", "stages": {"ranker": {"max_steps": 2, "rows": None}, "rows": None}},
    },
}


@pytest.fixture()
def write(tmp_path):
    def write(content, name: str = "little.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return path

    return write


def changed(**sections):
    return merged(BASE, sections)


def test_references_are_filled_and_stages_sorted(write):
    recipe = load_recipe(write(BASE), overrides=["data=my/data"])
    assert list(recipe.stages) == ["rows", "ranker", "figures"]
    ranker = recipe.stages["ranker"]
    assert ranker.settings == {"data": "my/data", "max_steps": 20, "model": "some/encoder", "rows": "${rows}"}
    assert ranker.needs == ("rows",)
    assert recipe.stages["figures"].settings["model"] == ["bm25", "${ranker}", "some/encoder", "other/encoder"]
    assert ranker.filled(lambda stage: f"out/{stage}")["rows"] == "out/rows"


def test_profiles_extend_each_other_and_null_takes_away(write):
    recipe = load_recipe(write(BASE), "smoke", ["data=d"])
    assert list(recipe.stages) == ["ranker", "figures"]
    settings = recipe.stages["ranker"].settings
    assert settings["model"] == "tiny/encoder" and settings["max_steps"] == 2 and settings["learning_rate"] == 1e-3
    assert "rows" not in settings


def test_overrides_win_and_are_yaml(write):
    overrides = ["data=d", "ranker.learning_rate=2e-5", "ranker.losses=[{name: kl, weight: 0.5}]"]
    settings = load_recipe(write(BASE), "small", [*overrides, "defaults.train.max_steps=7"]).stages["ranker"].settings
    assert settings["learning_rate"] == 2e-5 and settings["losses"] == [{"name": "kl", "weight": 0.5}]
    assert settings["max_steps"] == 20, "the stage's own value is nearer than a default"


NAMES = st.sampled_from("abc")
VALUES = st.recursive(
    st.integers(), lambda one: st.dictionaries(st.sampled_from("abc"), one, min_size=1), max_leaves=6
)


def leaves(value, path=()):
    if not isinstance(value, dict):
        return {path: value}
    return {place: leaf for name, one in value.items() for place, leaf in leaves(one, (*path, name)).items()}


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(NAMES, VALUES), st.dictionaries(NAMES, VALUES))
def test_what_lies_over_wins_and_the_rest_stays(base, over):
    result, above = leaves(merged(base, over)), leaves(over)
    assert above.items() <= result.items()
    for place, leaf in leaves(base).items():
        covered = any(place[: len(other)] == other or other[: len(place)] == place for other in above)
        assert covered or result[place] == leaf
    assert set(result) <= {*above, *leaves(base)}


@pytest.mark.parametrize(
    ("content", "profile", "overrides", "message"),
    [
        (changed(stages={"rows": {"model": "${ranker}"}}), None, ["data=d"], r"rows -> ranker -> rows|ranker -> rows"),
        (changed(stages={"ranker": {"rows": "${rosw}"}}), None, ["data=d"], "Did you mean rows"),
        (changed(stages={"ranker": {"verb": "trian"}}), None, ["data=d"], "Did you mean train"),
        (changed(stages={"ranker": {"after": ["nobody"]}}), None, ["data=d"], "there is no stage 'nobody'"),
        (changed(stages={"ranker": {"output_dir": "x"}}), None, ["data=d"], "The recipe decides that"),
        (BASE, None, ["data=d", "ranker.hub_token=hf_x"], "ranker', hub_token: a secret, which no recipe may hold"),
        (changed(stages={"rank er": {"verb": "train"}}), None, ["data=d"], "no name for a stage"),
        (changed(stages={"data": {"verb": "train"}}), None, ["data=d"], "both a variable and a stage"),
        (changed(variables={"a": "${b}", "b": "${a}"}), None, ["data=d"], "a -> b -> a"),
        (changed(profles={}), None, ["data=d"], "Did you mean profiles"),
        (changed(profiles={"small": {"stage": {}}}), "small", ["data=d"], "Did you mean stages"),
        (changed(profiles={"small": {"extends": "smoke"}}), "smoke", ["data=d"], "in a circle"),
        (BASE, "smal", ["data=d"], "Did you mean small"),
        (BASE, None, [], "Add --set data="),
        (BASE, None, ["dat=d"], "Did you mean data"),
        (BASE, None, ["rankr.seed=1"], "Did you mean ranker.seed"),
        (BASE, None, ["ranker.seed"], "is no override"),
        ({"stages": {}}, None, [], "there are no stages"),
        ({"stages": {"x": {"model": "m"}}}, None, [], "names no verb"),
        ("stages: {a: {verb: train}, a: {verb: mine}}", None, [], "'a' stands there twice"),
        ("stages: [a", None, [], "not readable as YAML"),
        ("[1]", None, [], "must be a mapping"),
    ],
)
def test_what_is_wrong_is_said(write, content, profile, overrides, message):
    with pytest.raises(InputError, match=message):
        load_recipe(write(content), profile, overrides)


def test_a_recipe_of_the_package_is_found_by_name(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="there is no recipe 'nonesuch'"):
        recipe_path("nonesuch")
    assert recipe_path("prod").name == "prod.yaml"
    # An installation has them where the second folder looks.
    installed = tmp_path / "share" / "hf_distill" / "recipes"
    installed.mkdir(parents=True)
    (installed / "mine.yaml").write_text("stages: {}")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert recipe_folders()[1] == installed and recipe_path("mine") == installed / "mine.yaml"
    setup = ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    assert setup["options.data_files"]["share/hf_distill/recipes"] == "run_scripts/recipes/*.yaml"


def test_parts(write):
    recipe = load_recipe(write(BASE), overrides=["data=d"])
    assert recipe.part("ranker", None) == ["ranker", "figures"] and recipe.part(None, "rows") == ["rows"]
    with pytest.raises(InputError, match="comes before"):
        recipe.part("figures", "rows")
    with pytest.raises(InputError, match="Did you mean rows"):
        recipe.part("row", None)
