"""Saved folders open in other libraries, in a process that cannot import this one, with the same outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_distill.models import CrossEncoderRanker, DenseRetriever, load_model, student_from

from .model_zoo import PAIRS, TEXTS, pair_scores, save_tiny, tokenizer_for, vectors


FOREIGN = """
import json, sys
sys.modules["hf_distill"] = None
import numpy as np
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoModel, AutoModelForSequenceClassification
cases = json.load(open(sys.argv[1]))
for folder, case in cases["folders"].items():
    outputs = {}
    if case["kind"] == "dense":
        model = SentenceTransformer(folder)
        options = {"batch_size": 3, "show_progress_bar": False}
        outputs["query"] = model.encode_query(cases["texts"], **options)
        outputs["passage"] = model.encode_document(cases["texts"], **options)
        outputs["similarity"] = model.similarity(outputs["query"], outputs["passage"]).numpy()
        for number, subfolder in enumerate(case["subfolders"]):
            opened = AutoModel.from_pretrained(folder, subfolder=subfolder)
            inner = model[0] if subfolder == "" else model[0].sub_modules[["query", "document"][number]][0]
            theirs = dict(inner.model.named_parameters())
            for name, value in opened.named_parameters():
                # A pooler that the checkpoint does not have is made anew, and used by nobody.
                assert (theirs[name] == value).all() or not case["pooler"] and "pooler" in name, (folder, name)
    else:
        model = CrossEncoder(folder)
        options = {"batch_size": 3, "show_progress_bar": False}
        outputs["scores"] = model.predict([tuple(pair) for pair in cases["pairs"]], **options)
        AutoModelForSequenceClassification.from_pretrained(folder)
        assert model.model.config.num_labels == 1
    assert "hf_distill" not in {name for name, module in sys.modules.items() if module is not None}
    np.savez(folder + "/foreign.npz", **outputs)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_tokenizer):
    """Every case's model, saved; and what the other libraries make of all of them, in one fresh process."""
    root = tmp_path_factory.mktemp("exported")
    sources = tmp_path_factory.mktemp("sources")
    right, left = tokenizer_for(tiny_tokenizer), tokenizer_for(tiny_tokenizer, "left", specials=False)
    bert = save_tiny(sources / "bert", "bert", tiny_tokenizer)
    ranker = save_tiny(sources / "ranker", "bert", tiny_tokenizer, head="SequenceClassification", num_labels=1)
    lengths = {"query_length": 8, "passage_length": 24}
    prompts = {"query_prompt": "query: ", "passage_prompt": "the text: "}
    torch.manual_seed(5)

    def dense(source, **settings):
        return DenseRetriever.from_pretrained(source, **settings)

    models = {
        "mean": dense(bert),
        "cls": dense(bert, pooling="cls", normalize=True, **prompts, **lengths),
        "last": dense(bert, pooling="last", similarity="dot", **lengths),
        "projection": dense(bert, projection_dim=16, normalize=True, **prompts),
        "projection-plain": dense(bert, projection_dim=48, pooling="cls"),
        "towers": dense(bert, tied=False, **prompts, **lengths),
        "towers-projection": dense(bert, tied=False, projection_dim=16, normalize=True, pooling="cls"),
        "layers": student_from("layers:2:even", bert, normalize=True),
        "masked-lm": dense(save_tiny(sources / "mlm", "bert", right, head="MaskedLM")),
        "llama-left": dense(save_tiny(sources / "llama", "llama", left), pooling="last", **prompts, **lengths),
        "qwen-right": dense(
            save_tiny(sources / "qwen", "qwen2", tokenizer_for(tiny_tokenizer, specials=False), head="CausalLM"),
            normalize=True,
            **prompts,
        ),
        "lora": dense(bert, **prompts),
        "lora-towers": dense(bert, tied=False),
        "ranker": CrossEncoderRanker.from_pretrained(ranker),
        "ranker-prompt": CrossEncoderRanker.from_pretrained(ranker, query_prompt="find: ", max_length=20),
        "ranker-new-head": CrossEncoderRanker.from_pretrained(bert, max_length=30),
        "ranker-linear-head": CrossEncoderRanker.from_pretrained(bert, head="linear"),
        "ranker-lora": CrossEncoderRanker.from_pretrained(ranker),
        "ranker-linear-lora": CrossEncoderRanker.from_pretrained(bert, head="linear"),
        "ranker-qwen": CrossEncoderRanker.from_pretrained(sources / "qwen", max_length=40),
    }
    for family in ("roberta", "distilbert", "modernbert"):
        models[family] = dense(save_tiny(sources / family, family, right), **prompts)
        source = save_tiny(sources / f"{family}-ranker", family, right, head="SequenceClassification", num_labels=1)
        models[f"{family}-ranker"] = CrossEncoderRanker.from_pretrained(source)
    models["roberta-linear-head"] = CrossEncoderRanker.from_pretrained(sources / "roberta", head="linear")
    models["t5"] = dense(save_tiny(sources / "t5", "t5", right), normalize=True)
    for name in ("towers", "towers-projection", "lora-towers"):
        with torch.no_grad():
            for parameter in models[name].passage_backbone.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    for name in ("lora", "lora-towers", "ranker-lora", "ranker-linear-lora"):
        _adapt(models[name])
    expected, cases = {}, {"texts": TEXTS, "pairs": PAIRS, "folders": {}}
    for name, model in models.items():
        folder = root / name
        model.save_pretrained(folder)
        is_dense = isinstance(model, DenseRetriever)
        subfolders = ["query_0_Transformer", "document_0_Transformer"] if "towers" in name else [""]
        if name == "t5":
            subfolders = []  # AutoModel would add a decoder
        cases["folders"][str(folder)] = {"kind": "dense" if is_dense else "ranker", "subfolders": subfolders}
        cases["folders"][str(folder)]["pooler"] = name != "masked-lm"
        if is_dense:
            expected[name] = {kind: vectors(model, TEXTS, kind) for kind in ("query", "passage")}
            scores = model.similarity_scores(expected[name]["query"], expected[name]["passage"])
            expected[name]["similarity"] = scores * model.config.temperature
        else:
            expected[name] = {"scores": pair_scores(model, PAIRS)}
    (root / "cases.json").write_text(json.dumps(cases))
    run = subprocess.run(
        [sys.executable, "-c", FOREIGN, str(root / "cases.json")], cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return root, models, expected


def _adapt(model) -> None:
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=4, target_modules=["query", "value"], lora_alpha=16))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)


