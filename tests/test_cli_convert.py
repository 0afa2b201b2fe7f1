"""`hf-distill convert`: what is typed, what is said, and what lies there afterwards."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from hf_distill.cli.main import main
from hf_distill.data import load_collection


@pytest.fixture()
def files(tmp_path) -> Path:
    folder = tmp_path / "msmarco"
    folder.mkdir()
    (folder / "collection.tsv").write_text("0\tzero\n1\tone\n2\ttwo\n")
    (folder / "queries.train.tsv").write_text("10\tten\n")
    (folder / "qrels.train.tsv").write_text("10\t0\t0\t1\n")
    (folder / "train.negatives.tsv").write_text("10\t1,2,0\n")
    return folder


def failed(capsys, *words) -> str:
    with pytest.raises(SystemExit) as end:
        main(["convert", *map(str, words)])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_folder(files, tmp_path, capsys):
    main(["convert", "--input", str(files), "--output_dir", str(tmp_path / "out"), "--name", "mine"])
    said = capsys.readouterr()
    assert "corpus" in said.out and "train.negatives" in said.out
    assert "1 negatives are positives of their query and were left out, first in" in said.err
    collection = load_collection(tmp_path / "out")
    assert collection.name == "mine" and collection.row_sets == ("train.negatives",)
    manifest = json.loads((tmp_path / "out" / "run_manifest.json").read_text())
    assert manifest["verb"] == "convert" and manifest["data"]["corpus"] == {"rows": 3}
    assert {Path(one["name"]).name for one in manifest["sources"]} == {path.name for path in files.iterdir()}
    assert all(len(one["fingerprint"]) == 16 for one in manifest["sources"])
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    main(["convert", "--input", str(files), "--output_dir", str(tmp_path / "out"), "--name", "mine"])
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_files_and_a_yaml_file(files, tmp_path):
    config = tmp_path / "convert.yaml"
    inputs = [f"corpus={files / 'collection.tsv'}", f"queries={files / 'queries.train.tsv'}"]
    config.write_text(json.dumps({"input": inputs, "output_dir": str(tmp_path / "out")}))
    main(["convert", "--config", str(config)])
    assert len(load_collection(tmp_path / "out").corpus) == 3


def test_what_is_missing_and_what_is_wrong(files, tmp_path, capsys):
    said = failed(capsys)
    assert "hf-distill convert still needs --input" in said and "--output_dir" in said
    assert "still needs --output_dir" in failed(capsys, "--input", files)
    out = ("--output_dir", tmp_path / "out")
    assert "'tsv' is no format" in failed(capsys, "--input", files, *out, "--format", "tsv")
    assert "nowhere/at/all: no such file or folder" in failed(capsys, "--input", "nowhere/at/all", *out)
    (files / "train.negatives.tsv").write_text("10\t1,77\n")
    said = failed(capsys, "--input", files, *out)
    assert "train.negatives.tsv, line 1, field 'document_ids': '77' is not among the 3 documents" in said
    assert "--unknown_ids drop passes over" in said
    main(["convert", "--input", str(files), "--unknown_ids", "drop", *map(str, out)])
    assert "1 entries name unknown documents and were left out" in capsys.readouterr().err


def test_pickles_need_a_flag_and_run_nothing(files, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was_here",)

    scores, out = files / "scores.pkl", ("--output_dir", tmp_path / "out")
    scores.write_bytes(pickle.dumps({10: {0: 2.5, 1: 1.5, 2: 0.5}}))
    said = failed(capsys, "--input", f"scores={scores}", *out)
    assert "scores.pkl: a pickle, which is not read here" in said and "--allow_pickle true" in said
    main(["convert", "--input", str(files), "--allow_pickle", "true", *map(str, out)])
    rows = load_collection(tmp_path / "out").rows("train.negatives")
    assert rows.values_at("scores", 0).tolist() == [2.5, 1.5, 0.5]
    scores.write_bytes(pickle.dumps({10: {0: Evil()}}))
    said = failed(capsys, "--input", files, "--allow_pickle", "true", "--output_dir", tmp_path / "other")
    assert "scores.pkl: the pickle is refused: it asks for pathlib" in said
    assert not (tmp_path / "was_here").exists() and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_the_script(files, tmp_path):
    script = Path(__file__).parent.parent / "run_scripts" / "run_convert.py"
    command = [sys.executable, str(script), "--input", str(files), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(load_collection(tmp_path / "out").corpus) == 3
