"""The verbs end to end on the micro corpus: what a user types, and the files that are there afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_distill.cli.main import main
from hf_distill.data import load_collection, save_collection
from hf_distill.models import load_model


COMMON = ["--use_cpu", "true", "--per_device_train_batch_size", "8", "--num_negatives", "3", "--report_to", "none"]


def fails(capsys, *argv: str) -> str:
    """The sentence that a bad command ends with."""
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    assert end.value.code == 2
    return capsys.readouterr().err


def distill(micro, teacher, folder, *more: str) -> None:
    main(
        [
            "distill",
            "--data",
            str(micro),
            "--teacher",
            str(teacher),
            "--student",
            "layers:2",
            "--output_dir",
            str(folder),
        ]
        + [*COMMON, "--max_steps", "8", "--mine_depth", "20", "--mine_negatives", "8", *more]
    )


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, micro, tiny_bert_source):
    """One finished distillation, looked at by several tests."""
    import os

    os.environ["HF_DISTILL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    folder = tmp_path_factory.mktemp("distilled") / "student"
    distill(micro, tiny_bert_source, folder)
    return folder


def test_contract_files(distilled):
    metrics = json.loads((distilled / "metrics.json").read_text())["micro/test"]
    assert {"bm25", "teacher", "student_before", "student_no_teacher", "student"} <= set(metrics)
    for name, figures in metrics.items():
        assert 0 <= figures["nDCG@10"] <= 1 and figures["n_queries"] == 17, name
    assert metrics["student"]["layers"] == 2 and metrics["teacher"]["layers"] == 4
    assert len(list((distilled / "runs").glob("*.trec"))) == 5
    assert len(list((distilled / "plots").glob("*.png"))) >= 2
    manifest = json.loads((distilled / "run_manifest.json").read_text())
    assert manifest["world_size"] == 1 and manifest["seeds"]["seed"] == 42
    assert manifest["metrics"]["micro/test"]["student"]["nDCG@10"] == metrics["student"]["nDCG@10"]
    assert manifest["data"]["rows"]["number"] == 36
    card = (distilled / "README.md").read_text()
    assert "student_no_teacher" in card and "SentenceTransformer(" in card
    assert "library_name: sentence-transformers" in card


def test_student_opens_without_this_package(distilled, tmp_path):
    code = f"""
import sys
sys.modules["hf_distill"] = None
from transformers import AutoModel, AutoTokenizer
from sentence_transformers import SentenceTransformer
import numpy as np, torch
texts = ["how do I bake bread", "stars at night"]
model = SentenceTransformer({str(distilled)!r}, device="cpu")
np.save({str(tmp_path / "native.npy")!r}, model.encode_query(texts))
assert AutoModel.from_pretrained({str(distilled)!r}).config.num_hidden_layers == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    import numpy as np

    from hf_distill.models import load_model
    from hf_distill.retrieval import encode_texts

    ours = encode_texts(load_model(distilled), ["how do I bake bread", "stars at night"], "query", dtype="float32")
    np.testing.assert_allclose(ours, np.load(tmp_path / "native.npy"), atol=1e-5)


def test_run_again_is_the_same_run(distilled, micro, tiny_bert_source, capsys):
    before = (distilled / "metrics.json").read_text()
    weights = (distilled / "model.safetensors").read_bytes()
    distill(micro, tiny_bert_source, distilled)
    figures, again = json.loads(before), json.loads((distilled / "metrics.json").read_text())
    for system, values in figures["micro/test"].items():
        assert again["micro/test"][system]["nDCG@10"] == values["nDCG@10"]
    assert (distilled / "model.safetensors").read_bytes() == weights
    message = fails(
        capsys,
        *["distill", "--data", str(micro), "--teacher", str(tiny_bert_source), "--student", "layers:2"],
        *["--output_dir", str(distilled), "--learning_rate", "0.5", *COMMON],
    )
    assert "holds another run" in message and "learning_rate: 0.0001, now 0.5" in message


def test_plan_only_does_nothing(micro, tiny_bert, tmp_path, capsys):
    lines = {"cached": "measure the student", "live": "read the same batches with", "joint": "train teacher along"}
    for mode, line in lines.items():
        distill(micro, tiny_bert, tmp_path / "out", "--plan_only", "true", "--teacher_mode", mode)
        shown = capsys.readouterr().out
        assert "train the student: 8 steps of 8 queries" in shown
        assert line in shown
    assert not (tmp_path / "out").exists()


