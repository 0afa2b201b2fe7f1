"""The benchmarks' arithmetic: verdicts, memory, operations, and that both sides are given the same rows."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import common, run
from benchmarks.encoding import cosines, useful_flops
from benchmarks.steps import peer_columns, training_rows
from hf_distill.data import load_collection
from tests.conftest import MICRO


@pytest.mark.parametrize(
    "values, verdict",
    [
        ([1.3, 1.4, 1.35, 1.5, 1.31], "met"),
        ([1.0, 1.1, 1.15, 1.05, 1.3], "**missed**"),
        ([1.1, 1.15, 1.25, 1.3, 1.2], "within noise"),
        ([1.3, 1.3, 1.3, 1.3, 0.2], "met"),  # one disturbed round does not decide
    ],
)
def test_verdicts_need_the_middle_half_of_the_rounds(values, verdict):
    assert common.claim("x", values, 1.2)["verdict"] == verdict


def test_ratios_are_theirs_over_ours_round_by_round():
    assert common.ratios([1.0, 2.0], [2.0, 3.0]) == [2.0, 1.5]
    with pytest.raises(ValueError):
        common.ratios([1.0], [1.0, 2.0])


def test_rounds_alternate_in_order():
    calls = []
    contestants = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in ("a", "b")}
    assert common.alternate(contestants, 3) == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}
    assert "".join(calls) == "abbaab"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
def test_peak_memory_sees_what_was_given_back():
    assert common.memory_now() > 0
    with common.PeakMemory() as memory:
        held = np.ones(40 * 2**20, np.uint8)
        held += 1
        common.time.sleep(0.05)
        del held
    assert 38 * 2**20 < memory.bytes < 80 * 2**20


def test_useful_operations_are_those_of_a_model_without_padding(tiny_bert):
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_bert, attn_implementation="eager")
    lengths = np.array([7, 12])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for length in lengths.tolist():
            model.encoder(model.embeddings(torch.ones(1, length, dtype=torch.long)))
    assert useful_flops(lengths, model.config) == counter.get_total_flops()


def test_cosines():
    one, other = np.array([[1.0, 0.0], [2.0, 2.0]]), np.array([[3.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(cosines(one, other), [1, 2**-0.5])


def test_rows_hold_no_text_twice_and_reach_both_trainers_in_one_order(tiny_bert, tmp_path):
    from hf_distill.models import DenseRetriever
    from hf_distill.trainers import RetrievalTrainer, RetrievalTrainingArguments

    collection = load_collection(MICRO, cache_dir=tmp_path / "cache")
    rows = training_rows(collection, 6, negatives=2)
    columns = peer_columns(rows)
    assert columns.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    texts = [text for name in columns.column_names for text in columns[name]]
    assert len(texts) == len(set(texts)) == 24
    from benchmarks.steps import common_arguments

    arguments = RetrievalTrainingArguments(
        **{**common_arguments(tmp_path, 2, "float32", 3), "use_cpu": True}, num_negatives=2
    )
    trainer = RetrievalTrainer(DenseRetriever.from_pretrained(tiny_bert), arguments, rows=rows)
    queries = torch.cat([batch["query_ids"] for batch in trainer.get_train_dataloader()])
    documents = torch.cat([batch["passage_ids"] for batch in trainer.get_train_dataloader()])
    assert collection.queries.texts(queries.numpy()) == list(columns["anchor"])
    assert collection.corpus.texts(documents[:, 0].numpy()) == list(columns["positive"])
    for column, name in ((1, "negative_1"), (2, "negative_2")):
        # Negatives are drawn from the row's pool in any order.
        assert set(collection.corpus.texts(documents[:, column].numpy())) <= {
            *columns["negative_1"],
            *columns["negative_2"],
        }, name


def test_the_report_shows_every_claim(tmp_path):
    result = {
        "title": "Encoding",
        "intro": "Some texts.",
        "columns": ["what", "rate"],
        "rows": [["ours", "3"]],
        "claims": [common.claim("faster", [2.0, 2.1, 2.2], 1.2)],
        "checks": ["the same"],
        "threads": 2,
        "provenance": {
            "command": "c", "date": "d", "seconds": 1, "hardware": "h", "versions": "v", "load_before": 0.1,
        },
    }  # fmt: skip
    (tmp_path / "encoding.json").write_text(json.dumps(result))
    run.write_report(tmp_path, tmp_path / "RESULTS.md")
    report = (tmp_path / "RESULTS.md").read_text()
    assert "| faster | 2.10× (2.00× – 2.20×) | 3 | ≥ 1.20× | met |" in report
    assert "| ours | 3 |" in report and "- the same" in report and "`c`, d, 1 s; h, 2 threads" in report
