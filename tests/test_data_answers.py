"""Answers in passages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_distill.data.answers import AnswerMatcher, answer_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Paris, Texas (1984)", ["paris", ",", "texas", "(", "1984", ")"]),
        ("naïve Ærø", ["nai\u0308ve", "ærø"]),
        ("U.S.\tcost: $5\u200b", ["u", ".", "s", ".", "cost", ":", "$", "5"]),
        ("", []),
    ],
)
def test_tokens(text, tokens):
    assert answer_tokens(text) == tokens


@pytest.mark.parametrize(
    ("answers", "text", "found"),
    [
        (["Paris"], "the film Paris, Texas", True),
        (["paris texas"], "the film Paris, Texas", False),  # the comma stands between
        (["art"], "a party", False),
        (["the U.S."], "in The U.S. today", True),
        (["Ünal", "unknown"], "Mr. U\u0308nal", True),
        (["", "  "], "anything", False),
        ([], "anything", False),
    ],
)
def test_matches(answers, text, found):
    assert AnswerMatcher(answers)(text) is found


@given(
    st.lists(st.sampled_from(["a", "b", "c", ".", "é"]), max_size=8), st.lists(st.sampled_from(["a", "b", ".", "é"]))
)
def test_equals_a_search_by_tokens(text, answer):
    tokens, wanted = answer_tokens(" ".join(text)), answer_tokens(" ".join(answer))
    windows = [tokens[i : i + len(wanted)] for i in range(len(tokens) - len(wanted) + 1)]
    assert AnswerMatcher([" ".join(answer)])(" ".join(text)) is (bool(wanted) and wanted in windows)
