"""Batches: chunks, padding, layout, distinct texts, pairs, cached embeddings."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.data import (
    Corpus,
    EpochSampler,
    Queries,
    RetrievalCollator,
    RowSet,
    TrainingRows,
    load_collection,
    token_batch,
)
from hf_distill.data.collators import chunk_cuts
from hf_distill.data.negatives import Example
from hf_distill.errors import InputError
from hf_distill.models.processing import TextProcessor


GOLDEN = Path(__file__).parent / "golden"


def restored(batch, side="right") -> list[list[int]]:
    """The texts' token ids in their own order, read back from the padded chunks."""
    texts = []
    for chunk in batch["chunks"]:
        for ids, mask in zip(chunk["input_ids"].tolist(), chunk["attention_mask"].tolist()):
            length = sum(mask)
            filled = [1] * length
            assert mask == (
                [0] * (len(mask) - length) + filled if side == "left" else filled + [0] * (len(mask) - length)
            )
            texts.append([token for token, real in zip(ids, mask) if real])
    return [texts[place] for place in batch["inverse"].tolist()]


def cells(lengths, cuts) -> int:
    return sum(len(part) * max(part) for part in np.split(np.asarray(lengths), cuts))


def selected(batch, name, kind, index) -> list[list[int]]:
    texts = restored(batch["tokens"][name][kind])
    return [texts[place] for place in batch[index].tolist()]


@given(
    features=st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=12),
    num_chunks=st.integers(1, 15),
    side=st.sampled_from(["left", "right"]),
)
@settings(max_examples=200, deadline=None)
def test_chunks_hold_every_text_once(features, num_chunks, side):
    batch = token_batch(features, 0, side, num_chunks)
    assert len(batch["chunks"]) == min(num_chunks, len(features))
    assert restored(batch, side) == features
    for chunk in batch["chunks"]:
        assert chunk["input_ids"].dtype == chunk["attention_mask"].dtype == torch.int64
        assert chunk["attention_mask"].sum(1).max() == chunk["input_ids"].shape[1]  # its own longest
        assert (chunk["input_ids"][chunk["attention_mask"] == 0] == 0).all()
    widths = [chunk["input_ids"].shape[1] for chunk in batch["chunks"]]
    assert widths == sorted(widths)


