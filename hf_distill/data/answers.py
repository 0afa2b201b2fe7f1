"""Answer strings in passages, for questions whose judgements are answers rather than passages."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=1)
def _pattern():
    import regex

    # Runs of letters, digits and marks, or single characters that are seen.
    return regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]", regex.UNICODE)


def answer_tokens(text: str) -> list[str]:
    """The words by which answers are matched: decomposed (NFD), runs of letters, digits and marks, or single visible
    symbols, in lower case. The rule of DPR (Karpukhin et al. 2020, https://arxiv.org/abs/2004.04906)."""
    return [token.lower() for token in _pattern().findall(unicodedata.normalize("NFD", text))]


class AnswerMatcher:
    """Whether a passage holds one of a question's answers.

    Args:
        answers: The answers, each any of several wordings.
    """

    def __init__(self, answers: Sequence[str]):
        # An answer as a string of whole words: found by the search of the language, in C.
        self._needles = [needle for needle in (_joined(answer) for answer in answers) if needle.strip("\0")]

    def __call__(self, text: str) -> bool:
        """True if the words of an answer stand one after the other in `text`."""
        if not self._needles:
            return False
        haystack = _joined(text)
        return any(needle in haystack for needle in self._needles)


def _joined(text: str) -> str:
    # No word holds a NUL, a control character.
    return "\0" + "\0".join(answer_tokens(text)) + "\0"
