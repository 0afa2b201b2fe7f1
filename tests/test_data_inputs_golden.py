"""What PROD's own loader makes of its samples, and the ranking that ANCE-Tele's own search writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hf_distill.data import Corpus, Queries, RetrievalCollator, RowSet, Run, TrainingRows
from hf_distill.models.processing import TextProcessor

from .model_zoo import tokenizer_of_words


GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "prod_inputs.npz") as case:
        return {name: case[name] for name in case.files}


@pytest.fixture(scope="module")
def tokenizer(golden):
    return tokenizer_of_words(golden["vocab"].tolist())


@pytest.fixture(scope="module")
def rows(golden):
    passages = [line.split("\t") for line in golden["passages"].tolist()]
    # The title of the second passage is unknown there: a minus sign, which is no word of the vocabulary.
    titles = ["missing" if place == 1 else title for place, (_, _, title) in enumerate(passages)]
    corpus = Corpus.from_records(
        [{"document_id": one, "title": title, "text": text} for (one, text, _), title in zip(passages, titles)]
    )
    samples = json.loads(str(golden["samples"]))
    queries = Queries.from_records([{"query_id": one["query_id"], "text": one["query_string"]} for one in samples])
    documents = [[int(place) for place in one["pos_id"] + one["neg_id"]] for one in samples]
    counts = [len(one["pos_id"]) for one in samples]
    return RowSet.from_arrays(queries, corpus, np.arange(len(samples)), documents, counts)


@pytest.fixture(scope="module")
def examples(golden, rows):
    """The first positive and the first negatives in their order; a list that is too short is repeated."""
    training = TrainingRows(rows, num_negatives=int(golden["num_neg"]), sampling="hardest")
    return [training[row, 0] for row in range(len(rows))]


def filled(features, width):
    ids = np.zeros((len(features), width), np.int64)
    for line, one in enumerate(features):
        ids[line, : len(one)] = one
    return ids


def test_texts_of_a_batch(golden, tokenizer, rows, examples):
    lengths = {"query_length": int(golden["max_query_length"]), "passage_length": int(golden["max_doc_length"])}
    processor = TextProcessor(tokenizer, template="{title}[SEP]{text}", **lengths)
    batch = RetrievalCollator(rows.queries, rows.corpus, {"student": processor}, deduplicate=False)(examples)
    for side, name in (("query", "q"), ("passage", "d")):
        tokens = batch["tokens"]["student"][side]
        texts = [
            ids[mask > 0].tolist()
            for chunk in tokens["chunks"]
            for ids, mask in zip(chunk["input_ids"].numpy(), chunk["attention_mask"].numpy())
        ]
        texts = [texts[place] for place in tokens["inverse"].tolist()]
        width = golden[f"{name}_ids"].shape[1]
        np.testing.assert_array_equal(filled(texts, width), golden[f"{name}_ids"])
        np.testing.assert_array_equal(filled([[1] * len(one) for one in texts], width), golden[f"{name}_mask"])
    per_query = len(examples[0].documents)
    assert (np.arange(len(examples)) * per_query).tolist() == golden["positive_idx"].tolist()
    assert batch["target"].tolist() == golden["ce_target"].argmax(1).tolist()


def test_pairs_end_with_a_separator_of_ours(golden, tokenizer, rows, examples):
    """Theirs cuts query and passage apart and leaves out the last [SEP]; what is not cut is otherwise the same."""
    processor = TextProcessor(tokenizer, kind="cross", passage_length=64, template="{title}[SEP]{text}")
    separator, compared = tokenizer.sep_token_id, 0
    for example, theirs in zip(examples, golden["ce_ids"]):
        texts = rows.corpus.texts(example.documents, processor.template)
        query = rows.queries.texts([example.query])[0]
        for text, expected in zip(texts, theirs):
            ((ids,), _) = processor.pairs([query], [text])
            whole = len(query.split()) + 2 <= golden["max_query_length"]
            if whole and len(text.replace("[SEP]", " [SEP] ").split()) + 2 <= golden["max_doc_length"]:
                assert ids == [*expected[expected > 0].tolist(), separator]
                compared += 1
    assert compared == 1


def test_the_ranking_of_the_original_search(tmp_path):
    """Read as it was written, saved and read again: the same passages in the same order for every query."""
    ranking = json.loads((GOLDEN / "tele_search_ranking.json").read_text())["single_search_ranking"]
    names = list(dict.fromkeys(query for query, _, _ in ranking))
    queries = Queries.from_records([{"query_id": name, "text": name} for name in names])
    corpus = Corpus.from_records([{"document_id": f"d{number}", "text": f"text {number}"} for number in range(40)])
    lines = [f"{query} Q0 {passage} {place % 10 + 1} {score} run\n" for place, (query, passage, score) in
             enumerate(ranking)]  # fmt: skip
    (tmp_path / "run.trec").write_text("".join(lines))
    run = Run.load_trec(tmp_path / "run.trec", queries, corpus)
    for name, documents, scores in zip(queries.ids_at(run.query), run.documents, run.scores):
        theirs = [(passage, float(score)) for query, passage, score in ranking if query == name]
        assert corpus.ids_at(documents) == [passage for passage, _ in theirs]
        np.testing.assert_allclose(scores, [score for _, score in theirs], rtol=1e-6)
        assert (np.diff(scores) <= 0).all() and len(theirs) == 10
