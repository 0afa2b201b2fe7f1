"""Runs of the stage graph: what is skipped, resumed, redone and refused. A small program stands in for the verbs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hf_distill.errors import InputError
from hf_distill.recipes import RecipeRun, load_recipe, processes


COMMAND = Path(__file__).parent / "recipe_command.py"
RECIPE = {
    "name": "sums",
    "variables": {"data": "???", "pause": 0},
    "stages": {
        "rows": {"verb": "mine", "data": "${data}", "model": "bm25", "amount": 3, "pause": "${pause}"},
        "ranker": {"verb": "train", "data": "${data}", "model": "m/m", "rows": "${rows}", "amount": 1},
        "scored": {"verb": "score", "data": "${data}", "rows": "${rows}", "model": "${ranker}", "pause": "${pause}"},
        "figures": {"verb": "evaluate", "data": "${data}", "model": ["${ranker}"], "after": ["scored"]},
    },
}


@pytest.fixture()
def start(tmp_path, monkeypatch, micro):
    """Runs the recipe of sums with overrides; returns the run."""
    monkeypatch.setattr(processes, "_start", stand_in)
    monkeypatch.setattr("hf_distill.recipes.runner.in_other_process", lambda *_: None)
    monkeypatch.setattr("hf_distill.recipes.report.in_other_process", lambda *_: None)
    path = tmp_path / "sums.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))

    def start(*overrides: str, first: str | None = None, last: str | None = None) -> RecipeRun:
        run = RecipeRun(load_recipe(path, overrides=[f"data={micro}", *overrides]), tmp_path / "out")
        run.run(first, last)
        return run

    return start


def stand_in(words: list[str], log: Path) -> processes._Command:
    return processes._Command([sys.executable, str(COMMAND), *words], log)


def starts(run: RecipeRun) -> dict[str, int]:
    return {name: run.workspace.record(name).starts for name in run.recipe.stages}


def actions(run: RecipeRun) -> dict[str, str]:
    return {name: decision.action for name, decision in run.decide().items()}


def test_what_is_done_is_skipped(start, tmp_path):
    run = start()
    assert set(actions(run).values()) == {"done"}
    total = (tmp_path / "out/stages/figures/total.json").read_text()
    assert starts(start()) == dict.fromkeys(run.recipe.stages, 1)
    assert (tmp_path / "out/stages/figures/total.json").read_text() == total
    record = run.workspace.record("ranker")
    assert record.figures["headline"].startswith("nDCG@10 ")
    assert "mine step 19" in (tmp_path / "out/records/rows.log").read_text()


def test_a_changed_setting_redoes_what_stands_on_it(start, caplog, tmp_path):
    caplog.set_level("INFO", logger="hf_distill")
    start()
    before = (tmp_path / "out/stages/figures/total.json").read_text()
    changed = start("ranker.amount=2")
    assert starts(changed) == {"rows": 1, "ranker": 1, "scored": 1, "figures": 1}
    assert "ranker will be done again: amount: 1 -> 2" in caplog.text
    assert "scored will be done again: stage ranker is another one" in caplog.text
    assert "rows will be done again" not in caplog.text
    assert (tmp_path / "out/stages/figures/total.json").read_text() != before
    caplog.clear()
    start()
    assert "ranker is taken back: these settings were run before" in caplog.text
    assert (tmp_path / "out/stages/figures/total.json").read_text() == before
    assert "ranker: hf-distill" not in caplog.text, "nothing was started"


def test_settings_without_effect_change_nothing(start):
    assert set(actions(start()).values()) == {"done"}
    assert starts(start("ranker.logging_steps=5")) == {"rows": 1, "ranker": 1, "scored": 1, "figures": 1}


def test_the_files_that_are_named_count_not_their_place(start, tmp_path, micro):
    import shutil

    start()
    copy = shutil.copytree(micro, tmp_path / "elsewhere")
    assert starts(start(f"data={copy}"))["rows"] == 1
    with open(copy / "queries.jsonl", "a") as file:
        file.write('{"_id": "new", "text": "another"}\n')
    decisions = start(f"data={copy}", last="rows").decide()
    assert decisions["ranker"].action == "again" and "the files of data changed" in decisions["ranker"].why


def test_a_raised_version_redoes_the_stage(start, monkeypatch):
    from dataclasses import replace

    from hf_distill.recipes.kinds import KINDS

    run = start()
    monkeypatch.setitem(KINDS, "score", replace(KINDS["score"], version=99))
    run = RecipeRun(load_recipe(run.recipe.origin, overrides=run.recipe.overrides), run.workspace.folder)
    assert actions(run) == {"rows": "done", "ranker": "done", "scored": "again", "figures": "again"}
    assert "version 1 -> 99" in run.decide()["scored"].why[0]


def test_a_lost_result_is_made_again(start, tmp_path):
    import shutil

    run = start()
    shutil.rmtree(tmp_path / "out/stages/scored")
    assert actions(run) == {"rows": "done", "ranker": "done", "scored": "again", "figures": "done"}
    assert starts(start())["scored"] == 1
    assert set(actions(run).values()) == {"done"}


def test_a_part(start):
    run = start(last="ranker")
    assert run.workspace.record("scored") is None
    with pytest.raises(InputError, match="stage 'scored' is needed and not done.*--from scored"):
        start(first="figures")
    assert set(actions(start(first="scored")).values()) == {"done"}
    with pytest.raises(InputError, match="stage 'rows' is needed and not done"):
        start("rows.amount=9", first="ranker")


def test_a_failing_stage_says_its_last_words_and_goes_on_later(start):
    with pytest.raises(InputError, match=r"stage 'ranker'(.|\n)*error: told to fail(.|\n)*ranker.log"):
        start("ranker.fail=true")
    run = start()
    assert starts(run) == {"rows": 1, "ranker": 1, "scored": 1, "figures": 1}


def test_killed_right_after_a_stage_began_it_goes_on(start, tmp_path, monkeypatch):
    def begins_and_is_killed(words, log, started, says):
        folder = tmp_path / "out/stages/rows"
        folder.mkdir(parents=True)
        (folder / ".lock").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(processes, "run_words", begins_and_is_killed)
        with pytest.raises(KeyboardInterrupt):
            start()
    assert starts(start())["rows"] == 2


def test_a_foreign_folder_is_not_touched(start, tmp_path):
    folder = tmp_path / "out/stages/ranker"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="no stage of this recipe made"):
        start()
    assert (folder / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ranker.data=null"], "train still needs data"),
        (["ranker.rows=${figures}"], "wait for each other"),
        (["scored.rows=${ranker}"], "stage 'ranker' leaves model, where rows is needed"),
        (["figures.model=[/no/such/model]"], "there is no file or folder /no/such/model"),
        (["ranker.mine_with=./nowhere"], "there is no file or folder ./nowhere"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(start, tmp_path, overrides, message):
    with pytest.raises(InputError, match=message):
        start(*overrides)
    assert not (tmp_path / "out/stages").exists()


def test_columns_are_known_before_they_are_there(start, tmp_path, micro):
    content = {**RECIPE, "stages": {**RECIPE["stages"]}}
    student = {"verb": "distill", "data": str(micro), "student": "m/m", "teacher": "column:scores_big"}
    content["stages"]["student"] = {**student, "rows": "${scored}"}
    path = tmp_path / "columns.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match="no column 'scores_big'.*ranks, retriever_scores, scores, sources"):
        RecipeRun(load_recipe(path, overrides=[f"data={micro}"]), tmp_path / "out").run()
    recipe = load_recipe(path, overrides=[f"data={micro}", "scored.column=scores_big"])
    RecipeRun(recipe, tmp_path / "out2").run()


def test_two_starts_at_once(start, tmp_path):
    from filelock import FileLock

    start(last="rows")
    with FileLock(tmp_path / "out/.lock"), pytest.raises(InputError, match="another process is running"):
        start()


def started(path: Path, folder: Path, data: Path) -> subprocess.Popen:
    """The recipe in a process of its own, slow enough to be killed in the middle."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from hf_distill.recipes import RecipeRun, load_recipe, processes, report, runner
