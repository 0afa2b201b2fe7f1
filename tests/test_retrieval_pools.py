"""Negative pools put together."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.data import Corpus, Queries, RowSet
from hf_distill.errors import InputError
from hf_distill.retrieval.pools import concatenate_pools


QUERIES = Queries.from_records([{"query_id": f"q{i}", "text": f"query {i}"} for i in range(12)])
CORPUS = Corpus.from_records([{"document_id": f"d{i}", "text": f"passage {i}"} for i in range(40)])


def pool(query, documents, num_positives, source, **columns):
    sources = [["positive"] * p + [source] * (len(row) - p) for row, p in zip(documents, num_positives)]
    return RowSet.from_arrays(QUERIES, CORPUS, query, documents, num_positives, sources=sources, **columns)


def as_lists(rows):
    return {
        int(rows.query[row]): (
            rows.documents_at(row)[: rows.num_positives[row]].tolist(),
            rows.documents_at(row)[rows.num_positives[row] :].tolist(),
        )
        for row in range(len(rows))
    }


def test_the_released_merges(tmp_path):
    """Every merge of three episodes, as the original code made it."""
    golden = json.loads((Path(__file__).parent / "golden" / "tele_combine_marco.json").read_text())
    folders = golden["folders"]
    texts = sorted(
        {text[0] for rows in folders.values() for row in rows for text in row["positives"] + row["negatives"]}
    )
    keys = sorted({tuple(row["query"]) for rows in folders.values() for row in rows})
    queries = Queries.from_records([{"query_id": str(key), "text": str(key)} for key in keys])
    corpus = Corpus.from_records([{"document_id": str(text), "text": f"passage {text}"} for text in texts])

    def rows_of(name, source):
        rows = folders[name]
        documents, sources = [], []
        for row in rows:
            negatives = [texts.index(text[0]) for text in row["negatives"]]
            documents.append([texts.index(text[0]) for text in row["positives"]] + negatives)
            # A passage twice in one folder came from two searches.
            again = [f"{source}{negatives[:i].count(one)}" for i, one in enumerate(negatives)]
            sources.append(["positive"] * len(row["positives"]) + again)
        return RowSet.from_arrays(
            queries,
            corpus,
            [keys.index(tuple(row["query"])) for row in rows],
            documents,
            [len(row["positives"]) for row in rows],
            sources=sources,
        )

    merges = {"tele1": ("ann1", "la1")}
    for episode in (2, 3):
        merges[f"annla{episode}"] = (f"ann{episode}", f"la{episode}")
        merges[f"tele{episode}"] = (f"tele{episode - 1}", f"annla{episode}")
    for built, (base, added) in merges.items():
        merged = concatenate_pools([rows_of(base, "base"), rows_of(added, "added")], cache_dir=tmp_path)
        assert as_lists(merged) == as_lists(rows_of(built, "any")), built


def test_queries_and_positives_are_those_of_the_first(tmp_path):
    old = pool([4, 1], [[0, 9, 8], [1, 7]], [1, 1], "a@1", scores=[[3.0, 2.0, 1.0], [2.0, 1.0]])
    new = pool([1, 5], [[1, 2, 7, 6], [3, 4]], [2, 1], "a@2")
    rows = concatenate_pools([old, new], cache_dir=tmp_path)
    assert as_lists(rows) == {4: ([0], [9, 8]), 1: ([1], [7, 7, 6])}
    assert rows.values_at("sources", 1).tolist() == ["positive", "a@1", "a@2", "a@2"]
    assert rows.columns == ["sources"]
    assert as_lists(concatenate_pools([old, new], duplicates=False, cache_dir=tmp_path))[1] == ([1], [7, 6])


def test_a_positive_of_the_first_is_no_negative(tmp_path):
    old, new = pool([0], [[5, 6]], [1], "a"), pool([0], [[6, 5, 7]], [1], "b")
    assert as_lists(concatenate_pools([old, new], cache_dir=tmp_path)) == {0: ([5], [6, 7])}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_equals_plain_lists(tmp_path_factory, seed, duplicates):
    rng = np.random.default_rng(seed)
    pools = []
    for name in "abc"[: rng.integers(1, 4)]:
        query = rng.permutation(12)[: rng.integers(1, 12)]
        documents = [rng.permutation(15)[: rng.integers(2, 8)] for _ in query]
        pools.append(pool(query, documents, rng.integers(0, 2, len(query)), name))
    found = as_lists(concatenate_pools(pools, duplicates=duplicates, cache_dir=tmp_path_factory.mktemp("pools")))
    lists = [as_lists(one) for one in pools]
    expected = {}
    for query, (positives, negatives) in lists[0].items():
        more = [one for other in lists[1:] for one in other.get(query, ([], []))[1] if one not in positives]
        merged = negatives + more
        expected[query] = (positives, merged if duplicates else list(dict.fromkeys(merged)))
    assert found == expected


def test_bad_pools(tmp_path):
    one = pool([0], [[5, 6]], [1], "a")
    with pytest.raises(InputError, match="row set 2.*where its negatives"):
        concatenate_pools([one, RowSet.from_arrays(QUERIES, CORPUS, [0], [[5, 6]], [1])])
    other = Corpus.from_records([{"document_id": f"d{i}", "text": "another text"} for i in range(40)])
    foreign = RowSet.from_arrays(QUERIES, other, [0], [[5, 6]], [1], sources=[["positive", "a"]])
    with pytest.raises(InputError, match="row set 2.*corpus"):
        concatenate_pools([one, foreign])
