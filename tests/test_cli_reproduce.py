"""Manifests of all verbs, and `hf-distill reproduce`: the command, what changed since, and what comes out again."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
from pathlib import Path

import pytest

from hf_distill.cli.main import main
from hf_distill.cli.reproduce import compare_results
from hf_distill.data import load_collection, save_collection
from hf_distill.files import write_json


EVERYWHERE = {
    "verb", "made", "command", "arguments", "config", "code", "versions", "hardware", "world_size", "launch", "times",
    "seeds", "precision", "sources", "data", "artefacts",
}  # fmt: skip
TRAINING = ["--use_cpu", "true", "--per_device_train_batch_size", "8", "--num_negatives", "3", "--max_steps", "4"]
TRAINING += ["--mine_depth", "20", "--mine_negatives", "8", "--report_to", "none", "--eval_strategy", "no"]


class Workplace:
    """A collection in our own layout, a model, and what each verb made of them."""

    def __init__(self, root: Path, micro: Path, bert: Path):
        self.root, self.bert = root, shutil.copytree(bert, root / "bert")
        self.data = save_collection(load_collection(micro), root / "data")
        self.trained, self.rows, self.scored = root / "trained", root / "rows", root / "scored"
        self.figures = root / "figures"
        (root / "train.yaml").write_text("learning_rate: 0.001\nseed: 3\nhub_token: hf_verysecret\n")
        data = ["--data", str(self.data)]
        main(["train", *data, "--model", str(self.bert), "--output_dir", str(self.trained), *TRAINING]
             + ["--config", str(root / "train.yaml"), "--logging_steps", "1"])  # fmt: skip
        main(["mine", *data, "--model", "bm25", "--output_dir", str(self.rows), "--mine_depth", "20"])
        main(["score", *data, "--rows", str(self.rows), "--model", str(self.bert), "--output_dir", str(self.scored)])
        main(["evaluate", *data, "--model", "bm25", str(self.bert), "--output_dir", str(self.figures)])


@pytest.fixture(scope="module")
def place(tmp_path_factory, micro, tiny_bert_source):
    os.environ["HF_DISTILL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return Workplace(tmp_path_factory.mktemp("place"), micro, tiny_bert_source)


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "run_manifest.json").read_text())


def reproduce(capsys, *argv, code: int | None = None) -> tuple[list[str], str]:
    """The words of the printed command, and what was said."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("hf_distill").addHandler(handler)
    try:
        if code is None:
            main(["reproduce", *map(str, argv)])
        else:
            with pytest.raises(SystemExit) as end:
                main(["reproduce", *map(str, argv)])
            assert end.value.code == code
    finally:
        logging.getLogger("hf_distill").removeHandler(handler)
    shown = capsys.readouterr()
    lines = [line for line in shown.out.splitlines() if line.startswith("hf-distill ")]
    return shlex.split(lines[0]) if lines else [], "\n".join([*said, shown.err])


def test_every_verb_writes_a_complete_manifest(place):
    for folder, verb in (
        (place.trained, "train"),
        (place.rows, "mine"),
        (place.scored, "score"),
        (place.figures, "evaluate"),
    ):
        manifest = manifest_of(folder)
        assert EVERYWHERE <= set(manifest), (verb, EVERYWHERE - set(manifest))
        assert manifest["verb"] == verb and manifest["command"][:2] == ["hf-distill", verb]
        assert "hf_verysecret" not in (folder / "run_manifest.json").read_text()
        assert manifest["data"]["fingerprint"] == load_collection(place.data).fingerprint
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        left_out = {name for name in files if name.startswith((".", "checkpoint-", "run_manifest"))}
        assert set(manifest["artefacts"]) == files - left_out
        assert manifest["times"]["seconds"] >= 0 and manifest["hardware"]["threads"] >= 1
    trained = manifest_of(place.trained)
    assert trained["seeds"]["seed"] == 3 and trained["config"]["learning_rate"] == 0.001
    assert trained["precision"]["training"] == "float32" and trained["config"]["hub_token"] == "<hidden>"
    assert "--learning_rate=0.001" in trained["arguments"] and "--config" in trained["command"]
    kinds = {(source["kind"], source["name"]) for source in trained["sources"]}
    assert kinds == {("data", str(place.data)), ("model", str(place.bert))}
    assert ("rows", str(place.rows)) in {(s["kind"], s["name"]) for s in manifest_of(place.scored)["sources"]}
    weights = json.loads((place.trained / "run_manifest.json").read_text())["artefacts"]["model.safetensors"]
    import hashlib

    assert weights["sha256"] == hashlib.sha256((place.trained / "model.safetensors").read_bytes()).hexdigest()


def test_rows_with_a_manifest_beside_them_are_still_rows(place):
    data = load_collection(place.data)
    from hf_distill.data import RowSet

    rows = RowSet.load(place.scored, data.queries, data.corpus)
    assert len(rows) == manifest_of(place.scored)["data"]["rows"]["number"] > 30


