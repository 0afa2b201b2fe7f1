"""Every verb that makes something: its manifest names what it read, and the command that `reproduce` prints makes it
again, equal in every figure, weight and row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from hf_distill.cli.main import main
from hf_distill.cli.reproduce import compare_results
from hf_distill.data import load_collection, save_collection
from hf_distill.hub.manifest import artefacts

from .model_zoo import save_tiny
from .test_cli_reproduce import EVERYWHERE, manifest_of, reproduce


TRAINING = ["--use_cpu", "true", "--per_device_train_batch_size", "8", "--report_to", "none", "--eval_strategy", "no"]
ROWS = ["--num_negatives", "3", "--mine_depth", "20", "--mine_negatives", "8", "--max_steps", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, micro, tiny_bert_source, tiny_ranker_source, tiny_tokenizer):
    """What verbs start from, in a folder of its own."""
    root = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_bert_source, root / "bert")
    shutil.copytree(tiny_ranker_source, root / "ranker")
    save_tiny(root / "masked", "bert", tiny_tokenizer, head="MaskedLM", layers=2)
    save_collection(load_collection(micro, cache_dir=root / "collection"), root / "data")
    texts = [json.loads(line) for line in (micro / "corpus.jsonl").read_text().splitlines()]
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": one["text"]}) + "\n" for one in texts))
    (root / "answers.jsonl").write_text('{"query_id": "q1", "answers": ["a"]}\n')
    recipe = {
        "name": "two-steps",
        "variables": {"data": "???"},
        "stages": {
            "rows": {"verb": "mine", "data": "${data}", "model": "bm25", "mine_depth": 20},
            "figures": {"verb": "evaluate", "data": "${data}", "model": ["bm25"], "after": ["rows"]},
        },
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return root


def commands(root: Path) -> dict[str, list[str]]:
    """A command for each verb, without its output folder."""
    data, bert, ranker = ["--data", root / "data"], root / "bert", root / "ranker"
    pools = [root / "out" / "episode", root / "out" / "episode"]
    return {
        "distill": [*data, "--teacher", bert, "--student", "layers:2", *TRAINING, *ROWS],
        "progressive": [*data, "--student", bert, *TRAINING, *ROWS, "--phases", json.dumps(
            [{"name": "one", "teacher": [str(bert)], "losses": ["kl"]}]
        )],
        "tele": [*data, "--model", bert, "--episodes", "2", "--stop_after", "1", "--depth", "30", *TRAINING]
        + ["--query_negatives", "5", "--positive_negatives", "4", "--num_negatives", "3", "--max_steps", "2"],
        "pretrain": [*data, "--model", root / "masked", *TRAINING, "--max_steps", "2"],
        "pretrain on a stream": ["--stream", root / "texts.jsonl", "--model", root / "masked", *TRAINING]
        + ["--max_steps", "2", "--stream_buffer", "20"],
        "mine": [*data, "--model", "bm25", "--mine_depth", "20"],
        "score": [*data, "--rows", root / "out" / "mine", "--model", ranker],
        "pool": [*data, "--rows", root / "out" / "mine", root / "out" / "score"],
        "select": [*data, "--rows", root / "out" / "score", "--rule", "student >= 1"],
        "episode": [*data, "--model", bert, "--depth", "30", "--query_negatives", "5", "--positive_negatives", "4"],
        "forgetting": [*data, "--rows", *pools, "--model", bert],
        "evaluate": [*data, "--model", "bm25", bert],
        "compare": [root / "out" / "evaluate"],
        "convert": ["--input", root / "data"],
        "recipe": [root / "recipe.yaml", "--set", f"data={root / 'data'}"],
    }  # fmt: skip


VERBS = tuple(commands(Path()))
# What a command reads that another one has made.
NEEDS = {"score": ["mine"], "pool": ["mine", "score"], "select": ["score"], "forgetting": ["episode"]}
NEEDS["compare"] = ["evaluate"]


def made(place: Path, name: str) -> Path:
    """The folder in which a command has left its result, run now if it has not been."""
    folder = place / "out" / name
    if not folder.exists():
        for other in NEEDS.get(name, ()):
            made(place, other)
        main([name.split()[0], *map(str, commands(place)[name]), "--output_dir", str(folder)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", VERBS)
def test_made_again_it_is_equal(name, place, capsys, tmp_path, monkeypatch):
    verb, folder, again = name.split()[0], made(place, name), tmp_path / "again"
    words, manifest = [str(word) for word in commands(place)[name]], manifest_of(folder)
    assert EVERYWHERE - {"data", "precision"} <= set(manifest) and manifest["verb"] == verb
    named = {place / word for word in ("data", "bert", "ranker", "masked", "texts.jsonl", "recipe.yaml")}
    wanted = {str(one) for one in named if any(str(one) in word for word in words)}
    assert wanted <= {source["name"] for source in manifest["sources"]}
    if verb == "recipe":  # the stages have manifests of their own
        assert set(manifest["artefacts"]) == {"metrics.json", "report.md", "report.html"}
    else:
        assert manifest["artefacts"] == artefacts(folder) != {}
    printed, said = reproduce(capsys, folder, "--output_dir", again)
    assert printed[:2] == ["hf-distill", verb] and "those of the run" in said
    # With the cache of the first run, its own work would be found again.
    monkeypatch.setenv("HF_DISTILL_CACHE", str(tmp_path / "cache"))
    main(printed[1:])
    compare_results(manifest, manifest_of(again))
    assert "equal" in capsys.readouterr().out


def test_the_list_is_complete():
    """A verb that leaves a result is in the list above, or named here with the reason."""
    from hf_distill.cli.main import VERBS as ALL

    elsewhere = {
        "train": "test_cli_reproduce.py",
        "demo": "its stages are the verb distill's",
        "export": "test_cli_lexical.py",
    }
    leave_nothing = {"search", "explain", "push", "reproduce"}
    assert {name.split()[0] for name in VERBS} == set(ALL) - set(elsewhere) - leave_nothing