from tests.test_recipes_running import stand_in
processes._start = stand_in
runner.in_other_process = report.in_other_process = lambda *_: None
RecipeRun(load_recipe({str(path)!r}, overrides=["data={data}", "pause=0.03"]), sys.argv[1]).run()
"""
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], stderr=subprocess.PIPE)


def test_settings_that_were_edited_after_a_kill(start, tmp_path, micro, caplog):
    """Killed in the middle of a stage; what changed since then is said, and only that is done again."""
    out = tmp_path / "out"
    process = started(tmp_path / "sums.yaml", out, micro)
    while process.poll() is None and not list(out.glob("stages/scored/step-*.json")):
        time.sleep(0.01)
    assert process.poll() is None, process.stderr.read().decode()
    process.kill()
    process.wait()
    caplog.set_level("INFO", logger="hf_distill")
    edited = start("pause=0.03", "scored.amount=7", "figures.amount=1")
    assert "scored will be done again: amount: unset -> 7" in caplog.text
    assert "scored: the result of the other settings is kept in" in caplog.text
    assert "rows will be" not in caplog.text and "ranker will be" not in caplog.text
    assert starts(edited) == {"rows": 1, "ranker": 1, "scored": 1, "figures": 1}
    caplog.clear()
    start("pause=0.03")
    # The part that the kill left is begun anew: only finished results are taken back.
    assert "scored will be done again: amount: 7 -> unset" in caplog.text


@pytest.mark.slow
def test_killed_at_random_moments_the_result_is_the_same(tmp_path, micro):
    """The recipe's own process is killed; the program that it had started must not outlive it."""
    path = tmp_path / "sums.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))

    def launch(folder: Path) -> subprocess.Popen:
        return started(path, folder, micro)

    assert launch(tmp_path / "whole").wait() == 0
    generator, kills = random.Random(5), 0
    seen, finished = 0, False
    while not finished:
        process = launch(tmp_path / "killed")
        # Killed after some more steps, wherever these are; a loaded machine only takes longer.
        until = seen + generator.randint(18, 40)
        while seen < until and not finished:
            time.sleep(0.02)
            finished = process.poll() is not None
            seen = len(list((tmp_path / "killed").glob("stages/*/step-*.json")))
        if finished:
            assert process.returncode == 0, process.stderr.read().decode()
        else:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills >= 2
    for stage in RECIPE["stages"]:
        for name in ("total.json", "metrics.json"):
            whole, killed = (tmp_path / folder / "stages" / stage / name for folder in ("whole", "killed"))
            assert whole.read_text() == killed.read_text()
    records = [json.loads(file.read_text()) for file in (tmp_path / "killed/records").glob("[!c]*.json")]
    assert all(record["status"] == "done" for record in records) and max(one["starts"] for one in records) > 1


