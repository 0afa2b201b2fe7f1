"""The metric for `evaluate`: a folder that opens offline, alone, in batches and in several processes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_distill.evaluation import evaluate_run, metric_folder


MEASURES = ["nDCG@10", "nDCG", "RR@10", "RR@2", "AP@5", "AP", "R@3", "P@2", "Success@1"]


def some_data(seed: int = 0, queries: int = 30) -> tuple[dict, dict]:
    """Judgements and a run with ties, unanswered and unjudged queries."""
    luck = random.Random(seed)
    qrels, run = {}, {}
    for number in range(queries):
        pool = [f"d{document}" for document in range(30)]
        qrels[f"q{number}"] = {document: luck.randint(0, 2) for document in luck.sample(pool, 6)}
        qrels[f"q{number}"][pool[0]] = 1
        scores = {document: luck.choice([0.1, 0.3, luck.random()]) for document in luck.sample(pool, 12)}
        run[f"q{number}"] = scores if number % 7 else {}
    return qrels, run


def items(table: dict, column: str) -> list[dict]:
    return [{"query_id": query, "document_ids": list(row), column: list(row.values())} for query, row in table.items()]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Opens the metric as a stranger would: copied out of the package."""
    import evaluate

    folder = shutil.copytree(metric_folder(), tmp_path_factory.mktemp("space") / "ranking_measures")
    cache = str(tmp_path_factory.mktemp("metrics"))
    return lambda **options: evaluate.load(str(folder), cache_dir=cache, **options)


def test_equals_the_package_and_pytrec_eval(load):
    import pytrec_eval

    qrels, run = some_data()
    found = load().compute(
        predictions=items(run, "scores"), references=items(qrels, "relevances"), measures=MEASURES, per_query=True
    )
    ours = evaluate_run(qrels, run, MEASURES)
    per_query = found.pop("per_query")
    assert found == ours.means
    assert per_query["query_id"] == list(ours.per_query)
    assert per_query["AP@5"] == [row["AP@5"] for row in ours.per_query.values()]
    truth = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "map", "recall.3"}).evaluate(run)
    for ours_name, name in (("nDCG@10", "ndcg_cut_10"), ("AP", "map"), ("R@3", "recall_3")):
        mean = sum(truth.get(query, {}).get(name, 0.0) for query in qrels) / len(qrels)
        assert found[ours_name] == pytest.approx(mean, abs=1e-12)


def test_batches_in_any_order_and_a_query_in_pieces(load):
    qrels, run = some_data(1)
    whole = load().compute(
        predictions=items(run, "scores"), references=items(qrels, "relevances"), measures=MEASURES,
        relevance_threshold=2,
    )  # fmt: skip
    metric = load()
    predictions, references = items(run, "scores"), items(qrels, "relevances")[::-1]
    # One query's documents in two items, one of them repeated.
    first = predictions[1]
    half = {name: value[:6] if isinstance(value, list) else value for name, value in first.items()}
    rest = {name: value[5:] if isinstance(value, list) else value for name, value in first.items()}
    nothing = {"query_id": "q1", "document_ids": [], "relevances": []}
    metric.add(prediction=half, reference=nothing)
    predictions[1] = rest
    for start in range(0, len(predictions), 7):
        part = slice(start, start + 7)
        metric.add_batch(predictions=predictions[part], references=references[part])
    assert metric.compute(measures=MEASURES, relevance_threshold=2) == whole
    assert whole == evaluate_run(qrels, run, MEASURES, relevance_threshold=2).means


def test_combined_with_itself(load):
    import evaluate

    qrels, run = some_data(2)
    both = evaluate.combine({"left": load(), "right": load()})
    both.add_batch(predictions=items(run, "scores"), references=items(qrels, "relevances"))
    means = evaluate_run(qrels, run).means
    assert both.compute() == {f"{side}_{name}": value for side in ("left", "right") for name, value in means.items()}


def test_bad_input_is_said(load):
    good = {"query_id": "q", "document_ids": ["a"], "relevances": [1]}
    bad = {"query_id": "q", "document_ids": ["a", "b"], "scores": [1.0]}
    with pytest.raises(ValueError, match="predictions, query 'q': 1 scores for 2 document_ids"):
        load().compute(predictions=[bad], references=[good])
    twice = {"query_id": "q", "document_ids": ["a", "a"], "scores": [1.0, 2.0]}
    with pytest.raises(ValueError, match="document 'a' has two different scores"):
        load().compute(predictions=[twice], references=[good])
    fine = {"query_id": "q", "document_ids": ["a"], "scores": [1.0]}
    with pytest.raises(ValueError, match="unknown measure 'nDGC@10'; choose among nDCG"):
        load().compute(predictions=[fine], references=[good], measures=["nDGC@10"])


SCRIPT = """
import json, sys
sys.modules["hf_distill"] = None  # a Space does not have it
import evaluate
folder, cache, data, process = sys.argv[1:]
predictions, references = json.load(open(data))
process = int(process)
metric = evaluate.load(folder, num_process=2, process_id=process, experiment_id="two", cache_dir=cache)
metric.add_batch(predictions=predictions[process::2], references=references[process::2])
print(json.dumps(metric.compute(measures=["nDCG@10", "AP"])))
"""


@pytest.mark.distributed
def test_two_processes_offline_without_this_package(tmp_path):
    qrels, run = some_data(3)
    data = tmp_path / "data.json"
    data.write_text(json.dumps([items(run, "scores"), items(qrels, "relevances")]))
    folder = shutil.copytree(metric_folder(), tmp_path / "ranking_measures")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "cache"), str(data), str(process)],
            env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process in (0, 1)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert json.loads(outputs[1][0]) is None
    assert json.loads(outputs[0][0]) == pytest.approx(evaluate_run(qrels, run, ["nDCG@10", "AP"]).means)


def test_what_a_space_needs_is_there_and_installed():
    """The card, the page and the requirements; and the wheel has them, not only the checkout."""
    from configparser import ConfigParser

    from huggingface_hub import RepoCard

    card = RepoCard.load(metric_folder() / "README.md")
    assert card.data.sdk == "gradio" and {"evaluate", "metric"} <= set(card.data.tags)
    assert (metric_folder() / card.data.app_file).is_file()
    setup = ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    shipped = setup["options.package_data"]["hf_distill.evaluation.ranking_measures"].split()
    beside = {path.name for path in metric_folder().iterdir() if path.is_file() and path.suffix != ".py"}
    assert beside == set(shipped)
    for script in metric_folder().glob("*.py"):
        assert not re.search(r"^\s*(from|import) hf_distill", script.read_text(), re.MULTILINE), script


def push_and_load(items_of_run: list[dict], items_of_qrels: list[dict]) -> dict:
    """In the process that talks to the Hub."""
    import evaluate

    from hf_distill.hub import Target, push_folder

    pushed = push_folder(metric_folder(), Target("alice/ranking_measures", kind="space"))
    assert pushed.kind == "space"
    metric = evaluate.load("alice/ranking_measures", module_type="metric")
    return metric.compute(predictions=items_of_run, references=items_of_qrels)


def test_pushed_as_a_space_it_is_a_metric_by_its_id(hub, hub_client):
    qrels, run = some_data(4)
    found = hub_client(push_and_load, items(run, "scores"), items(qrels, "relevances"))
    assert found == evaluate_run(qrels, run).means
