"""The command line: YAML and flags, and errors that a person can act on."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from dataclasses import dataclass, field

import pytest

from hf_distill.cli.main import VERBS, main
from hf_distill.cli.parsing import Verb, _parser, parse, parse_settings
from hf_distill.errors import InputError


@dataclass
class Options:
    name: str | None = field(default=None, metadata={"help": "A name."})
    count: int = field(default=3, metadata={"help": "A number."})
    rate: float = field(default=0.5, metadata={"help": "A rate."})
    switch: bool = field(default=True, metadata={"help": "A switch."})
    several: list[str] | None = field(default=None, metadata={"help": "Several."})
    losses: str | None = field(default=None, metadata={"help": "JSON."})


VERB = Verb("try", "Tries.", (Options,), run=print)


def parsed(tmp_path, yaml: str, *flags: str) -> Options:
    path = tmp_path / "config.yaml"
    path.write_text(yaml)
    return parse(VERB, ["--config", str(path), *flags])[0]


def test_file_and_flags(tmp_path):
    yaml = "name: a b\ncount: 7\nrate: 2e-5\nswitch: false\nseveral: [x, y z]\nlosses:\n- {name: kl, weight: 2}\n"
    options = parsed(tmp_path, yaml, "--count", "9")
    assert options == Options("a b", 9, 2e-5, False, ["x", "y z"], '[{"name": "kl", "weight": 2}]')
    assert parsed(tmp_path, "") == Options()
    assert parse(VERB, ["--several", "x", "y", "--switch", "false"])[0] == Options(several=["x", "y"], switch=False)


@pytest.mark.parametrize(
    ("yaml", "flags", "message"),
    [
        ("cuont: 3", [], "config.yaml, field 'cuont': unknown field 'cuont'. Did you mean count"),
        ("", ["--cuont", "3"], "Did you mean count"),
        ("count: many", [], "config.yaml, field 'count': invalid int value: 'many'"),
        ("count: 3", ["--count", "many"], "--count: invalid int value: 'many'"),
        ("count: 3", ["stray"], "command line: 'stray' belongs to no field"),
        ("- a\n- b", [], "must map fields to values"),
        ("a: [1", [], "not readable as YAML"),
    ],
)
def test_errors_name_place_and_cure(tmp_path, yaml, flags, message):
    with pytest.raises(InputError) as caught:
        parsed(tmp_path, yaml, *flags)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": "many"}, "phase 'last', field 'count': invalid int value: 'many'"),
        ({"cuont": 3}, "phase 'last', field 'cuont': unknown field 'cuont'"),
    ],
)
def test_errors_in_settings_name_where_they_stand(settings, message):
    with pytest.raises(InputError) as caught:
        parse_settings(VERB, settings, "phase 'last'")
    assert message in str(caught.value)


def test_exponents_are_numbers_and_doubled_fields_are_refused(tmp_path):
    """Plain YAML 1.1 takes 8e-4 for a text, also in JSON."""
    from hf_distill.trainers.base import read_losses

    losses = parsed(tmp_path, "losses: [{name: kl, weight: 8e-4}]").losses
    assert losses == '[{"name": "kl", "weight": 0.0008}]'
    assert read_losses('[{"name": "kl", "weight": 8e-4}]') == read_losses(losses)
    with pytest.raises(InputError, match="config.yaml, line 1: 'count' stands there twice"):
        parsed(tmp_path, "count: 1\ncount: 2\n")


def test_missing_file():
    with pytest.raises(InputError, match="there is no file nowhere.yaml"):
        parse(VERB, ["--config", "nowhere.yaml"])


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_instant_and_imports_nothing_heavy(verb):
    code = (
        "import sys; from hf_distill.cli.main import main\n"
        f"try: main([{verb!r}, '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, f'{heavy} imported'"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"hf-distill {verb} [--config FILE.yaml]" in done.stdout
    assert "example:" in done.stdout
    assert time.perf_counter() - start < 10  # a tenth of a second on a quiet machine
    module = importlib.import_module(f"hf_distill.cli.{verb}")
    assert done.stdout == _parser(module.VERB, module.VERB.options).format_help()  # of the parser that a run has


@pytest.mark.parametrize("verb", ["distill", "progressive", "train", "tele", "mine", "score", "evaluate", "search"])
def test_a_run_without_arguments_says_what_is_missing(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "still needs --data" in said
    assert ("--output_dir" in said) == (verb in ("distill", "progressive", "train", "tele"))


def test_a_pretraining_needs_a_folder_too(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["pretrain", "--model", "m", "--data", "d"])
    assert "--output_dir (where the model goes)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unknown_verb(capsys):
    with pytest.raises(SystemExit) as end:
        main(["distil"])
    assert end.value.code == 2
    assert "there is no verb 'distil'" in capsys.readouterr().err


def test_scripts_are_the_same_verbs(pytestconfig):
    for verb in ("train", "distill", "mine", "score", "evaluate", "compare", "reproduce"):
        script = pytestconfig.rootpath / "run_scripts" / f"run_{verb}.py"
        done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
        assert done.stdout.startswith(f"usage: hf-distill {verb}"), done.stderr


@pytest.mark.parametrize("strategy", ["flag", "yaml"])
def test_without_evaluation_there_is_no_best_checkpoint(tmp_path, strategy):
    from hf_distill.cli.training_arguments import DistillArguments

    file = tmp_path / "run.yaml"
    file.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\n" + ("eval_strategy: no\n" if strategy == "yaml" else ""))
    verb = Verb("x", "", (), run=lambda *_: None, arguments=lambda: (DistillArguments,))
    (args,) = parse(verb, ["--config", str(file), *(["--eval_strategy", "no"] if strategy == "flag" else [])])
    assert args.eval_strategy == "no"
    assert args.load_best_model_at_end is False
    (args,) = parse(verb, ["--config", str(file), "--eval_strategy", "steps"])
    assert args.load_best_model_at_end is True
