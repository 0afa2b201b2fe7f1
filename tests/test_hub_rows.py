"""Row sets on the Hub: others train on them as they are, the card tells where they come from, and they come back."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.data import Corpus, Queries, RowSet, load_collection
from hf_distill.data.sharing import equal_rows, margin_histogram, negatives_for_all
from hf_distill.errors import InputError

from .hub_client import verb


@pytest.fixture()
def mined(hub, hub_client, micro, tiny_ranker, tmp_path):
    """Rows mined and pushed by one command, scored and pushed again by another."""
    words = ["--data", micro, "--push_to", "alice/rows"]
    mine = ["mine", *words, "--model", "bm25", "--mine_depth", "20", "--mine_negatives", "6", "--private", "true"]
    assert hub_client(verb, *mine, "--output_dir", tmp_path / "bm25") == (0, "")
    score = ["score", *words, "--rows", tmp_path / "bm25", "--model", tiny_ranker]
    assert hub_client(verb, *score, "--output_dir", tmp_path / "scored") == (0, "")
    return tmp_path / "scored"


def _read_elsewhere(repo):
    """What `datasets` gives of a repository, and what sentence-transformers makes of it."""
    import datasets
    from sentence_transformers.util import resolve_ids

    configs = datasets.get_dataset_config_names(repo)
    read = {name: datasets.load_dataset(repo, name, split="train") for name in ("train", "queries", "documents")}
    train, queries, documents = read.values()
    plain = train.to_dict()
    default = datasets.load_dataset(repo, split="train").to_dict()
    train.set_transform(resolve_ids({"query_id": queries, "document_ids": documents}))
    return configs, plain, default == plain, queries.to_dict(), documents.to_dict(), train[:3]


def test_others_read_the_rows_as_they_are(hub, hub_client, mined, micro):
    repo = hub.repo("alice/rows", "dataset")
    assert repo.private and len(repo.history()) == 3
    configs, train, default, queries, documents, resolved = hub_client(_read_elsewhere, "alice/rows")
    assert set(configs) == {"train", "queries", "documents", "bm25"} and default
    assert list(train) == ["query_id", "document_ids", "scores"]
    assert list(queries) == ["query_id", "text"] and list(documents) == ["document_id", "text"]
    collection = load_collection(micro)
    texts = dict(zip(documents["document_id"], documents["text"]))
    positions = collection.corpus.positions(list(texts))
    assert list(texts.values()) == collection.corpus.texts(positions), "rendered as the models read them"
    relevant = collection.qrels["train"].as_dict(collection.queries, collection.corpus)
    for query, found, scores in zip(train["query_id"], train["document_ids"], train["scores"]):
        assert len(found) == len(scores) == len(train["document_ids"][0])
        assert found[0] in relevant[query] and not set(found[1:]) & set(relevant[query])
    assert list(resolved)[:2] == ["query", "document_1"] and "scores" in resolved
    assert resolved["document_1"][0] == texts[train["document_ids"][0][0]]


def _read_as_pylate_does(repo):
    """The steps of PyLate's documentation with `datasets` alone; PyLate itself needs an older sentence-transformers.

    `KDProcessing` indexes the columns `query_id` and `document_id`, takes `text` of both, and puts `query`,
    `documents` and `scores` (of 32 documents at most, the positive first) into each row.
    """
    import datasets

    train, queries, documents = (
        datasets.load_dataset(path=repo, name=name, split="train") for name in ("train", "queries", "documents")
    )
    query_of = {identifier: number for number, identifier in enumerate(queries["query_id"])}
    document_of = {identifier: number for number, identifier in enumerate(documents["document_id"])}

    def transform(rows):
        assert all(isinstance(values, list) for name in ("scores", "document_ids") for values in rows[name])
        rows["scores"] = [values[:32] for values in rows["scores"]]
        rows["query"] = [queries[query_of[one]]["text"] for one in rows["query_id"]]
        rows["documents"] = [[documents[document_of[one]]["text"] for one in ids[:32]] for ids in rows["document_ids"]]
        return rows

    train.set_transform(transform)
    return [{name: row[name] for name in ("query", "documents", "scores")} for row in train]


def test_pylate_reads_the_rows_as_they_are(hub, hub_client, mined, micro):
    rows = hub_client(_read_as_pylate_does, "alice/rows")
    collection = load_collection(micro)
    texts = set(collection.corpus.texts(np.arange(len(collection.corpus))))
    questions = set(collection.queries.texts(np.arange(len(collection.queries))))
    assert len(rows) > 20 and len({len(row["documents"]) for row in rows}) == 1, "one width for all rows of a batch"
    for row in rows:
        assert row["query"] in questions and set(row["documents"]) <= texts
        assert len(row["scores"]) == len(row["documents"]) and all(isinstance(one, float) for one in row["scores"])


def _train_elsewhere(repo, bert, ranker, folder):
    """sentence-transformers trains a retriever and a cross-encoder on a repository, with nothing but its name."""
    import datasets
    import torch
    from sentence_transformers import (
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.cross_encoder.losses import RankNetLoss
    from sentence_transformers.losses import DistillKLDivLoss
    from sentence_transformers.util import resolve_ids

    read = {name: datasets.load_dataset(repo, name, split="train") for name in ("train", "queries", "documents")}
    losses = []
    for model, trainer, arguments, loss, form in (
        (SentenceTransformer(str(bert), device="cpu"), SentenceTransformerTrainer,
         SentenceTransformerTrainingArguments, DistillKLDivLoss, "columns"),
        (CrossEncoder(str(ranker), device="cpu"), CrossEncoderTrainer, CrossEncoderTrainingArguments, RankNetLoss,
         "lists"),
    ):  # fmt: skip
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        train = datasets.load_dataset(repo, "train", split="train")
        lookups = {"query_id": read["queries"], "document_ids": read["documents"]}
        train.set_transform(resolve_ids(lookups, output_format=form))
        args = arguments(
            str(folder / form), use_cpu=True, max_steps=2, per_device_train_batch_size=4, report_to="none",
            save_strategy="no", logging_steps=1, learning_rate=0.01,
        )  # fmt: skip
        run = trainer(model=model, args=args, train_dataset=train, loss=loss(model))
        run.train()
        changed = any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        losses.append((run.state.log_history[0]["loss"], changed))
    return losses


@pytest.mark.slow
def test_sentence_transformers_trains_on_the_rows(hub, hub_client, mined, tiny_bert, tiny_ranker, tmp_path):
    losses = hub_client(_train_elsewhere, "alice/rows", tiny_bert, tiny_ranker, tmp_path)
    assert len(losses) == 2 and all(np.isfinite(loss) and changed for loss, changed in losses)


def test_the_card_tells_where_the_rows_come_from(hub, hub_client, mined, micro):
    card = hub.repo("alice/rows", "dataset").files()["README.md"].decode()
    mining = json.loads((mined / "metadata.json").read_text())["mining"]
    for word in (
        "Hard negatives for queries of *micro*, found by `bm25`", "ranks 1 to 20", "at most 6 a query, seed 42",
        f"Positives removed from the results: {mining['positives_removed']}", "Teacher of `scores`", "dtype `",
        "### Margins by `scores`", "### Margins at mining", "`{title} {text}`", "Code: hf_distill",
    ):  # fmt: skip
        assert word in card, (word, card)
    assert "hf_alice" not in card and "default: true" in card


def _come_back(repo, folder):
    from hf_distill.data import load_collection

    collection = load_collection(repo)
    rows = collection.rows("bm25")
    rows.save(folder)
    return collection.revision, collection.row_sets, rows.metadata["mining"]["retriever"]["name"]


def test_the_rows_come_back_whole(hub, hub_client, mined, tmp_path):
    revision, names, retriever = hub_client(_come_back, "alice/rows", tmp_path / "back")
    assert revision == hub.repo("alice/rows", "dataset").at().oid and "bm25" in names and retriever == "bm25"

    def content(folder):
        import pyarrow.parquet as pq

        return pq.read_table(folder, columns=["query_id", "document_ids", "num_positives", "ranks", "scores"])

    (back,), (sent,) = (sorted(folder.glob("*.parquet")) for folder in (tmp_path / "back", mined))
    assert content(back).equals(content(sent))


def _columns_fit(repo, data):
    """The fingerprints say that the texts are the same ones, here and beside the rows on the Hub."""
    from hf_distill.cli.row_sets import named_rows
    from hf_distill.cli.steps import Data
    from hf_distill.data import load_collection
    from hf_distill.teachers.cached import check_column

    there = load_collection(repo)
    here = load_collection(data)
    for collection in (there, here):
        rows = named_rows(Data(collection, "train", None, None), f"{repo}:bm25")
        assert check_column(rows, "scores")["dtype"]
    return [there.queries.fingerprint, there.corpus.fingerprint]


def test_the_scores_belong_to_the_texts_here_and_there(hub, hub_client, mined, micro):
    queries, corpus = hub_client(_columns_fit, "alice/rows", str(micro))
    assert not any("was made for other" in line for line in hub_client.log)
    same = json.loads(hub.repo("alice/rows", "dataset").files()["bm25/metadata.json"])["same_texts"]
    collection = load_collection(micro)
    assert set(same["queries"]) == {queries, collection.queries.fingerprint}
    assert set(same["corpus"]) == {corpus, collection.corpus.fingerprint}


def test_a_student_is_distilled_from_the_repository_alone(hub, hub_client, mined, tiny_bert, tmp_path):
    words = ["distill", "--data", "alice/rows", "--rows", "bm25", "--teacher", "column:scores", "--student", tiny_bert]
    words += ["--output_dir", tmp_path / "student", "--use_cpu", "true", "--max_steps", "2", "--report_to", "none"]
    words += ["--per_device_train_batch_size", "8", "--num_negatives", "3", "--baseline", "false"]
    code, errors = hub_client(verb, *words)
    assert code == 0, errors
    manifest = json.loads((tmp_path / "student" / "run_manifest.json").read_text())
    assert manifest["data"]["revision"] == hub.repo("alice/rows", "dataset").at().oid
    assert "datasets:\n- alice/rows" in (tmp_path / "student" / "README.md").read_text()


def test_pushed_later_it_is_the_same(hub, hub_client, mined, micro, tmp_path):
    before = hub.repo("alice/rows", "dataset")
    code, errors = hub_client(verb, "push", mined, "--repo_id", "alice/rows")
    assert code == 0, errors
    assert hub.repo("alice/rows", "dataset").at().oid == before.at().oid, "no change, no commit"
    other = ["mine", "--data", micro, "--model", "bm25", "--mine_depth", "10", "--mine_negatives", "3"]
    code, errors = hub_client(verb, *other, "--push_to", "alice/rows", "--output_dir", tmp_path / "other")
    assert code == 2 and "holds another run" in errors and (tmp_path / "other" / "metadata.json").is_file()
    code, errors = hub_client(verb, "push", tmp_path / "other", "--repo_id", "alice/rows", "--overwrite", "true")
    assert code == 0, errors


def test_a_failing_hub_leaves_the_rows_here(hub, hub_client, micro, tmp_path):
    mine = ["mine", "--data", micro, "--model", "bm25", "--mine_depth", "10", "--mine_negatives", "3"]
    mine += ["--output_dir", tmp_path / "rows", "--push_to", "alice/rows"]
    code, errors = hub_client(verb, *mine, env={"HF_TOKEN": None})
    assert code == 2 and "nothing can be pushed to alice/rows: nobody is logged in" in errors
    assert not (tmp_path / "rows" / "metadata.json").exists(), "said before the work"
    hub.fail("commit", 503, times=float("inf"))
    code, errors = hub_client(verb, *mine)
    assert code == 3 and errors.startswith(
        f"error: {tmp_path / 'rows'} is complete on this machine but was not pushed"
    )
    command = errors.split("Push it later with: ")[1].strip().rstrip(".")
    assert command == f"hf-distill push {tmp_path / 'rows'} --repo_id alice/rows --data {micro}"
    hub.faults.clear()
    assert hub_client(verb, *command.split()[1:])[0] == 0
    assert "train/train.parquet" in hub.repo("alice/rows", "dataset").files()


# ---- the equal rows by themselves ----


def _rows(cases):
    """A row set of (number of positives, number of negatives) each; every document is a number of its own."""
    total = sum(positives + negatives for positives, negatives in cases)
    queries = Queries.from_records([{"query_id": f"q{n}", "text": f"query {n}"} for n in range(len(cases))])
    corpus = Corpus.from_records([{"document_id": f"d{n}", "title": "", "text": f"text {n}"} for n in range(total)])
    bounds = np.cumsum([0, *(positives + negatives for positives, negatives in cases)])
    documents = [np.arange(first, last) for first, last in zip(bounds, bounds[1:])]
    return RowSet.from_arrays(
        queries, corpus, np.arange(len(cases)), documents, [positives for positives, _ in cases],
        scores=[np.float32(places) for places in documents],
    )  # fmt: skip


CASES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 6)).filter(lambda case: sum(case) > 0), min_size=1, max_size=12
)


@settings(max_examples=40, deadline=None)
@given(CASES, st.integers(1, 6))
def test_every_positive_once_with_its_own_negatives(cases, width):
    rows = _rows(cases)
    expected = []
    for row, (positives, negatives) in enumerate(cases):
        documents = rows.documents_at(row).tolist()
        if negatives >= width:
            for one in documents[:positives]:
                expected.append((f"q{row}", [one, *documents[positives : positives + width]]))
    found = [entry for table in equal_rows(rows, width) for entry in table.to_pylist()]
    assert [(entry["query_id"], [int(name[1:]) for name in entry["document_ids"]]) for entry in found] == expected
    assert all(entry["scores"] == [float(name[1:]) for name in entry["document_ids"]] for entry in found)


@settings(max_examples=40, deadline=None)
@given(CASES)
def test_the_width_suits_nine_tenths(cases):
    labelled = [negatives for positives, negatives in cases if positives and negatives]
    if not labelled:
        with pytest.raises(InputError, match="no row has both a positive and a negative"):
            negatives_for_all(_rows(cases))
        return
    width = negatives_for_all(_rows(cases))
    assert sum(count >= width for count in labelled) >= 0.9 * len(labelled)
    assert width == max(labelled) or sum(count >= width + 1 for count in labelled) < 0.95 * len(labelled)


def test_margins():
    rows = _rows([(2, 3), (0, 2), (1, 1)])
    # Scores are the positions: the lowest positives have 0 and 7, their negatives 2, 3, 4 and 8.
    histogram = margin_histogram(rows, "scores")
    assert sum(histogram["counts"]) == 4 and (histogram["edges"][0], histogram["edges"][-1]) == (-4.0, -1.0)
    assert histogram["counts"][0] == histogram["counts"][-1] == 1
    assert margin_histogram(_rows([(0, 2)]), "scores") == {"edges": [], "counts": []}
