"""The recipes led and lexmae: their graphs, the published numbers, their estimates, and one killed in the middle."""

from __future__ import annotations

import os

import pytest

from hf_distill.files import read_json
from hf_distill.recipes import load_recipe
from hf_distill.recipes.cost import Cost
from hf_distill.recipes.records import Workspace
from tests.model_zoo import save_tiny
from tests.recipe_runs import command, measures, run_with_kills


STAGES = {
    "led": {"dense_warm", "lexical_warm", "lexical", "candidates", "by_lexical", "led", "led_ranker", "figures"},
    "lexmae": {"lexmae", "stage_1", "hard_1", "stage_2", "hard_2", "by_ranker", "stage_3", "figures"},
}


@pytest.mark.parametrize("profile", ["paper", "small", "smoke"])
@pytest.mark.parametrize("recipe", ["led", "lexmae"])
def test_every_profile_is_a_graph(recipe, profile):
    stages = load_recipe(recipe, profile, ["data=D"]).stages
    assert STAGES[recipe] <= set(stages)
    if profile != "paper":
        # What a method is compared with takes as many steps.
        same = ("led", "no_teacher", "led_ranker") if recipe == "led" else ("lexmae", "mlm")
        assert len({stages[name].settings["max_steps"] for name in same}) == 1


def test_the_published_numbers_of_led():
    """The table of the specification: learning rate, epochs, batch, negatives, warm-up, decay."""
    stages = load_recipe("led", "paper", ["data=D"]).stages
    table = {
        "dense_warm": (1e-5, 3, 16, 7, 0.01, 0.0),
        "lexical_warm": (3e-5, 3, 48, 5, 0.01, 0.01),
        "dense_continued": (5e-6, 3, 16, 7, 0.01, 0.0),
        "lexical": (2e-5, 3, 48, 5, 0.01, 0.01),
        "led": (5e-6, 3, 16, 32, 0.01, 0.0),
        "led_ranker": (5e-6, 3, 16, 32, 0.01, 0.0),
    }
    names = (
        "learning_rate", "num_train_epochs", "per_device_train_batch_size", "num_negatives", "warmup_steps",
        "weight_decay",
    )  # fmt: skip
    for name, row in table.items():
        settings = stages[name].settings
        assert tuple(settings[field] for field in names) == row, name
        lengths = (settings["query_length"], settings["passage_length"], settings["max_grad_norm"])
        assert lengths == (32, 128, 1.0), name
    flops = stages["lexical"].settings["losses"][1]
    assert flops["weight"] == 8e-4 and flops["weight"] * flops["query_ratio"] == pytest.approx(6e-4)
    for name, kept in (("official", 1000), ("mined_dense", 200), ("mined_lexical", 200), ("mined_again", 200)):
        mined = stages[name].settings
        assert (mined["mine_depth"], mined["mine_negatives"]) == (1000, kept), name
    starts = {name: stages[name].settings.get("student") or stages[name].settings["model"] for name in table}
    assert starts["led"] == starts["led_ranker"] == starts["dense_continued"] == "${dense_warm}"
    losses = {name: stages[name].settings["losses"] for name in ("led", "led_ranker")}
    rank = {name: next(one for one in terms if one["name"] == "rank_consistency") for name, terms in losses.items()}
    assert [(one["weight"], one["include_positive"]) for one in rank.values()] == [(1.0, True), (1.2, False)]
    # Published: a negative counts as often as it was drawn, and every judgement is an example.
    assert not any(one["mask_false_negatives"] for terms in losses.values() for one in terms)
    assert all(stages[name].settings["positive_sampling"] == "rotate" for name in table)
    kl = next(one for one in losses["led_ranker"] if one["name"] == "kl")
    assert (kl["weight"], kl["temperature"], kl["candidates"], kl["scale_by_temperature"]) == (1.5, 3, "own", True)


