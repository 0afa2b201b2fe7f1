"""`hf-distill compare`: from runs and output folders to tables and files, and what cannot be compared."""

from __future__ import annotations

import json

import pytest
import scipy.stats

from hf_distill.cli.main import main
from hf_distill.data import load_collection
from hf_distill.evaluation import evaluate_system, read_per_query
from hf_distill.retrieval import bm25_search


@pytest.fixture(scope="module")
def folders(tmp_path_factory, micro):
    """Two output folders with three systems each: BM25, a worse one, and (of the second) two seeds."""
    import os

    os.environ["HF_DISTILL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    data = load_collection(micro)
    root = tmp_path_factory.mktemp("folders")
    for split in ("test", "dev"):
        queries = data.qrels[split].query_positions()
        run = bm25_search(data, queries, 20)
        worse = type(run)(run.query, run.documents[:, 1:], run.scores[:, 1:])
        cut = run.cut(1)
        for folder, systems in (
            ("one", {"bm25": run, "student": worse}),
            ("two", {"student": run, "other@1": worse, "other@2": cut}),
        ):
            for name, ranking in systems.items():
                if split == "test" or (folder, name) == ("two", "student"):
                    evaluate_system(name, ranking, data, split, root / folder)
    return root


def shown(capsys, *argv) -> str:
    main(["compare", *map(str, argv)])
    return capsys.readouterr().out


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as end:
        main(["compare", *map(str, argv)])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_folder_alone_is_all_of_its_systems(folders, capsys, tmp_path):
    text = shown(capsys, folders / "one", "--output_dir", tmp_path)
    assert "micro/test: nDCG@10 on 17 queries" in text and "micro/test: R@100" in text
    found = json.loads((tmp_path / "comparison.json").read_text())
    pair = found["comparisons"][0]
    assert (pair["baseline"], pair["system"], pair["measure"]) == ("bm25", "student", "nDCG@10")
    before, after = (
        [row["nDCG@10"] for _, row in sorted(read_per_query(path).items())]
        for path in sorted((folders / "one" / "per_query").glob("*.parquet"))
    )
    assert pair["p_t_test"] == pytest.approx(scipy.stats.ttest_rel(after, before).pvalue)
    assert pair["wins"] + pair["losses"] + pair["ties"] == pair["n_queries"] == 17
    assert pair["losses"] == sum(a < b for a, b in zip(after, before))
    card = (tmp_path / "comparison.md").read_text()
    assert "## RR@10" in card and "| student |" in card and "Queries that changed most" in card
    changes = [abs(entry["difference"]) for entry in found["changed"] if entry["measure"] == "nDCG@10"]
    assert len(changes) == 5 and changes == sorted(changes, reverse=True)


def test_several_folders_stand_for_their_students(folders, capsys, tmp_path):
    args = [folders / "one", folders / "two", "--split", "test", "--output_dir", tmp_path]
    shown(capsys, *args)
    pair = json.loads((tmp_path / "comparison.json").read_text())["comparisons"][0]
    assert (pair["baseline"], pair["system"]) == ("one:student", "two:student")
    shown(capsys, *args, "--baseline", "two:student", "--measures", "RR@10")
    found = json.loads((tmp_path / "comparison.json").read_text())["comparisons"]
    assert [(one["measure"], one["baseline"]) for one in found] == [("RR@10", "two:student")]


def test_runs_are_measured_anew_and_seeds_averaged(folders, micro, capsys, tmp_path):
    runs = [folders / "one" / "runs" / "bm25.micro.test.trec"]
    runs += [folders / "two" / "runs" / f"other@{seed}.micro.test.trec" for seed in (1, 2)]
    args = ["--data", micro, "--measures", "AP@5,R@3", "--output_dir", tmp_path, "--correction", "bonferroni"]
    text = shown(capsys, *runs, *args)
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert [(one["measure"], one["system"]) for one in found["comparisons"]] == [("AP@5", "other"), ("R@3", "other")]
    queries = {query["query_id"] for query in found["changed"]}
    texts = [json.loads(line) for line in (micro / "queries.jsonl").read_text().splitlines()]
    assert queries and all(entry["text"] for entry in found["changed"])
    assert queries <= {record["_id"] for record in texts}
    assert "text" in text
    # A folder's runs, under names of one's own, are the same comparison.
    places = [f"{folders / 'one'}:bm25", f"{folders / 'two'}:other@1", f"{folders / 'two'}:other@2"]
    names = ["--names", "bm25", "other@a", "other@b", "--split", "test"]
    shown(capsys, *places, *args, *names)
    assert json.loads((tmp_path / "comparison.json").read_text())["comparisons"] == found["comparisons"]


def test_what_cannot_be_compared_is_said(folders, micro, capsys, tmp_path):
    one, two = folders / "one", folders / "two"
    runs = one / "runs"
    assert "still needs --systems" in refused(capsys)
    assert "nowhere: there is no such file or folder" in refused(capsys, "nowhere", one)
    assert "holds figures of micro/dev, micro/test" in refused(capsys, one, two)
    assert "has no system 'teacher'. Choose one as" in refused(capsys, f"{one}:teacher", f"{one}:student")
    parquet = [one / "per_query" / "bm25.micro.test.parquet", two / "per_query" / "student.micro.dev.parquet"]
    assert "bm25 was measured on micro/test and student on micro/dev" in refused(capsys, *parquet)
    assert "Name the collection: --data" in refused(
        capsys, runs / "bm25.micro.test.trec", one / "runs/student.micro.test.trec"
    )
    assert "student was not measured by nDCG@3" in refused(capsys, one, "--measures", "nDCG@3").replace("bm25, ", "")
    assert "1 system" in refused(capsys, f"{one}:student")
    assert "--alpha: 2.0 cannot be used" in refused(capsys, one, "--alpha", "2")
    assert "1 names for 2 systems (bm25, student)" in refused(capsys, one, "--names", "a")
    # Files without a split in their names: the queries tell.
    for number, split in enumerate(("test", "dev")):
        (tmp_path / f"run{number}.trec").write_bytes((two / "runs" / f"student.micro.{split}.trec").read_bytes())
    message = refused(capsys, tmp_path / "run0.trec", tmp_path / "run1.trec", "--data", micro)
    assert "run1.trec: a run of another split: it answers 0% of the queries of 'test'" in message
    assert "Add --split dev" in message


def test_different_queries_are_refused(folders, capsys, tmp_path):
    import pyarrow.parquet as pq

    source = folders / "one" / "per_query" / "bm25.micro.test.parquet"
    table = pq.read_table(source)
    pq.write_table(table.slice(1), tmp_path / "less.parquet")
    message = refused(capsys, source, tmp_path / "less.parquet")
    assert "bm25 was measured on 17 queries and less on 16; 1 are not common to both" in message
    pq.write_table(table.slice(1, 1), tmp_path / "a.parquet")
    pq.write_table(table.slice(1, 1), tmp_path / "b.parquet")
    assert "at least 2 queries" in refused(capsys, tmp_path / "a.parquet", tmp_path / "b.parquet")