def test_an_evaluation_leaves_the_manifest_of_the_training(place, capsys):
    folder = shutil.copytree(place.trained, place.root / "evaluated")
    main(["evaluate", "--data", str(place.data), "--model", "bm25", "--output_dir", str(folder)])
    assert manifest_of(folder) == manifest_of(place.trained)
    assert json.loads((folder / "run_manifest.evaluate.json").read_text())["verb"] == "evaluate"


def test_the_command_is_printed_with_everything_written_out(place, capsys, monkeypatch):
    monkeypatch.chdir(place.root)
    words, said = reproduce(capsys, place.trained)
    assert words[:2] == ["hf-distill", "train"] and "--config" not in words
    options = dict(zip(words[2::2], words[3::2]))
    assert options["--learning_rate"] == "0.001" and options["--seed"] == "3"
    assert options["--output_dir"] == "outputs/trained-again"
    assert "--hub_token" not in options and "hf_verysecret" not in " ".join(words)
    assert "data, models and revisions are those of the run" in said and not (place.root / "outputs").exists()


def test_what_changed_is_named(place, capsys):
    target, other = place.root / "changed", place.root / "other-data"
    shutil.copytree(place.trained, target)
    manifest = manifest_of(target)
    manifest["versions"]["torch"] = "1.0"
    manifest["config"]["warmup_steps"] = 0.25
    write_json(target / "run_manifest.json", manifest)
    out = ["--output_dir", place.root / "nowhere"]
    words, said = reproduce(capsys, target, *out)
    assert "differs: torch was 1.0 and is" in said
    assert "the default of --warmup_steps is 0.1 by now and was 0.25" in said and words[-2:] == [
        "--warmup_steps",
        "0.25",
    ]
    # Another text in the corpus, another weight.
    manifest["sources"][0]["fingerprints"]["corpus"] = "0" * 16
    name = next(iter(manifest["sources"][1]["files"]))
    manifest["sources"][1]["files"][name] = "0" * 16
    write_json(target / "run_manifest.json", manifest)
    words, said = reproduce(capsys, target, *out, code=2)
    assert f"changed: data {place.data}: corpus differs" in said and f"{name} differs" in said
    assert "(2 differences, named above)" in said and words[1] == "train"
    reproduce(capsys, target, *out, "--force")
    # What was moved is checked where it is now.
    shutil.copytree(place.data, other)
    words, said = reproduce(capsys, place.trained, *out, "--replace", f"{place.data}={other}")
    assert str(other) in words and str(place.data) not in words
    _, said = reproduce(capsys, place.scored, *out, "--replace", f"{place.rows}={place.root / 'gone'}", code=2)
    assert "there is no row set" in said


def test_files_that_were_read_are_checked(place, capsys):
    """A TREC run that was scored from, and a file that was converted."""
    run, out = place.root / "bm25.trec", ["--output_dir", place.root / "nowhere"]
    shutil.copy(next((place.figures / "runs").glob("bm25*.trec")), run)
    main(["evaluate", "--data", str(place.data), "--model", str(run), "--output_dir", str(place.root / "from-run")])
    reproduce(capsys, place.root / "from-run", *out)
    run.write_text(run.read_text().replace(" Q0 ", " Q1 ", 1))
    _, said = reproduce(capsys, place.root / "from-run", *out, code=2)
    assert f"changed: file {run}: the content differs" in said
    from .conftest import MICRO

    micro = shutil.copytree(MICRO, place.root / "foreign")
    main(["convert", "--input", str(micro), "--output_dir", str(place.root / "converted")])
    words, said = reproduce(capsys, place.root / "converted", *out)
    assert words[:2] == ["hf-distill", "convert"] and "those of the run" in said
    (micro / "corpus.jsonl").unlink()
    _, said = reproduce(capsys, place.root / "converted", *out, code=2)
    assert f"changed: folder {micro}: corpus.jsonl is gone" in said


def test_bad_targets(place, capsys, tmp_path):
    _, said = reproduce(capsys, tmp_path, code=2)
    assert "there is no run_manifest.json" in said
    _, said = reproduce(capsys, "./nowhere", code=2)
    assert "there is no such folder" in said
    _, said = reproduce(capsys, "nobody/nothing", code=2)
    assert "nobody/nothing: no such folder here, and the Hub did not give its manifest" in said
    (tmp_path / "run_manifest.json").write_text("{")
    _, said = reproduce(capsys, tmp_path, code=2)
    assert "not JSON" in said
    write_json(tmp_path / "run_manifest.json", {"settings": {}})
    _, said = reproduce(capsys, tmp_path, code=2)
    assert "does not say by what command" in said
    _, said = reproduce(capsys, place.trained, "--output_dir", place.data, code=2)
    assert "Name a fresh folder" in said
    _, said = reproduce(capsys, place.trained, "--replace", "x", code=2)
    assert "Write old=new" in said


