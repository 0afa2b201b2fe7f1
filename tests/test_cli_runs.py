"""Runs that begin, are cut off and go on: what an output folder belongs to, and what is refused before any work."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hf_distill.cli import folders
from hf_distill.cli.evaluate import system_names
from hf_distill.cli.main import main
from hf_distill.data import load_collection
from hf_distill.errors import InputError
from hf_distill.trainers.checkpoints import last_complete_checkpoint


SMALL = ["--use_cpu", "true", "--per_device_train_batch_size", "8", "--num_negatives", "3", "--report_to", "none"]
SMALL += ["--max_steps", "2", "--mine_depth", "20", "--mine_negatives", "8"]


def refusal(capsys, *argv: str) -> str:
    """The sentence that a bad command ends with."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in argv])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_new_head_is_the_same_when_the_run_goes_on(micro, tiny_bert, tmp_path):
    command = ["train", "--data", micro, "--model", tiny_bert, "--kind", "cross_encoder"]
    command = [*map(str, command), "--output_dir", str(tmp_path / "ranker"), *SMALL]
    main(command)
    weights = (tmp_path / "ranker" / "model.safetensors").read_bytes()
    main(command)
    assert (tmp_path / "ranker" / "model.safetensors").read_bytes() == weights


def test_a_folder_where_nothing_was_begun_is_free(tmp_path):
    folder = folders.claim_output(tmp_path / "out", {"losses": "[kll]"})
    folders.claim_output(folder, {"losses": "[kl]"})
    assert json.loads((folder / folders.KEY_FILE).read_text()) == {"losses": "[kl]"}
    (folder / "metrics.json").write_text("{}")
    with pytest.raises(InputError, match="holds another run"):
        folders.claim_output(folder, {"losses": "[kll]"})


def test_a_ranker_is_no_student_of_the_verb(micro, tiny_bert, tiny_ranker, tmp_path, capsys):
    command = ["distill", "--data", micro, "--teacher", tiny_bert, "--student", tiny_ranker]
    assert "is a cross-encoder" in refusal(capsys, *command, "--output_dir", tmp_path / "out", *SMALL)


def test_another_number_of_processes_is_another_run(micro, tiny_bert, tmp_path):
    command = ["train", "--data", str(micro), "--model", str(tiny_bert), "--output_dir", str(tmp_path / "out"), *SMALL]
    main(command)
    assert json.loads((tmp_path / "out" / folders.KEY_FILE).read_text())["processes"] == 1


def test_checkpoints_of_the_model_alone_stay(tmp_path):
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    assert last_complete_checkpoint(tmp_path) is None
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--save_steps", "0.5", "--eval_steps", "0.3"], "multiple of the evaluation steps"),
        (["--losses", "[kl"], "not readable as YAML"),
        (["--losses", "[nonsense]"], "unknown loss 'nonsense'"),
        (["--losses", "[{name: kl, teacher: nobody}]"], "The teachers are: teacher"),
        (["--losses", "[flops]"], "compares representations"),
        (["--eval_measures", "nDCG@ten"], "unknown measure"),
        (["--index", "nonsense"], "could not parse index string nonsense"),
        (["--negative_sources", "{bm25"], "no JSON object"),
        (["--num_negatives", "-1"], "not a number of negatives"),
        (["--per_device_train_batch_size", "99"], "do not fill one batch"),
        (["--mine_negatives", "0"], "Ask for one at least"),
        (["--teacher_dtype", "float8", "--dtype", "float8"], "invalid choice: 'float8'"),
        (["--train_split", "nope"], "Its splits are: dev, test, train"),
        (["--teacher_mode", "joint", "--lr_scheduler_type", "cosine_with_min_lr"], "'cosine_with_min_lr' with no arg"),
        (["--teacher_mode", "joint", "--teacher_dtype", "bfloat16"], "in one precision"),
    ],
)
def test_bad_wishes_are_refused_before_any_work(flags, message, micro, tiny_bert, tmp_path, capsys):
    command = ["distill", "--data", micro, "--teacher", tiny_bert, "--student", "layers:2"]
    assert message in refusal(capsys, *command, "--output_dir", tmp_path / "out", *SMALL, *flags)
    assert not (tmp_path / "out").exists()
    if "teacher" not in message + flags[0]:
        command = ["train", "--data", micro, "--model", tiny_bert, "--output_dir", tmp_path / "out"]
        assert message in refusal(capsys, *command, *SMALL, *flags)
        assert not (tmp_path / "out").exists()


def test_evaluation_without_a_folder_only_prints(micro, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["evaluate", "--data", str(micro), "--model", "bm25", "bm25", "--names", "one", "two", "--split", "dev"])
    shown = capsys.readouterr().out
    assert "micro/dev" in shown and "one" in shown and "two" in shown
    assert not list(tmp_path.iterdir())


def test_systems_that_are_not_there_are_said_before_any_is_measured(micro, tmp_path, capsys):
    out = tmp_path / "figures"
    command = ["evaluate", "--data", micro, "--model", "bm25", "nothing.trec", "--output_dir", out]
    assert "there is no file nothing.trec" in refusal(capsys, *command)
    assert "--split: micro has no judgements 'nope'" in refusal(capsys, *command[:4], "bm25", "--split", "nope")
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--measures", "nDCG@10,R"], "lacks a cut-off"),
        (["--measures", "foo"], "unknown measure"),
        (["--depth", "0"], "--depth: 0 passages"),
        (["--relevance", "9"], "no query has a document of grade 9 or more"),
        (["--index", "nonsense"], "could not parse index string nonsense"),
        (["--names", "same", "same"], "two systems have the same name"),
    ],
)
def test_wishes_about_an_evaluation_are_looked_at_first(flags, message, micro, tiny_bert, tmp_path, capsys):
    out = tmp_path / "figures"
    command = ["evaluate", "--data", micro, "--model", "bm25", tiny_bert, "--output_dir", out]
    assert message in refusal(capsys, *command, *flags)
    assert not out.exists()


