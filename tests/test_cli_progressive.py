"""`hf-distill progressive` against the same stages as commands of their own."""

from __future__ import annotations

import json

import pytest
import yaml

from hf_distill.cli.main import main
from hf_distill.cli.progressive import read_phases
from hf_distill.errors import InputError


COMMON = ["--use_cpu", "true", "--per_device_train_batch_size", "8", "--report_to", "none", "--save_steps", "2"]
COMMON += ["--eval_strategy", "no", "--eval_depth", "20"]
FIRST = {"teacher": "{dense}", "max_steps": 3, "learning_rate": 1e-3, "num_negatives": 2}
SECOND = {
    "teacher": "{ranker}",
    "max_steps": 4,
    "learning_rate": 2e-3,
    "num_negatives": 4,
    "negative_sampling": "hardest",
    "losses": [{"name": "kl", "candidates": "own", "temperature": 4}, {"name": "lwf", "candidates": "own"}],
}


@pytest.mark.slow
def test_phases_equal_stages(micro, tiny_bert, tiny_ranker, tmp_path):
    def phase(settings):
        teacher = {"{dense}": str(tiny_bert), "{ranker}": str(tiny_ranker)}[settings["teacher"]]
        return {**settings, "teacher": [teacher], "rows": str(tmp_path / "rows")}

    main(
        ["mine", "--data", str(micro), "--model", "bm25", "--mine_depth", "20", "--output_dir", str(tmp_path / "rows")]
    )
    student = str(tiny_bert)
    for name, settings in (("one", FIRST), ("two", SECOND)):
        file = tmp_path / f"{name}.yaml"
        fields = {"data": str(micro), "student": student, "baseline": False, "output_dir": str(tmp_path / name)}
        file.write_text(yaml.safe_dump({**phase(settings), **fields}))
        main(["distill", "--config", str(file), *COMMON])
        student = str(tmp_path / name)
    phases = [{"name": "one", **phase(FIRST)}, {"name": "two", **phase(SECOND)}]
    folder = tmp_path / "progressive"
    command = ["progressive", "--data", str(micro), "--student", str(tiny_bert), "--output_dir", str(folder), *COMMON]
    main([*command, "--phases", json.dumps(phases)])
    for stage, made in (("one", folder / "01-one"), ("two", folder / "02-two"), ("two", folder)):
        weights = [(place / "model.safetensors").read_bytes() for place in (tmp_path / stage, made)]
        assert weights[0] == weights[1], stage
    metrics = json.loads((folder / "metrics.json").read_text())["micro/test"]
    assert {"bm25", "student_before", "one", "two", "student"} <= set(metrics)
    expected = json.loads((tmp_path / "two/metrics.json").read_text())["micro/test"]["student"]
    assert metrics["two"]["nDCG@10"] == metrics["student"]["nDCG@10"] == expected["nDCG@10"]
    assert "distilled from" in (folder / "README.md").read_text()
    main([*command, "--phases", json.dumps(phases)])  # nothing is left to do


@pytest.mark.parametrize("verb", ["progressive", "tele"])
def test_verbs_of_several_trainings_take_no_checkpoint(verb, micro, tiny_bert, tmp_path, capsys):
    given = ["--data", micro, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "you/student", *COMMON]
    more = {"tele": ["--model", tiny_bert], "progressive": ["--student", tiny_bert, "--phases", "[]"]}
    with pytest.raises(SystemExit) as end:
        main([verb, *map(str, [*given, *more[verb]])])
    assert end.value.code == 2
    assert "go on by themselves from what lies in the output folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a", "not readable as YAML"),
        ("{name: x}", "must be a list of phases"),
        ("[{name: x}]", "phase 1: needs a name and a teacher"),
        ("[{name: x, teacher: t, output_dir: o}]", "sets output_dir"),
    ],
)
def test_bad_phases(text, message):
    with pytest.raises(InputError, match=message):
        read_phases(text)


def test_unknown_fields_of_a_phase(micro, tiny_bert, tmp_path, capsys):
    phases = json.dumps([{"name": "x", "teacher": ["t"], "lerning_rate": 1}])
    with pytest.raises(SystemExit):
        main(["progressive", "--data", str(micro), "--student", str(tiny_bert), "--output_dir", str(tmp_path / "o")]
             + ["--phases", phases])  # fmt: skip
    assert "phase 'x', field 'lerning_rate'" in capsys.readouterr().err