@pytest.mark.slow
def test_a_training_run_again_is_equal(place, capsys, tmp_path):
    _, said = reproduce(capsys, place.trained, "--run", "--output_dir", tmp_path / "trained")
    assert "results are equal" in said
    assert (tmp_path / "trained" / "model.safetensors").read_bytes() == (
        place.trained / "model.safetensors"
    ).read_bytes()


def test_results_that_differ_end_with_code_1(place, capsys):
    before, now = manifest_of(place.trained), manifest_of(place.trained)
    compare_results(before, now)
    compare_results(manifest_of(place.rows), manifest_of(place.rows))
    assert "rows" in capsys.readouterr().out
    now["models"]["student"]["weights"] = "0" * 16
    with pytest.raises(SystemExit) as end:
        compare_results(before, now)
    assert end.value.code == 1 and "DIFFERENT" in capsys.readouterr().out


# ---- From the Hub ----
def push_and_reproduce(folder: str, repo: str) -> tuple[str, str]:
    """In the process that talks to the Hub: pushes a folder twice; the command of the first revision."""
    import contextlib
    import io

    from hf_distill.hub import Target, push_folder

    first = push_folder(Path(folder), Target(repo)).commit
    Path(folder, "run_manifest.json").unlink()
    Path(folder, "README.md").write_text("later")
    push_folder(Path(folder), Target(repo))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(["reproduce", f"{repo}@{first}", "--output_dir", f"{folder}-again"])
    try:
        main(["reproduce", f"{repo}@0123456"])
    except SystemExit as end:
        return out.getvalue(), str(end.code)
    return out.getvalue(), ""


def test_from_a_repository_at_a_revision(hub, hub_client, place):
    folder = shutil.copytree(place.trained, place.root / "pushed")
    command, code = hub_client(push_and_reproduce, str(folder), "alice/student")
    assert shlex.split(command)[:2] == ["hf-distill", "train"] and f"{folder}-again" in command
    assert code == "2"


def test_a_manifest_of_somebody_else_cannot_send_things_away(place, capsys):
    target = shutil.copytree(place.trained, place.root / "foreign-manifest")
    manifest = manifest_of(target)
    out = ["--output_dir", place.root / "nowhere"]
    manifest["arguments"] += ["--push_to_hub=true", "--hub_model_id", "evil/repo", "--cache_dir", "/elsewhere"]
    manifest["launch"]["typed"] = "--launch cpu:2 --module evil"
    write_json(target / "run_manifest.json", manifest)
    words, _ = reproduce(capsys, target, *out)
    assert words[:2] == ["hf-distill", "train"]
    assert not {"--push_to_hub=true", "--push_to_hub", "--hub_model_id", "evil/repo", "--cache_dir"} & set(words)
    write_json(target / "run_manifest.json", {**manifest, "arguments": ["push", "--folder", "/home"]})
    _, said = reproduce(capsys, target, *out, code=2)
    assert "the verb 'push' cannot be repeated" in said


def test_several_processes_are_launched_again(place, capsys):
    target = shutil.copytree(place.trained, place.root / "launched")
    manifest = {**manifest_of(target), "world_size": 2}
    write_json(target / "run_manifest.json", manifest)
    words, _ = reproduce(capsys, target, "--output_dir", place.root / "nowhere")
    assert words[:4] == ["hf-distill", "--launch", "cpu:2", "train"]
    manifest["launch"]["typed"] = "--launch multi_cpu:2"
    write_json(target / "run_manifest.json", manifest)
    words, _ = reproduce(capsys, target, "--output_dir", place.root / "nowhere")
    assert words[1:4] == ["--launch", "multi_cpu:2", "train"]


def test_revisions_are_pinned(place, capsys):
    """A commit that was resolved then stands in the command now."""
    target = shutil.copytree(place.trained, place.root / "pinned")
    manifest = manifest_of(target)
    for source in manifest["sources"]:
        source["revision"] = f"{source['kind']}0123"
    write_json(target / "run_manifest.json", manifest)
    words, said = reproduce(capsys, target, "--output_dir", place.root / "nowhere", "--force")
    options = dict(zip(words[2::2], words[3::2]))
    assert (options["--data_revision"], options["--model_revision"]) == ("data0123", "model0123")
    # Where several models are named, or a name brings its revision, the commit stands behind the name.
    target = shutil.copytree(place.figures, place.root / "pinned-figures")
    manifest = manifest_of(target)
    manifest["arguments"].insert(-3, "you/ranker@v1")  # between bm25 and the folder
    manifest["sources"] += [
        {"kind": kind, "name": name, "revision": f"{kind}-{name[-1]}", "files": {}, "fingerprints": {}}
        for kind, name in (("model", str(place.bert)), ("model", "you/ranker@v1"), ("data", "you/ranker"))
    ]
    write_json(target / "run_manifest.json", manifest)
    words, _ = reproduce(capsys, target, "--output_dir", place.root / "nowhere", "--force")
    begin = words.index("--model")
    assert words[begin + 1 : begin + 4] == ["bm25", "you/ranker@model-1", f"{place.bert}@model-t"], words