CASES = [
    *("mean", "cls", "last", "projection", "projection-plain", "towers", "towers-projection", "layers", "masked-lm"),
    *("llama-left", "qwen-right", "lora", "lora-towers", "ranker", "ranker-prompt", "ranker-new-head", "ranker-lora"),
    *("ranker-qwen", "roberta", "roberta-ranker", "distilbert", "distilbert-ranker", "modernbert"),
    *("modernbert-ranker", "t5", "ranker-linear-head", "ranker-linear-lora", "roberta-linear-head"),
]


@pytest.mark.parametrize("name", CASES)
def test_other_libraries_give_the_same_outputs(exported, name):
    root, _, expected = exported
    foreign = np.load(root / name / "foreign.npz")
    assert set(foreign) == set(expected[name])
    for key, ours in expected[name].items():
        # The models tell texts apart, so agreement means something.
        assert ours.flatten().std() > 1e-3
        np.testing.assert_allclose(foreign[key], ours.numpy(), atol=1e-5, rtol=1e-5, err_msg=f"{name}, {key}")


@pytest.mark.parametrize("name", CASES)
def test_saved_models_are_read_back_the_same(exported, name):
    root, models, expected = exported
    again = load_model(root / name)
    assert type(again) is type(models[name])
    assert again.processor().settings() == models[name].processor().settings()
    if "lora" not in name:
        assert again.weights_fingerprint() == models[name].weights_fingerprint()
    if isinstance(again, DenseRetriever):
        assert again.config.temperature == models[name].config.temperature
        for kind in ("query", "passage"):
            torch.testing.assert_close(vectors(again, TEXTS, kind), expected[name][kind], atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(pair_scores(again, PAIRS), expected[name]["scores"], atol=1e-5, rtol=1e-5)


def test_prompts_and_lengths_matter_in_these_cases(exported):
    _, models, expected = exported
    query, passage = expected["cls"]["query"], expected["cls"]["passage"]
    assert (query - passage).abs().max() > 1e-2
    processor = models["cls"].processor()
    assert max(map(len, processor.queries(TEXTS))) == 8 and max(map(len, processor.passages(TEXTS))) == 24


def test_a_folder_of_two_towers_opens_as_nothing_else(exported):
    root, _, _ = exported
    assert not (root / "towers" / "config.json").exists()
    assert not (root / "towers" / "model.safetensors").exists()


def test_exported_files_name_nothing_of_this_library(exported):
    root, _, _ = exported
    for name in CASES:
        for file in Path(root / name).rglob("*.json"):
            if file.name not in ("hf_distill.json",):
                assert "hf_distill" not in file.read_text(encoding="utf-8"), file
