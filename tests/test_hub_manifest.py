"""Manifest and card: complete, and without secrets."""

from __future__ import annotations

import sys

import pytest
from huggingface_hub import ModelCard

from hf_distill.errors import InputError
from hf_distill.hub.cards import bibtex, template_path, usage_of, write_model_card
from hf_distill.hub.manifest import run_manifest, without_secrets
from hf_distill.trainers import DistillTrainer


def test_no_secret_reaches_a_manifest(monkeypatch):
    flags = ["--hub_token", "hf_one", "--hub-token=hf_two", "--seed", "3", "--token_budget", "9"]
    monkeypatch.setattr(sys, "argv", ["run_distill.py", *flags])
    manifest = run_manifest(
        settings={
            "hub_token": "hf_three",
            "nested": [{"api_key": "hf_four"}],
            "token_budget": 4096,
            "push_token": None,
        }
    )
    text = str(manifest)
    assert not [secret for secret in ("hf_one", "hf_two", "hf_three", "hf_four") if secret in text]
    assert manifest["command"] == [
        "run_distill.py", "--hub_token", "<hidden>", "--hub-token=<hidden>", "--seed", "3", "--token_budget", "9",
    ]  # fmt: skip
    assert manifest["settings"]["token_budget"] == 4096
    assert manifest["settings"]["push_token"] is None


def test_names_that_only_sound_secret_stay():
    harmless = {"tokenizer.json": "1", "include_tokens_per_second": True, "token_budget": 3, "special_tokens_map": 4}
    assert without_secrets(harmless) == harmless
    secret = {"HF_TOKEN": "a", "wandb-api-key": "b", "access_token": "c", "db.password": "d"}
    assert set(without_secrets(secret).values()) == {"<hidden>"}


def test_a_copy_is_blanked_not_the_original():
    settings = {"hub_token": "hf_one"}
    without_secrets(settings)
    assert settings == {"hub_token": "hf_one"}


def test_manifest_says_what_a_repetition_needs():
    manifest = run_manifest(seeds={"seed": 1})
    assert {"command", "code", "versions", "hardware", "world_size", "made", "seeds"} <= set(manifest)
    assert {"python", "hf_distill", "torch", "transformers", "datasets"} <= set(manifest["versions"])
    assert manifest["hardware"]["cores"] >= 1 and manifest["hardware"]["processor"]


def test_card_is_read_back_by_the_hub_client(tmp_path):
    local = tmp_path / "local-teacher"
    local.mkdir()
    path = write_model_card(
        tmp_path,
        title="student",
        summary="A small retriever.",
        kind="dense",
        results="| system | nDCG@10 |",
        training="- 3 steps",
        base_models=["sentence-transformers/all-MiniLM-L6-v2", str(local), "sentence-transformers/all-MiniLM-L6-v2"],
        datasets=["BeIR/scifact"],
        tags=["distillation"],
        measured={"nDCG@10": 0.51239},
        collection="scifact",
        split="test",
        citation=bibtex(DistillTrainer._paper),
    )
    card = ModelCard.load(path)
    assert card.data.base_model == ["sentence-transformers/all-MiniLM-L6-v2"]
    assert card.data.library_name == "sentence-transformers" and card.data.pipeline_tag == "sentence-similarity"
    assert card.data.datasets == ["BeIR/scifact"]
    result = card.data.eval_results[0]
    assert (result.metric_name, result.metric_value, result.dataset_split) == ("nDCG@10", 0.5124, "test")
    assert "Geoffrey Hinton and Oriol Vinyals and Jeff Dean" in card.text and "1503.02531" in card.text
    assert str(local) not in path.read_text()


@pytest.mark.parametrize(
    ("kind", "loader"),
    [
        ("dense", "SentenceTransformer"),
        ("sparse", "SparseEncoder"),
        ("tokens", "MultiVectorEncoder"),
        ("pair", "CrossEncoder"),
    ],
)
def test_the_card_shows_how_each_kind_is_loaded(kind, loader):
    import sentence_transformers

    shown = usage_of(kind, "me/model")
    assert f'{loader}("me/model")' in shown and f"import {loader}\n" in shown
    for method in ("encode_query", "encode_document", "similarity", "predict"):
        assert f"model.{method}(" not in shown or hasattr(getattr(sentence_transformers, loader), method)


def test_card_templates_are_found_in_an_installation_too(tmp_path, monkeypatch):
    from hf_distill.hub import cards

    checkout = template_path("student")
    installed = tmp_path / "share" / "hf_distill" / "model_cards" / "student.md"
    installed.parent.mkdir(parents=True)
    installed.write_bytes(checkout.read_bytes())
    monkeypatch.setattr(cards, "__file__", str(tmp_path / "lib" / "hf_distill" / "hub" / "cards.py"))
    monkeypatch.setattr(cards.sysconfig, "get_path", lambda name: str(tmp_path))
    assert template_path("student") == installed
    with pytest.raises(InputError, match="no card template other.md"):
        template_path("other")
