"""The exceptions that are meant for people: bad input, and a Hub that does not take a result."""

from __future__ import annotations


class InputError(ValueError):
    """Input that a person has to mend, said in one sentence that names the place, the problem and the cure.

    Args:
        problem: What is wrong, with the offending value.
        where: The file, row, field or option, for example `"corpus.jsonl.gz, line 17, field '_id'"`.
        cure: What to do about it.
    """

    def __init__(self, problem: str, *, where: str | None = None, cure: str | None = None):
        self.problem, self.where, self.cure = problem, where, cure
        sentence = problem if where is None else f"{where}: {problem}"
        sentence = sentence.rstrip(".") + "."
        super().__init__(sentence if cure is None else f"{sentence} {cure.rstrip('.')}.")


class HubError(RuntimeError):
    """The Hub did not take or give something although the input is right; one sentence, and what to do later.

    Args:
        problem: What failed, and why.
        cure: What to do about it.
    """

    def __init__(self, problem: str, cure: str):
        self.problem, self.cure = problem, cure
        super().__init__(f"{problem.rstrip('.')}. {cure.rstrip('.')}.")