def test_cross_encoder_teacher_through_separate_verbs(micro, tiny_bert, tmp_path):
    """Warm-up, mine, score, distil, evaluate: each verb alone, on a collection in our own layout."""
    data = save_collection(load_collection(micro), tmp_path / "data")
    ranker, student = tmp_path / "ranker", tmp_path / "student"
    mining = ["--mine_depth", "20", "--mine_negatives", "8"]
    main(
        [
            "train",
            "--data",
            str(data),
            "--model",
            str(tiny_bert),
            "--kind",
            "cross_encoder",
            "--output_dir",
            str(ranker),
        ]
        + [*COMMON, "--max_steps", "6", *mining]
    )
    trained = json.loads((ranker / "metrics.json").read_text())
    assert set(next(iter(trained.values()))) == {"bm25", "before", "trained"}
    main(["mine", "--data", str(data), "--model", "bm25", "--name", "hard", *mining])
    main(["score", "--data", str(data), "--rows", "hard", "--model", str(ranker)])
    rows = load_collection(data).rows("hard")
    assert {"scores", "retriever_scores"} <= set(rows.score_columns) and 30 <= len(rows) <= 36
    main(
        ["distill", "--data", str(data), "--rows", "hard", "--teacher", "column:scores", "--student", str(tiny_bert)]
        + ["--output_dir", str(student), "--max_steps", "6", "--baseline", "false", *COMMON]
    )
    main(
        ["evaluate", "--data", str(data), "--model", "bm25", str(ranker), str(student), "--rerank", "bm25"]
        + ["--output_dir", str(tmp_path / "figures"), "--measures", "nDCG@5,RR@10,AP@20,R@50"]
    )
    found = next(iter(json.loads((tmp_path / "figures" / "metrics.json").read_text()).values()))
    assert set(found) == {"bm25", "ranker", "student"}
    assert {"nDCG@5", "RR@10", "AP@20", "R@50"} <= set(found["student"])
    run = next((tmp_path / "figures" / "runs").glob("student*.trec"))
    main(
        ["evaluate", "--data", str(data), "--model", str(run), "--names", "again", "--output_dir", str(tmp_path / "b")]
    )
    again = next(iter(json.loads((tmp_path / "b" / "metrics.json").read_text()).values()))["again"]
    assert again["RR@10"] == pytest.approx(found["student"]["RR@10"], abs=1e-9)


def test_live_teachers_several_at_once(micro, tiny_bert, tiny_ranker, tmp_path):
    losses = [{"name": "kl", "candidates": "global"}, {"name": "margin_mse", "teacher": "teacher_2"}]
    main(
        ["distill", "--data", str(micro), "--teacher", str(tiny_bert), str(tiny_ranker), "--teacher_mode", "live"]
        + ["--student", "layers:1", "--output_dir", str(tmp_path / "out"), "--max_steps", "4", "--baseline", "false"]
        + [
            *COMMON,
            "--mine_with",
            "bm25",
            "--mine_depth",
            "20",
            "--mine_window",
            "1,20",
            "--losses",
            json.dumps(losses),
            "--teacher_dtype",
            "bfloat16",
        ]
    )
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())["micro/test"]
    assert {"teacher", "teacher_2", "student"} <= set(figures)
    teachers = json.loads((tmp_path / "out" / "run_manifest.json").read_text())["models"]["teachers"]
    assert [teacher["dtype"] for teacher in teachers] == ["bfloat16", "bfloat16"]
    assert teachers[0]["weights"] == load_model(tiny_bert).weights_fingerprint()


def test_search_answers(micro, capsys):
    main(["search", "--data", str(micro), "--model", "bm25", "--query", "bread", "--top", "2"])
    shown = capsys.readouterr().out
    assert shown.startswith("1. ") and "2. " in shown and "3. " not in shown


def test_bad_input_is_one_sentence(micro, tiny_bert, tiny_ranker, tmp_path, capsys):
    base = ["distill", "--data", str(micro), "--output_dir", str(tmp_path / "out"), *COMMON]
    bert, ranker = str(tiny_bert), str(tiny_ranker)
    assert "Name a bi-encoder" in fails(capsys, *base, "--teacher", ranker, "--student", "layers:2")
    assert "nobody/nothing" in fails(capsys, *base, "--teacher", "nobody/nothing", "--student", "layers:2")
    assert "the teacher has 4 layers" in fails(capsys, *base, "--teacher", bert, "--student", "layers:9")
    assert "no judgements 'validation'" in fails(
        capsys, *base, "--teacher", bert, "--student", "layers:2", "--eval_split", "validation"
    )
    assert "not a window" in fails(capsys, *base, "--teacher", bert, "--student", "layers:2", "--mine_window", "9,3")
    assert "no row set 'mined'" in fails(capsys, *base, "--teacher", bert, "--student", "layers:2", "--rows", "mined")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert "holds no run" in fails(
        capsys, *base, "--teacher", bert, "--student", "layers:2", "--output_dir", str(tmp_path / "mine")
    )
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_cut_off_checkpoints_are_passed_over(tmp_path):
    from hf_distill.trainers.checkpoints import last_complete_checkpoint

    assert last_complete_checkpoint(tmp_path) is None
    for step in (4, 8, 12):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "rng_state.pth").write_bytes(b"")
        (folder / "trainer_state.json").write_text("{}" if step == 4 else '{"global_st' if step == 8 else "")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert not Path(tmp_path / "checkpoint-12").exists()