def test_nothing_heavy_is_imported_to_find_that_nothing_is_to_be_done(start, tmp_path, micro):
    start()
    words = ["recipe", str(tmp_path / "sums.yaml"), "--set", f"data={micro}", "--output_dir", str(tmp_path / "out")]
    code = f"""
import sys
from hf_distill.cli.main import main
main({words!r})
assert not {{"torch", "datasets", "pandas", "pyarrow"}} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_report_is_one_page_without_a_network(start, tmp_path, monkeypatch):
    from hf_distill.recipes import report

    monkeypatch.setattr(report, "in_other_process", lambda function, *arguments: function(*arguments))
    start("ranker.amount=2")
    page = (tmp_path / "out/report.html").read_text()
    assert "<h1>Recipe sums</h1>" in page and "data:image/png;base64," in page
    assert "http://" not in page and "https://" not in page and "<script" not in page and 'src="plots' not in page
    text = (tmp_path / "out/report.md").read_text()
    assert "| ranker | train | done |" in text and "## Measured on micro/test" in text
    assert "ranker.amount=2" in text
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert set(metrics["micro/test"]) == {"ranker", "trained"}, "the stage's own model has the stage's name"
    before = (tmp_path / "out/report.html").stat().st_mtime_ns
    start("ranker.amount=2")
    assert (tmp_path / "out/report.html").stat().st_mtime_ns == before, "nothing new to tell"


@pytest.mark.distributed
@pytest.mark.slow
def test_a_launched_stage_ends_with_the_recipe_and_goes_on(micro, tiny_bert, tmp_path):
    """Two processes train one stage; the recipe is killed with them at work, and started again."""
    training = {"verb": "train", "data": str(micro), "model": str(tiny_bert), "launch": "cpu:2", "use_cpu": True}
    training |= {"per_device_train_batch_size": 4, "num_negatives": 2, "max_steps": 20, "save_steps": 4}
    training |= {"eval_strategy": "no", "report_to": "none", "mine_depth": 20}
    path = tmp_path / "launched.yaml"
    path.write_text(yaml.safe_dump({"stages": {"model": training}}))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "hf_distill", "recipe", str(path), "--output_dir", str(out)]

    def working() -> list[str]:
        """Processes that this stage's command line names."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = entry.read_bytes()
                if str(out / "records" / "model.yaml").encode() in words:
                    found.append(entry.parent.name)
        return found

    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not list(out.glob("stages/model/checkpoint-*")):
        time.sleep(0.05)
    assert process.poll() is None, process.stderr.read().decode()
    assert len(working()) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while working() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not working(), "the stage outlived its recipe"
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "goes on where it stopped" in done.stderr
    assert json.loads((out / "stages/model/run_key.json").read_text())["processes"] == 2
    assert json.loads((out / "records/model.json").read_text())["starts"] == 2
