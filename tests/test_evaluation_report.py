"""What an evaluation leaves on disk and in the terminal."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch

from hf_distill.data.collection import Collection
from hf_distill.data.qrels import Qrels
from hf_distill.data.run import Run
from hf_distill.data.tables import Corpus, Queries
from hf_distill.errors import InputError
from hf_distill.evaluation import (
    evaluate_system,
    markdown_table,
    plot_report,
    plot_tradeoff,
    plot_training,
    print_summary,
    read_per_query,
    run_file,
    summary_table,
    update_metrics,
)


SYSTEMS = {
    "student": {"nDCG@10": 0.57, "R@100": 0.9, "n_queries": 3, "layers": 3, "parameters": 17_350_000},
    "other": {"nDCG@10": 0.2, "n_queries": 3},
    "student@2": {"nDCG@10": 0.56, "n_queries": 3},
    "teacher": {
        "nDCG@10": 0.6,
        "R@100": 0.95,
        "n_queries": 3,
        "parameters": 22_700_000,
        "passages_per_second": 1234.5,
    },
    "bm25": {"nDCG@10": 0.4, "R@100": 0.8, "n_queries": 3, "index_bytes": 3 * 2**20},
}


@pytest.fixture
def collection() -> Collection:
    queries = Queries.from_records([{"query_id": f"q{i}", "text": f"query {i}"} for i in range(4)])
    corpus = Corpus.from_records([{"document_id": f"d{i}", "title": "", "text": f"text {i}"} for i in range(5)])
    qrels = {
        "test": Qrels(np.array([0, 1, 2, 3]), np.array([0, 1, 2, 3]), np.array([1, 2, 1, 0])),
        "graded": Qrels(np.array([0, 1]), np.array([0, 1]), np.array([1, 2])),
    }
    return Collection("toy", queries, corpus, qrels, "memory", None, ())


@pytest.fixture
def run() -> Run:
    documents = np.array([[4, 0, -1], [1, 2, 3]])
    scores = np.array([[0.9, 0.5, -np.inf], [3.0, 2.0, 1.0]], dtype=np.float32)
    return Run(np.array([0, 1]), documents, scores)


def test_evaluate_system_writes_everything(collection, run, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_distill"):
        result = evaluate_system("student", run, collection, "test", tmp_path, figures={"layers": 3, "seconds": None})
    assert "1 of 3 queries have no results" in caplog.text
    assert result.means["RR@10"] == pytest.approx((1 / 2 + 1 + 0) / 3) and result.means["n_queries"] == 3

    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == {"toy/test": {"student": {**result.means, "layers": 3}}}
    path = run_file(tmp_path, "student", "toy", "test")
    assert path == tmp_path / "runs" / "student.toy.test.trec"
    assert [line.split()[:4] for line in path.read_text().splitlines()] == [
        ["q0", "Q0", "d4", "1"],
        ["q0", "Q0", "d0", "2"],
        ["q1", "Q0", "d1", "1"],
        ["q1", "Q0", "d2", "2"],
        ["q1", "Q0", "d3", "3"],
    ]
    loaded = Run.load_trec(path, collection.queries, collection.corpus)
    assert evaluate_system("again", loaded, collection, "test").means == result.means
    assert read_per_query(tmp_path / "per_query" / "student.toy.test.parquet") == result.per_query
    assert set(result.per_query) == {"q0", "q1", "q2"}

    evaluate_system("student", run, collection, "graded", tmp_path, relevance_threshold=2)
    evaluate_system("bm25", run, collection, "test", tmp_path)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert list(written) == ["toy/test", "toy/graded"] and list(written["toy/test"]) == ["student", "bm25"]
    assert written["toy/graded"]["student"]["n_queries"] == 1
    assert len(list((tmp_path / "runs").glob("*.trec"))) == 3


def test_only_the_main_process_writes(collection, run, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    evaluate_system("student", run, collection, "test", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_split(collection, run, tmp_path):
    with pytest.raises(InputError, match="no split 'dev'.*test, graded"):
        evaluate_system("student", run, collection, "dev", tmp_path)


def test_names_of_systems_cannot_leave_the_folder(tmp_path):
    path = run_file(tmp_path, "../BAAI/bge small", "my/data", "test")
    assert path.parent == tmp_path / "runs" and path.name == "_BAAI_bge_small.my_data.test.trec"
    assert run_file(tmp_path, "student@7", "demo", "test").name == "student@7.demo.test.trec"


def test_metrics_are_merged(tmp_path):
    path = tmp_path / "metrics.json"
    update_metrics(path, "a/test", "student", {"nDCG@10": np.float32(0.5), "n_queries": 3, "seconds": 7})
    update_metrics(path, "a/test", "teacher", {"nDCG@10": torch.tensor(0.75)})
    update_metrics(path, "b/test", "student", {"nDCG@10": float("nan"), "layers": None})
    update_metrics(path, "a/test", "student", {"nDCG@10": 0.25})
    assert json.loads(path.read_text()) == {
        "a/test": {"student": {"nDCG@10": 0.25, "n_queries": 3, "seconds": 7}, "teacher": {"nDCG@10": 0.75}},
        "b/test": {"student": {"nDCG@10": None}},
    }
    assert [entry.name for entry in tmp_path.iterdir() if not entry.name.startswith(".")] == ["metrics.json"]


@pytest.mark.parametrize("content", ["{", "[]", '{"a/test": 1}', '{"a/test": {"student": 0.5}}'])
def test_a_foreign_metrics_file_is_not_overwritten(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"metrics\.json"):
        update_metrics(path, "a/test", "student", {"nDCG@10": 0.5})
    assert path.read_text() == content


def test_summary_table():
    columns, rows = summary_table(SYSTEMS)
    assert columns == [
        "system", "nDCG@10", "R@100", "layers", "parameters", "passages/s", "index", "nDCG@10 of teacher"
    ]  # fmt: skip
    assert rows == [
        ["bm25", "0.4000", "0.8000", "–", "–", "–", "3.0 MiB", "66.7%"],
        ["teacher", "0.6000", "0.9500", "–", "22.7 M", "1,234", "–", "100.0%"],
        ["student", "0.5700", "0.9000", "3", "17.4 M", "–", "–", "95.0%"],
        ["student@2", "0.5600", "–", "–", "–", "–", "–", "93.3%"],
        ["other", "0.2000", "–", "–", "–", "–", "–", "33.3%"],
    ]
    columns, rows = summary_table({"bm25": SYSTEMS["bm25"]}, ["R@100"])
    assert columns == ["system", "R@100", "index"] and rows == [["bm25", "0.8000", "3.0 MiB"]]


def test_the_table_in_the_terminal_and_in_a_card(tmp_path, capsys):
    update_metrics(tmp_path / "metrics.json", "toy/test", "student", SYSTEMS["student"])
    update_metrics(tmp_path / "metrics.json", "toy/dev", "student", {"nDCG@10": 0.1})
    print_summary(tmp_path / "metrics.json", dataset="toy/test")
    printed = capsys.readouterr().out
    assert "toy/test (3 queries)" in printed and "0.5700" in printed and "toy/dev" not in printed
    print_summary({"toy/dev": {"student": {"nDCG@10": None}}})
    assert "toy/dev" in capsys.readouterr().out
    assert markdown_table({"bm25": SYSTEMS["bm25"]}, ["nDCG@10"]).splitlines() == [
        "| system | nDCG@10 | index |",
        "| --- | ---: | ---: |",
        "| bm25 | 0.4000 | 3.0 MiB |",
    ]


def is_png(path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5_000


def test_plots(tmp_path):
    assert is_png(plot_tradeoff(SYSTEMS, tmp_path / "size.png", cost="parameters", title="toy/test"))
    assert plot_tradeoff({"bm25": SYSTEMS["bm25"]}, tmp_path / "none.png") is None
    one = {"student": {"nDCG@10": 0.0, "parameters": 5}}
    assert is_png(plot_tradeoff(one, tmp_path / "one.png", cost="parameters"))
    with pytest.raises(InputError, match="unknown cost 'watts'.*parameters"):
        plot_tradeoff(SYSTEMS, tmp_path / "x.png", cost="watts")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "size.png"]


def test_training_curves_show_losses_parts_and_measures(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda axes, x, y, **style: drawn.update({style["label"]: (x, y)}) or plot(axes, x, y, **style)
    )
    history = [
        {
            "step": 10,
            "epoch": 0.1,
            "loss": 2.0,
            "kl": 1.5,
            "contrastive": 0.5,
            "grad_norm": 9.0,
            "learning_rate": 1e-5,
        },
        {"step": 10, "epoch": 0.1, "eval_nDCG@10": 0.3, "eval_runtime": 4.0},
        {"step": 20, "epoch": 0.2, "loss": 1.0, "kl": 0.6, "contrastive": float("nan"), "grad_norm": 8.0},
        {"step": 20, "epoch": 0.2, "eval_nDCG@10": 0.4},
        {"step": 20, "train_runtime": 5.0, "train_loss": 1.5, "total_flos": 1e9},
    ]
    assert is_png(plot_training(history, tmp_path / "training.png"))
    assert drawn == {
        "total": ((10, 20), (2.0, 1.0)),
        "kl": ((10, 20), (1.5, 0.6)),
        "contrastive": ((10,), (0.5,)),
        "nDCG@10": ((10, 20), (0.3, 0.4)),
    }
    drawn.clear()
    plot_training([{"step": 10, "loss": 2.0, "kl": 2.0}], tmp_path / "training.png")
    assert list(drawn) == ["loss"]  # a single part says the same twice
    assert plot_training([{"step": 1, "train_loss": 1.0}], tmp_path / "none.png") is None


def test_plot_report(tmp_path):
    for name, figures in SYSTEMS.items():
        update_metrics(tmp_path / "metrics.json", "toy/test", name, figures)
    made = plot_report(tmp_path, log_history=[{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])
    assert [path.name for path in made] == [
        "toy_test_speed.png",
        "toy_test_size.png",
        "toy_test_index.png",
        "training.png",
    ]
    assert all(path.parent == tmp_path / "plots" and is_png(path) for path in made)