def test_the_published_numbers_of_lexmae():
    stages = load_recipe("lexmae", "paper", ["data=D"]).stages
    pretraining = stages["lexmae"].settings
    assert pretraining["num_train_epochs"] == 20 and pretraining["passage_length"] == 144
    for name, batch, negatives in (("stage_1", 24, 15), ("stage_2", 24, 15), ("stage_3", 16, 23)):
        settings = stages[name].settings
        assert settings["per_device_train_batch_size"] == batch and settings["num_negatives"] == negatives, name
        assert (settings["learning_rate"], settings["num_train_epochs"]) == (2e-5, 3), name
        assert (settings["warmup_steps"], settings["weight_decay"], settings["passage_length"]) == (0.05, 0.01, 144)
        start = settings.get("student") or settings["model"]
        assert start == "${lexmae}", "every stage starts from the pre-trained model"
    weights = [
        {loss["name"]: loss["weight"] for loss in stages[name].settings["losses"] if "weight" in loss}
        for name in ("stage_1", "stage_2", "stage_3")
    ]
    assert [one["flops"] for one in weights] == [0.002, 0.008, 0.008]
    assert weights[2]["contrastive"] == 0.2 and weights[2]["kl"] == 1.0
    for name in ("stage_1", "stage_2", "stage_3"):
        settings = stages[name].settings
        assert settings["positive_sampling"] == "rotate"
        assert not any(one["mask_false_negatives"] for one in settings["losses"] if one["name"] != "flops"), name
    assert stages["hard_1"].settings["mine_depth"] == stages["hard_2"].settings["mine_depth"] == 512
    assert (stages["hard_1"].settings["mine_negatives"], stages["hard_2"].settings["mine_negatives"]) == (200, 512)


def test_sources_may_be_weighted_and_duplicates_left_out():
    """All that takes part in the comparison draws from the same pool in the same way."""
    plain = load_recipe("led", "small", ["data=D"]).stages
    chosen = [
        "sources={co-stg1: 1, sp-stg2: 2}",
        "duplicates=false",
        'candidates.rows=["${official}", "${mined_again}"]',
    ]
    changed = load_recipe("led", "small", ["data=D", *chosen]).stages
    for name in ("led", "led_ranker", "no_teacher"):
        assert "negative_sources" not in plain[name].settings
        assert changed[name].settings["negative_sources"] == {"co-stg1": 1, "sp-stg2": 2}
    assert plain["candidates"].settings["duplicates"] is True
    assert changed["candidates"].settings["duplicates"] is False
    assert set(changed["candidates"].needs) == {"official", "mined_again"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, tiny_tokenizer):
    return save_tiny(tmp_path_factory.mktemp("recipes") / "bert", "bert", tiny_tokenizer, head="MaskedLM", layers=2)


def test_a_pretraining_is_estimated(micro, encoder, tmp_path):
    """Steps, batch, tokens, layers and vocabulary: against the same by hand."""
    chosen = [f"data={micro}", f"encoder={encoder}"]
    recipe = load_recipe("lexmae", "smoke", chosen)
    cost = Cost(recipe, Workspace(tmp_path))
    sizes = cost._collection(str(micro))
    lexmae, plain = cost.flops("lexmae"), cost.flops("mlm")
    width, inner, layers, terms = (
        read_json(encoder / "config.json")[name]
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    layer, head = 2 * (4 * width**2 + 2 * width * inner), 2 * width * terms
    tokens = 2 * 8 * min(32, sizes.tokens)
    assert plain == pytest.approx(tokens * 3 * (layers * layer + 0.3 * head))
    assert lexmae == pytest.approx(tokens * (3 * ((layers + 2) * layer + 0.8 * head) + head))
    # A lexical model makes the logits of every token, a ranker none.
    lexical, ranker = (cost._model(f"${{{name}}}") for name in ("stage_1", "own_ranker"))
    assert lexical.flops == layers * layer + head and ranker.flops == layers * layer and ranker.pairs
    epochs = load_recipe("lexmae", "paper", chosen)
    texts = 20 * (sizes.passages // 256 or 1) * 256
    estimate = Cost(epochs, Workspace(tmp_path)).flops("lexmae")
    assert estimate == pytest.approx(texts * sizes.tokens * (3 * ((layers + 2) * layer + 0.8 * head) + head))


@pytest.mark.slow
def test_killed_in_the_middle_the_result_is_the_same(micro, encoder, tmp_path):
    """`kill -9` three times between the beginning of the pre-training and the end of the first fine-tuning."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folders = [tmp_path / name / "out" for name in ("whole", "killed")]
    for folder, kills in zip(folders, (0, 3)):
        words = command(
            "lexmae", "smoke", folder, f"data={micro}", f"encoder={encoder}", "pretraining_steps=40", until="stage_1"
        )
        cache = {**environment, "HF_DISTILL_CACHE": str(folder.parent / "cache")}
        run_with_kills(words, cache, folder, kills, seed=1)
    stages = [folder / "stages" for folder in folders]
    for name in ("lexmae/model.safetensors", "lexmae/training_modules.safetensors", "stage_1/model.safetensors"):
        assert (stages[0] / name).read_bytes() == (stages[1] / name).read_bytes(), name
    assert measures(stages[0] / "stage_1") == measures(stages[1] / "stage_1")
