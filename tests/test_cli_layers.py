"""Multi-vector models and the distillation of layers through the verbs."""

from __future__ import annotations

import json

import pytest

from hf_distill.cli.main import main
from hf_distill.data import RowSet, load_collection
from hf_distill.models import DenseRetriever, MultiVectorRetriever, load_model


COMMON = ["--use_cpu", "true", "--per_device_train_batch_size", "8", "--num_negatives", "2", "--report_to", "none"]
COMMON += ["--max_steps", "2", "--logging_steps", "1"]
MINING = ["--mine_depth", "10", "--mine_negatives", "4", "--mine_with", "bm25"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, micro, tiny_bert_source):
    """A trained multi-vector model and rows with the scores of its layers."""
    import os

    os.environ["HF_DISTILL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    folder = tmp_path_factory.mktemp("verbs")
    data = ["--data", str(micro)]
    main(
        ["train", *data, "--kind", "multi_vector", "--model", str(tiny_bert_source), "--projection_dim", "16"]
        + ["--query_length", "12", "--passage_length", "32", "--skip_punctuation", "true", *COMMON, *MINING]
        + ["--output_dir", str(folder / "colbert")]
    )
    main(["mine", *data, "--model", str(folder / "colbert"), "--mine_depth", "10", "--mine_negatives", "4"]
         + ["--output_dir", str(folder / "rows")])  # fmt: skip
    main(["score", *data, "--rows", str(folder / "rows"), "--model", str(folder / "colbert"), "--layers", "all"]
         + ["--output_dir", str(folder / "scored")])  # fmt: skip
    return folder


def test_training_mining_and_scoring(folder, micro):
    model = load_model(folder / "colbert")
    assert isinstance(model, MultiVectorRetriever) and model.token_size == 16 and model._skipped
    metrics = json.loads((folder / "colbert" / "metrics.json").read_text())["micro/test"]
    assert set(metrics) >= {"bm25", "before", "trained"} and 0 <= metrics["trained"]["nDCG@10"] <= 1
    data = load_collection(micro)
    rows = RowSet.load(folder / "scored", data.queries, data.corpus)
    assert {"scores", "layer_scores_teacher"} <= set(rows.columns)
    assert rows.metadata["teachers"]["layer_scores_teacher"]["layers"] == [1, 2, 3, 4]


def test_evaluating_and_searching(folder, micro, capsys):
    main(["evaluate", "--data", str(micro), "--model", str(folder / "colbert"), "--names", "colbert"]
         + ["--output_dir", str(folder / "figures")])  # fmt: skip
    metrics = json.loads((folder / "figures" / "metrics.json").read_text())["micro/test"]
    trained = json.loads((folder / "colbert" / "metrics.json").read_text())["micro/test"]["trained"]
    assert metrics["colbert"]["nDCG@10"] == pytest.approx(trained["nDCG@10"])
    main(
        ["search", "--data", str(micro), "--model", str(folder / "colbert"), "--query", "stars at night", "--top", "2"]
    )
    assert "1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "teacher", "more"),
    [
        ("joint", "colbert", ["--teacher_mode", "joint"]),
        ("cached", "colbert", ["--method", "lead", "--layer_pairing", "1:2,2:4"]),
        ("column", "column:scores", ["--method", "lead", "--layer_pairing", "even"]),
    ],
)
def test_lead_by_one_command(name, teacher, more, folder, micro, tiny_bert_source, tmp_path_factory):
    student = tmp_path_factory.getbasetemp() / "student-start"
    if not student.exists():
        main(["train", "--data", str(micro), "--model", str(tiny_bert_source), "--layers", "2", "--pooling", "cls"]
             + [*COMMON, *MINING, "--output_dir", str(student)])  # fmt: skip
    out = folder / name
    source = teacher if teacher.startswith("column") else str(folder / teacher)
    main(
        ["distill", "--data", str(micro), "--teacher", source, "--student", str(student), "--output_dir", str(out)]
        + ["--rows", str(folder / "scored"), "--baseline", "false", *COMMON, *more]
    )
    assert isinstance(load_model(out), DenseRetriever)
    history = json.loads((out / "history.json").read_text())
    assert all("layer_alignment" in entry for entry in history if "loss" in entry)
    assert (out / "teacher" / "config.json").is_file() == (name == "joint")
    if name == "joint":
        assert isinstance(load_model(out / "teacher"), MultiVectorRetriever)
        assert all("teacher_contrastive" in entry and "teacher_kl" in entry for entry in history if "loss" in entry)