def test_systems_of_equal_names_are_numbered():
    assert system_names(["a/x", "b/x.trec", "x_2", "c/x/"], None) == ["x", "x_2", "x_2_2", "x_3"]


def test_an_index_that_does_not_exist_is_refused_before_encoding(micro, tiny_bert, tmp_path, capsys):
    for verb, more in (("mine", ["--output_dir", tmp_path / "rows"]), ("search", ["--query", "bread"])):
        command = [verb, "--data", micro, "--model", tiny_bert, "--index", "nonsense", *more]
        assert "could not parse index string nonsense" in refusal(capsys, *command)
    assert not [path for path in Path(os.environ["HF_DISTILL_CACHE"]).iterdir() if path.name not in ("data", "rows")]


@pytest.mark.parametrize(
    ("verb", "flag"),
    [("mine", "--rows"), ("mine", "--mine_with"), ("evaluate", "--test_split"), ("score", "--index")]
    + [("search", "--train_split")],
)
def test_verbs_refuse_what_they_would_not_use(verb, flag, capsys):
    assert f"unknown field {flag[2:]!r}" in refusal(capsys, verb, flag, "x")


def test_every_cache_lies_where_it_was_asked_for(micro, tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DISTILL_CACHE", str(tmp_path / "default"))
    command = ["train", "--data", str(micro), "--model", str(tiny_bert), "--kind", "cross_encoder", *SMALL]
    main([*command, "--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "asked")])
    assert (tmp_path / "asked" / "bm25").is_dir() and not (tmp_path / "default").exists()


def test_search_that_would_show_nothing_is_refused(micro, capsys):
    command = ["search", "--data", micro, "--model", "bm25", "--query", "bread"]
    assert "--top: 0 is too little" in refusal(capsys, *command, "--top", "0")


def test_a_split_without_positives_is_found_first(micro, tiny_bert, tmp_path, capsys):
    import shutil

    data = shutil.copytree(micro, tmp_path / "data")
    lines = (data / "qrels" / "dev.tsv").read_text().splitlines()
    (data / "qrels" / "dev.tsv").write_text("\n".join([lines[0], *(line[:-1] + "0" for line in lines[1:])]) + "\n")
    with pytest.raises(SystemExit):
        main(
            ["distill", "--data", str(data), "--teacher", str(tiny_bert), "--student", "layers:2"]
            + ["--output_dir", str(tmp_path / "out")]
        )
    assert "judgements 'dev': no query has a document of grade 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    # Who does not look at that split does not mind.
    main(["search", "--data", str(data), "--model", "bm25", "--query", "bread"])
    (data / "qrels" / "dev.tsv").rename(data / "qrels" / "train.tsv")
    command = ["train", "--data", data, "--model", tiny_bert, "--output_dir", tmp_path / "out", *SMALL]
    assert "judgements 'train': no query has a document of grade 1 or more" in refusal(capsys, *command)


def test_rows_that_nothing_can_be_learned_from_are_refused_before_any_work(micro, tiny_bert, tmp_path, capsys):
    data = load_collection(micro)
    bare, unlabelled = tmp_path / "bare.jsonl", tmp_path / "unlabelled.jsonl"
    for path, count, positives in ((bare, 1, 1), (unlabelled, 9, 0)):
        documents = data.corpus.ids_at(range(count))
        rows = [
            {"query_id": name, "document_ids": documents, "num_positives": positives}
            for name in data.queries.ids_at(range(8))
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ["train", "--data", micro, "--model", tiny_bert, "--output_dir", tmp_path / "out", *SMALL]
    distill = ["distill", "--data", micro, "--teacher", tiny_bert, "--student", "layers:2", "--output_dir"]
    distill += [tmp_path / "out", *SMALL, "--losses", "[contrastive]"]
    assert "8 of 8 rows have no candidates to draw 3 negatives from" in refusal(capsys, *train, "--rows", bare)
    for command in (train, distill):
        assert "no row has a positive, so there is" in refusal(capsys, *command, "--rows", unlabelled)
    assert not (tmp_path / "out").exists()


def test_rows_of_another_run_stay(micro, tmp_path, capsys):
    rows = tmp_path / "rows"
    command = ["mine", "--data", str(micro), "--model", "bm25", "--mine_depth", "20", "--output_dir"]
    main([*command, str(rows)])
    kept = {path.name: path.read_bytes() for path in rows.glob("*.parquet")}
    message = refusal(capsys, *command, rows, "--mine_negatives", "4")
    assert f"{rows}: holds another run's rows (mine_negatives: 30, now 4)" in message
    main([*command, str(rows)])
    assert {path.name: path.read_bytes() for path in rows.glob("*.parquet")} == kept
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    assert "holds something that is no row set" in refusal(capsys, *command, tmp_path / "thesis")
    assert "chapter.txt: is a file where a folder is needed" in refusal(
        capsys, *command, tmp_path / "thesis" / "chapter.txt"
    )
    assert "mining option 'depth': depth is 0" in refusal(capsys, *command, tmp_path / "new", "--mine_depth", "0")
