"""The recipe of LEAD: every profile is a graph, and the published numbers stand in it."""

from __future__ import annotations

import pytest
import torch

from hf_distill.recipes import load_recipe
from hf_distill.recipes.cost import Cost, _in_bf16, machine_speed
from hf_distill.recipes.records import Workspace
from hf_distill.retrieval import choose_dtype


PAPER = ("paper", "paper_12de_6de", "paper_12ce_6de", "paper_24cb_12de", "paper_document")


@pytest.mark.parametrize("profile", [*PAPER, "small", "small_dense", "small_ranker", "comparison", "smoke"])
def test_every_profile_is_a_graph(profile):
    stages = load_recipe("lead", profile, ["data=D"]).stages
    wanted = {"first_miner", "hard", "student_warm", "teacher_warm", "lead", "response", "no_teacher", "figures"}
    assert wanted <= set(stages)
    assert stages["lead"].settings["method"] == "lead" and stages["response"].settings["method"] == "labelled_response"
    # What LEAD is compared with takes as many steps, as large and as fast, from the same start.
    alike = ("max_steps", "rows", "learning_rate", "gradient_accumulation_steps", "per_device_train_batch_size",
             "num_negatives", "warmup_steps", "max_grad_norm", "weight_decay", "seed", "bf16")  # fmt: skip
    for name in ("response", "no_teacher"):
        for key in alike:
            assert stages[name].settings.get(key) == stages["lead"].settings.get(key), (name, key)


@pytest.mark.parametrize(
    ("profile", "kind", "rate", "steps", "accumulation", "teacher_rate"),
    [
        ("paper", "multi_vector", 2e-5, 50000, 1, 2e-5),
        ("paper_12de_6de", "dense", 5e-5, 50000, 1, 2e-5),
        ("paper_12ce_6de", "cross_encoder", 5e-5, 100000, 10, 1e-5),
        ("paper_24cb_12de", "multi_vector", 2e-5, 50000, 1, 1e-5),
    ],
)
def test_the_published_numbers(profile, kind, rate, steps, accumulation, teacher_rate):
    stages = load_recipe("lead", profile, ["data=D"]).stages
    lead, teacher, student = (stages[name].settings for name in ("lead", "teacher_warm", "student_warm"))
    assert teacher["kind"] == kind and teacher["learning_rate"] == teacher_rate and teacher["max_steps"] == 20000
    assert (lead["learning_rate"], lead["max_steps"]) == (rate, steps)
    assert lead.get("gradient_accumulation_steps", 1) == accumulation
    assert lead["num_layer_pairs"] == 5 and lead["layer_resample_every"] == 10 and lead["layer_pairing"] == "random"
    assert lead["max_grad_norm"] == 2.0 and lead["weight_decay"] == 0.0 and lead["seed"] == 888
    assert student["pooling"] == "cls" and student["similarity"] == "dot" and not student["normalize"]
    assert student["max_steps"] == 20000 and student["learning_rate"] == 2e-5
    hard = stages["hard"].settings
    assert (hard["mine_depth"], hard["mine_window"], hard["mine_negatives"]) == (1000, "1,500", 100)
    if kind == "multi_vector":
        assert teacher["projection_dim"] == 0
    assert teacher.get("head") == ("linear" if kind == "cross_encoder" else None)


def test_every_baseline_starts_from_the_same_student():
    stages = load_recipe("lead", "baselines", ["data=D"]).stages
    methods = {"embedding": "embedding", "attention": "attention", "uniform": "lead_uniform", "frozen": "lead"}
    for name, method in methods.items():
        settings, reference = stages[name].settings, stages["lead"].settings
        differing = {key for key in reference if settings.get(key) != reference[key]}
        assert settings["method"] == method and differing <= {"method", "teacher_mode"}
    assert all(f"${{{name}}}" in stages["figures"].settings["model"] for name in (*methods, "lead", "response"))


def test_a_teacher_that_learns_along_is_reckoned_with(micro, tiny_bert, tmp_path):
    """Two models of one size that are trained together take twice the work; the student is measured."""
    recipe = load_recipe("lead", "smoke", [f"data={micro}", f"miner={tiny_bert}", "student_layers=null"])
    cost = Cost(recipe, Workspace(tmp_path))
    together, alone = cost.flops("lead"), cost.flops("no_teacher")
    sizes = cost._collection(str(micro))
    student = recipe.stages["no_teacher"]
    steps = cost._training(student, sizes, cost._model("${no_teacher}"))
    assert together - alone == pytest.approx(steps)


def test_every_stage_is_reckoned_with_in_its_own_precision():
    threads = torch.get_num_threads()
    assert machine_speed(bf16=False) > 0 and torch.get_num_threads() == threads
    small, smoke = (load_recipe("lead", profile, ["data=D"]).stages for profile in ("small", "smoke"))
    assert _in_bf16(small["lead"]) and not _in_bf16(smoke["lead"])
    assert _in_bf16(smoke["hard"]) == (choose_dtype("auto", "cpu") == "bfloat16")