@pytest.mark.parametrize(
    ("method", "mode", "terms"),
    [
        ("none", "live", {"contrastive"}),
        ("response", "live", {"kl"}),
        ("labelled_response", "joint", {"contrastive", "kl", "teacher_contrastive", "teacher_kl"}),
        ("embedding", "cached", {"contrastive", "embedding_mse"}),
        ("attention", "live", {"contrastive", "kl", "interaction_maps"}),
        ("lead_uniform", "joint", {"contrastive", "kl", "teacher_contrastive", "teacher_kl", "layer_alignment"}),
    ],
)
def test_every_baseline_is_one_switch(method, mode, terms, folder, micro, tiny_bert_source, tmp_path):
    main(
        ["distill", "--data", str(micro), "--teacher", str(tiny_bert_source), "--student", "layers:2", *COMMON]
        + ["--method", method, "--teacher_mode", mode, "--rows", str(folder / "rows"), "--max_steps", "1"]
        + ["--baseline", "false", "--output_dir", str(tmp_path / "out")]
    )
    logged = json.loads((tmp_path / "out" / "history.json").read_text())[0]
    assert terms <= set(logged) and logged["loss"] == pytest.approx(sum(logged[name] for name in terms), rel=1e-3)


def test_a_cached_dense_teacher_gives_its_layers_with_all_candidates(
    folder, micro, tiny_bert_source, tmp_path, capsys
):
    losses = "[contrastive, {name: kl, candidates: global}, {name: layer_alignment, candidates: global}]"
    words = ["--data", str(micro), "--student", str(tiny_bert_source), *COMMON, "--losses", losses]
    words += ["--rows", str(folder / "rows"), "--layer_pairing", "1:2,2:4", "--max_steps", "1", "--baseline", "false"]
    main(["distill", "--teacher", str(tiny_bert_source), *words, "--output_dir", str(tmp_path / "out")])
    assert "2 layers of teacher (0.0 GiB)" in " ".join(capsys.readouterr().out.split())
    logged = json.loads((tmp_path / "out" / "history.json").read_text())[0]
    assert logged["layer_alignment"] > 0
    teacher = json.loads((tmp_path / "out" / "run_manifest.json").read_text())["models"]["teachers"][0]
    assert teacher["kind"] == "CachedEmbeddings" and teacher["layers"] == [2, 4]
    # Vectors of single texts are all that can be kept of them.
    with pytest.raises(SystemExit):
        main(["distill", "--teacher", str(folder / "colbert"), *words, "--output_dir", str(tmp_path / "other")])
    assert "own; or let the model read every batch (--teacher_mode live)" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_bad_layers_are_refused_before_any_work(folder, micro, tiny_bert_source, tmp_path, capsys):
    def fails(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(list(words))
        assert end.value.code == 2
        return capsys.readouterr().err

    score = ["score", "--data", str(micro), "--rows", str(folder / "rows"), "--model", str(folder / "colbert")]
    assert "has the layers 1 to 4, not 9" in fails(*score, "--layers", "9", "--output_dir", str(tmp_path / "a"))
    assert "no list of layers" in fails(*score, "--layers", "some", "--output_dir", str(tmp_path / "a"))
    distill = [
        "distill",
        "--data",
        str(micro),
        "--teacher",
        str(folder / "colbert"),
        "--student",
        str(tiny_bert_source),
    ]
    distill += ["--output_dir", str(tmp_path / "out"), "--method", "lead", *COMMON]
    assert "the teacher has the layers 1 to 4, not 7" in fails(*distill, "--layer_pairing", "1:7")
    assert "cannot score global candidates" in fails(
        *distill[:-2], "--losses", '[{"name": "layer_alignment", "candidates": "global"}]'
    )
    attention = [*distill[: distill.index("--method")], "--method", "attention", *COMMON]
    assert "read different tokens" in fails(*attention, "--teacher_mode", "live")
    assert "only stored scores" in fails(*attention)
    assert not (tmp_path / "out").exists()