@given(features=st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=8), max_size=40), size=st.integers(1, 9))
def test_even_chunks_have_no_more_texts_than_asked_for(features, size):
    batch = token_batch(features, 0, num_chunks=max(1, -(-len(features) // size)), even=True)
    counts = [len(chunk["input_ids"]) for chunk in batch["chunks"]]
    assert max(counts, default=0) <= size and max(counts, default=0) - min(counts, default=0) <= 1
    assert restored(batch) == features


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=9), num_chunks=st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_cuts_have_the_least_padding(lengths, num_chunks):
    lengths = np.sort(np.array(lengths))
    cuts = chunk_cuts(lengths, num_chunks)
    wanted = min(num_chunks, len(lengths))
    assert len(set(cuts)) == len(cuts) == wanted - 1 and cuts == sorted(cuts)
    every = [cells(lengths, list(cut)) for cut in combinations(range(1, len(lengths)), wanted - 1)]
    assert cells(lengths, cuts) == min(every)


def test_no_text_and_no_chunk():
    assert token_batch([], 0)["chunks"] == [] and token_batch([], 0)["inverse"].shape == (0,)
    with pytest.raises(InputError, match="0 is not a number of chunks"):
        token_batch([[1]], 0, num_chunks=0)


@pytest.fixture(scope="module")
def texts():
    queries = Queries.from_records(
        [{"query_id": f"q{i}", "text": t} for i, t in enumerate(["bread", "a rose", "bread"])]
    )
    passages = ["fog in the valley", "salt", "the moon and the sea move", "salt", "a piano in summer"]
    corpus = Corpus.from_records(
        [{"document_id": f"d{i}", "title": "music" if i == 4 else "", "text": t} for i, t in enumerate(passages)]
    )
    return queries, corpus


def example(query, documents, target=0, positives=(), **scores) -> Example:
    scores = {name: np.array(values, np.float32) for name, values in scores.items()}
    return Example(0, query, np.array(documents), target, np.array(positives, np.int64), scores)


EXAMPLES = [
    example(0, [1, 0, 4], 0, [1], scores=[3.0, 2.0, 1.0]),
    example(1, [0, 2, 3], -1, [], scores=[0.5, 0.25, 0.125]),
    example(2, [3, 1, 0], 0, [3, 1], scores=[9.0, 8.0, 7.0]),
]


@pytest.mark.parametrize("deduplicate", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_layout_of_a_batch(texts, tiny_tokenizer, deduplicate, side):
    queries, corpus = texts
    tiny_tokenizer.padding_side = side
    try:
        processor = TextProcessor(tiny_tokenizer, query_prompt="find ", query_length=8, passage_length=6)
        collator = RetrievalCollator(
            queries, corpus, {"student": processor}, deduplicate=deduplicate, num_chunks=2, max_positives=4
        )
        batch = collator(EXAMPLES)
        found = batch["tokens"]["student"]
        counts = {kind: len(found[kind]["inverse"]) for kind in found}
        # "bread" is two queries and "salt" two passages: equal texts are encoded once, whatever their ids.
        assert counts == ({"query": 2, "passage": 4} if deduplicate else {"query": 3, "passage": 9})
        assert all(len(found[kind]["chunks"]) == 2 for kind in found)
        ids = [document for e in EXAMPLES for document in e.documents]
        in_layout = {kind: restored(found[kind], side) for kind in found}
        assert [in_layout["query"][i] for i in batch["query_index"].tolist()] == processor.queries(
            ["bread", "a rose", "bread"]
        )
        assert [in_layout["passage"][i] for i in batch["passage_index"].tolist()] == processor.passages(
            corpus.texts(ids)
        )
        assert batch["target"].tolist() == [0, -1, 0]
        assert batch["query_ids"].tolist() == [0, 1, 2]
        assert batch["passage_ids"].tolist() == [[1, 0, 4], [0, 2, 3], [3, 1, 0]]
        assert batch["positive_ids"].tolist() == [[1, -1, -1, -1], [-1] * 4, [3, 1, -1, -1]]
        assert batch["teacher_scores"]["scores"].tolist() == [[3, 2, 1], [0.5, 0.25, 0.125], [9, 8, 7]]
        assert batch["teacher_scores"]["scores"].dtype == torch.float32
        for name in ("query_index", "passage_index", "target", "query_ids", "passage_ids", "positive_ids"):
            assert batch[name].dtype == torch.int64
        assert "embeddings" not in batch
    finally:
        tiny_tokenizer.padding_side = "right"


def test_every_model_reads_in_its_own_way(texts, tiny_tokenizer):
    queries, corpus = texts
    plain = TextProcessor(tiny_tokenizer, template="{text}", passage_length=5)
    titled = TextProcessor(tiny_tokenizer, template="{title}: {text}", passage_prompt="passage ")
    batch = RetrievalCollator(queries, corpus, {"student": plain, "teacher": titled})(EXAMPLES)
    ids = [document for e in EXAMPLES for document in e.documents]
    for name, processor in (("student", plain), ("teacher", titled)):
        expected = processor.passages(corpus.texts(ids, template=processor.template))
        assert selected(batch, name, "passage", "passage_index") == expected


def test_titles_keep_equal_texts_apart(tiny_tokenizer):
    """Two documents that one template makes equal and another does not are two texts."""
    queries = Queries.from_records([{"query_id": "q", "text": "salt"}])
    corpus = Corpus.from_records(
        [{"document_id": title, "title": title, "text": "the same"} for title in ("bread", "sea")]
    )
    both = {
        "student": TextProcessor(tiny_tokenizer, template="{text}"),
        "teacher": TextProcessor(tiny_tokenizer, template="{title} {text}"),
    }
    batch = RetrievalCollator(queries, corpus, both)([example(0, [0, 1])])
    expected = both["teacher"].passages(["bread the same", "sea the same"])
    assert selected(batch, "teacher", "passage", "passage_index") == expected


def test_pairs_are_what_the_tokenizer_makes(texts, tiny_tokenizer):
    queries, corpus = texts
    processor = TextProcessor(tiny_tokenizer, kind="cross", passage_length=7)
    batch = RetrievalCollator(queries, corpus, {"ranker": processor}, num_chunks=3)(EXAMPLES)
    pair = batch["tokens"]["ranker"]["pair"]
    assert batch["tokens"]["ranker"].keys() == {"pair"} and len(pair["chunks"]) == 3
    left = queries.texts([e.query for e in EXAMPLES for _ in range(3)])
    right = corpus.texts([document for e in EXAMPLES for document in e.documents])
    expected = tiny_tokenizer(left, right, truncation="longest_first", max_length=7)
    assert restored(pair) == expected["input_ids"]
    segments = [row for chunk in pair["chunks"] for row in chunk["token_type_ids"].tolist()]
    lengths = [len(ids) for ids in expected["input_ids"]]
    ordered = [segments[place] for place in pair["inverse"].tolist()]
    assert [row[:length] for row, length in zip(ordered, lengths)] == expected["token_type_ids"]


def test_pairs_of_led_and_lexmae():
    """The released builder puts tokenised queries and passages together; a rendered pair has the same ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = {"[PAD]": 0, "[CLS]": 101, "[SEP]": 102, "[UNK]": 1} | {f"w{number}": number for number in range(7, 40)}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 102), ("[CLS]", 101))
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, model_input_names=["input_ids", "token_type_ids", "attention_mask"]
    )
    with np.load(GOLDEN / "led_xenc_inputs.npz") as case:
        word = {number: name for name, number in names.items()}

        def text_of(ids, mask):
            """Without the first and the last token; the separator between title and text stays, as in a template."""
            return " ".join(word[token] for token in ids[mask.astype(bool)][1:-1])

        queries, passages = (
            [text_of(ids, mask) for ids, mask in zip(case[f"{side}_ids"], case[f"{side}_mask"])]
            for side in ("query", "doc")
        )
        assert passages == ["w20 [SEP] w30 w31", "w21 [SEP] w32"]
        processor = TextProcessor(fast, kind="cross", passage_length=160)
        batch = processor.pad(*processor.pairs(queries, passages))
        for ours, theirs in (("input_ids", "ids"), ("attention_mask", "mask"), ("token_type_ids", "type_ids")):
            np.testing.assert_array_equal(batch[ours], case[theirs], err_msg=ours)


class FakeStore:
    """Ten-dimensional vectors that begin with the position."""

    def take(self, positions):
        return np.repeat(np.asarray(positions, np.float16)[:, None], 10, axis=1)


def test_cached_embeddings_follow_the_distinct_texts(texts, tiny_tokenizer):
    queries, corpus = texts
    processor = TextProcessor(tiny_tokenizer)
    for deduplicate in (True, False):
        collator = RetrievalCollator(
            queries,
            corpus,
            {"student": processor},
            deduplicate=deduplicate,
            stores={"big": (FakeStore(), FakeStore())},
        )
        batch = collator(EXAMPLES)
        vectors = batch["embeddings"]["big"]
        assert vectors["query"].dtype == torch.float32
        found = vectors["passage"][batch["passage_index"]][:, 0].long().tolist()
        assert corpus.texts(found) == corpus.texts(batch["passage_ids"].reshape(-1).tolist())
        found = vectors["query"][batch["query_index"]][:, 0].long().tolist()
        assert queries.texts(found) == queries.texts(batch["query_ids"].tolist())


def test_positives_beyond_the_cap_are_not_dropped_in_silence(texts, tiny_tokenizer):
    queries, corpus = texts
    encoders = {"student": TextProcessor(tiny_tokenizer)}
    with pytest.raises(InputError, match="max_positives 1: a query of the batch has 2 known positives"):
        RetrievalCollator(queries, corpus, encoders, max_positives=1)(EXAMPLES)
    assert RetrievalCollator(queries, corpus, encoders)(EXAMPLES)["positive_ids"].shape == (3, 2)


def test_equal_outputs_whether_texts_are_shared_or_chunked(tiny_bert, tiny_tokenizer, micro):
    """What the layout is for: the same scores from distinct texts in chunks as from every text on its own."""
    from transformers import AutoModel

    collection = load_collection(micro)
    model = AutoModel.from_pretrained(tiny_bert).eval()
    rows = _micro_rows(collection)
    examples = [TrainingRows(rows, num_negatives=3)[row, 0] for row in range(8)]
    processor = TextProcessor(tiny_tokenizer, passage_length=64)
    found = []
    for options in ({"num_chunks": 3}, {"deduplicate": False}):
        batch = RetrievalCollator(collection.queries, collection.corpus, {"student": processor}, **options)(examples)
        passage = batch["tokens"]["student"]["passage"]
        with torch.no_grad():
            vectors = torch.cat([model(**chunk).last_hidden_state[:, 0] for chunk in passage["chunks"]])
        found.append(vectors[passage["inverse"]][batch["passage_index"]])
    assert found[0].shape == (32, 32)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def _micro_rows(collection) -> RowSet:
    """Rows with the qrels' positives and twelve other passages of the corpus."""
    index = collection.qrels["train"].positives()
    queries = collection.qrels["train"].query_positions()
    rng = np.random.default_rng(0)
    documents, counts = [], []
    for query in queries:
        positives = index.of(int(query))
        others = np.setdiff1d(rng.permutation(len(collection.corpus))[:14], positives)[:12]
        documents.append(np.concatenate([positives, others]))
        counts.append(len(positives))
    return RowSet.from_arrays(collection.queries, collection.corpus, queries, documents, counts)


def test_workers_give_the_same_batches(tiny_tokenizer, micro):
    collection = load_collection(micro)
    rows = _micro_rows(collection)
    dataset = TrainingRows(rows, num_negatives=3, positives=collection.qrels["train"].positives(), seed=2)
    collator = RetrievalCollator(
        collection.queries,
        collection.corpus,
        {"student": TextProcessor(tiny_tokenizer), "ranker": TextProcessor(tiny_tokenizer, kind="cross")},
        num_chunks=2,
        max_positives=dataset.max_positives,
    )

    def batches(workers):
        context = {"multiprocessing_context": "spawn"} if workers else {}
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=6,
            sampler=EpochSampler(len(dataset), seed=2),
            collate_fn=collator,
            num_workers=workers,
            drop_last=True,
            **context,
        )
        return list(loader)

    alone, with_workers = batches(0), batches(2)
    assert len(alone) == len(with_workers) == 6
    for left, right in zip(alone, with_workers):
        assert_equal(left, right)
        assert left["positive_ids"].shape == (6, dataset.max_positives)
        assert (left["passage_ids"][:, :1] == left["positive_ids"]).any(1).all()


def assert_equal(left, right):
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for a, b in zip(left, right):
            assert_equal(a, b)
    else:
        assert torch.equal(left, right)
