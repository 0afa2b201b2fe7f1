"""Ranked results, and the TREC files of results and judgements."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..files import atomic_path, file_fingerprint
from ..provenance import note_source
from .lines import read_lines
from .qrels import Qrels
from .tables import Corpus, Queries, TextTable


_LINES_AT_ONCE = 2**17


class Run:
    """The best documents of each query.

    Args:
        query: `int64[n]`, positions in the queries, each once.
        documents: `int64[n, k]`, positions in the corpus, best first; -1 where there are fewer than k.
        scores: `float32[n, k]`, descending; -inf where there is no document.
    """

    def __init__(self, query: Sequence[int], documents: np.ndarray, scores: np.ndarray):
        self.query = np.asarray(query, dtype=np.int64)
        self.documents = np.asarray(documents, dtype=np.int64)
        self.scores = np.asarray(scores, dtype=np.float32)
        if (
            self.documents.ndim != 2
            or self.documents.shape != self.scores.shape
            or len(self.query) != len(self.scores)
        ):
            raise ValueError(
                f"shapes do not fit: query {self.query.shape}, documents {self.documents.shape}, "
                f"scores {self.scores.shape}"
            )

    def __len__(self) -> int:
        return len(self.query)

    def __repr__(self) -> str:
        return f"Run({len(self)} queries, at most {self.documents.shape[1]} documents each)"

    def sorted(self, corpus: Corpus) -> Run:
        """The same results by descending score and, where scores are equal, descending document id (as trec_eval)."""
        rank = self._order_of_ids(corpus)
        documents, scores = np.empty_like(self.documents), np.empty_like(self.scores)
        for block in self._blocks():
            found = self.documents[block]
            values = np.where(found < 0, np.float32(-np.inf), self.scores[block])
            order = np.lexsort((-rank[found], -values), axis=1)
            documents[block] = np.take_along_axis(found, order, 1)
            scores[block] = np.take_along_axis(values, order, 1)
        return Run(self.query, documents, scores)

    def _order_of_ids(self, corpus: Corpus) -> np.ndarray:
        """`int64[documents + 1]`: the place of every document of the run among their ids; -1 for none (at the end)."""
        seen = np.zeros(len(corpus) + 1, dtype=bool)
        for block in self._blocks():
            seen[self.documents[block]] = True
        present = np.flatnonzero(seen[:-1])
        # Python compares strings by code point, which is the order of their UTF-8 bytes that trec_eval's strcmp uses.
        by_id = sorted(zip(corpus.ids_at(present), present.tolist()))
        rank = np.full(len(seen), -1, dtype=np.int64)
        rank[[document for _, document in by_id]] = np.arange(len(by_id))
        return rank

    def _blocks(self) -> Iterator[slice]:
        """Some queries at a time: what is computed of them takes little beside the results themselves."""
        step = max(1, _LINES_AT_ONCE // max(1, self.documents.shape[1]))
        for start in range(0, len(self), step):
            yield slice(start, start + step)

    def cut(self, k: int) -> Run:
        """The best `k` documents of each query."""
        return Run(self.query, self.documents[:, :k], self.scores[:, :k])

    def as_dict(self, queries: Queries, corpus: Corpus) -> dict[str, dict[str, float]]:
        """`{query id: {document id: score}}`, the form of pytrec_eval; queries without any document are left out."""
        result: dict[str, dict[str, float]] = {}
        for query, documents, scores in self._with_ids(queries, corpus):
            if documents:
                result[query] = dict(zip(documents, scores))
        return result

    def save(self, stem: str | os.PathLike, queries: Queries, corpus: Corpus, tag: str = "hf_distill") -> Path:
        """Writes `<stem>.trec` (or `<folder>/<tag>.trec` for an existing folder), one line for each document.

        A line is `query Q0 document rank score tag`, ranks from 1; fields are separated by a blank, or by a tab in a
        run where an identifier has a blank in it. Scores have nine digits and so read back to the same float32.
        """
        stem = Path(stem)
        target = stem / f"{tag}.trec" if stem.is_dir() else stem.with_name(stem.name.removesuffix(".trec") + ".trec")
        ordered = self.sorted(corpus)
        used = np.unique(self.documents)
        gap = _separator(queries.ids_at(self.query), corpus.ids_at(used[used >= 0]))
        tag = re.sub(r"\s+", "_", tag) or "run"
        with atomic_path(target) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for query, documents, scores in ordered._with_ids(queries, corpus):
                file.writelines(
                    gap.join((query, "Q0", document, str(rank), f"{score:.9g}", tag)) + "\n"
                    for rank, (document, score) in enumerate(zip(documents, scores), start=1)
                )
        return target

    @classmethod
    def load_trec(cls, path: str | os.PathLike, queries: Queries, corpus: Corpus) -> Run:
        """Reads a TREC run; ranks in the file are ignored, results are sorted as in `sorted`.

        Raises:
            InputError: A line without six fields, an unknown identifier, a score that is no finite number, a document
                that is listed twice for a query; the message names line and field.
        """
        note_source("file", path, lambda: {"fingerprint": file_fingerprint(path)})
        lines, query, document, score = [], [], [], []
        for numbers, fields in _trec_blocks(path, 6, "query Q0 document rank score tag"):
            lines.append(np.array(numbers, dtype=np.int64))
            query.append(_known(queries, fields[0], numbers, path, "query"))
            document.append(_known(corpus, fields[2], numbers, path, "document"))
            score.append(_floats(fields[4], numbers, path))
        if not lines:
            raise InputError("no results in it", where=str(path), cure="A run has at least one line")
        lines, query, document, score = map(np.concatenate, (lines, query, document, score))
        first, second = mark_doubled(query, document)
        if first.size:
            raise InputError(
                f"document {corpus.ids_at(document[first[:1]])[0]!r} is listed twice for query "
                f"{queries.ids_at(query[first[:1]])[0]!r}, also in line {lines[first[0]]}",
                where=f"{path}, line {lines[second[0]]}, field 'document'",
                cure="Keep one of the two lines",
            )
        order = np.argsort(query, kind="stable")
        unique, starts, counts = np.unique(query[order], return_index=True, return_counts=True)
        row = np.repeat(np.arange(len(unique)), counts)
        column = np.arange(len(order)) - np.repeat(starts, counts)
        documents = np.full((len(unique), int(counts.max())), -1, dtype=np.int64)
        scores = np.full(documents.shape, -np.inf, dtype=np.float32)
        documents[row, column], scores[row, column] = document[order], score[order]
        return cls(unique, documents, scores).sorted(corpus)

    def _with_ids(self, queries: Queries, corpus: Corpus) -> Iterator[tuple[str, list[str], list[float]]]:
        for block in self._blocks():
            documents, scores = self.documents[block], self.scores[block]
            present = documents >= 0
            ids = corpus.ids_at(documents[present])
            values = scores[present].tolist()
            end = np.cumsum(present.sum(axis=1)).tolist()
            for number, query in enumerate(queries.ids_at(self.query[block])):
                begin = end[number - 1] if number else 0
                yield query, ids[begin : end[number]], values[begin : end[number]]


load_trec = Run.load_trec


def load_trec_qrels(path: str | os.PathLike, queries: Queries, corpus: Corpus) -> Qrels:
    """Reads TREC judgements (`query 0 document grade`).

    Raises:
        InputError: A line without four fields, an unknown identifier, a grade that is no whole number, two grades for
            one document; the message names line and field.
    """
    lines, query, document, grade = [], [], [], []
    for numbers, fields in _trec_blocks(path, 4, "query 0 document grade"):
        lines.append(np.array(numbers, dtype=np.int64))
        query.append(_known(queries, fields[0], numbers, path, "query"))
        document.append(_known(corpus, fields[2], numbers, path, "document"))
        grade.append(_integers(fields[3], numbers, path))
    if not lines:
        raise InputError("no judgements in it", where=str(path), cure="Judgements have at least one line")
    lines, query, document, grade = map(np.concatenate, (lines, query, document, grade))
    first, second = mark_doubled(query, document)
    differing = grade[first] != grade[second]
    if differing.any():
        first, second = first[differing][0], second[differing][0]
        raise InputError(
            f"grade {grade[second]} for a document that has grade {grade[first]} in line {lines[first]}",
            where=f"{path}, line {lines[second]}, field 'grade'",
            cure="Keep one of the two lines",
        )
    keep = np.ones(len(query), dtype=bool)
    keep[second] = False
    return Qrels(query[keep], document[keep], grade[keep])


def write_trec_qrels(path: str | os.PathLike, qrels: Qrels, queries: Queries, corpus: Corpus) -> Path:
    """Writes TREC judgements, one line `query 0 document grade` for each."""
    path = Path(path)
    query_ids, document_ids = queries.ids_at(qrels.query), corpus.ids_at(qrels.document)
    gap = _separator(query_ids, document_ids)
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for query, document, grade in zip(query_ids, document_ids, qrels.relevance.tolist()):
            file.write(gap.join((query, "0", document, str(grade))) + "\n")
    return path


def _separator(*groups: list[str]) -> str:
    # bytes.split splits at the blanks that C's isspace knows, as the standard tools do
    return "\t" if any(" " in identifier for group in groups for identifier in group) else " "


def _trec_blocks(path: str | os.PathLike, count: int, form: str) -> Iterator[tuple[list[int], list[tuple[str, ...]]]]:
    """Line numbers and the columns of `count` fields, for a bounded number of lines at a time."""
    lines = read_lines(path)
    while block := list(islice(lines, _LINES_AT_ONCE)):
        rows = []
        for number, line in block:
            fields = line.split("\t")
            if len(fields) != count:
                fields = re.split(r"[ \t\v\f]+", line.strip(" \t\v\f"))
            if len(fields) != count:
                raise InputError(
                    f"{len(fields)} fields where {count} are expected: {line[:80]!r}",
                    where=f"{path}, line {number}",
                    cure=f"A line is: {form}",
                )
            rows.append(fields)
        yield [number for number, _ in block], list(zip(*rows))


def _known(table: TextTable, ids: Sequence[str], numbers: list[int], path, field: str) -> np.ndarray:
    positions = table.positions(ids)
    if (positions < 0).any():
        index = int(np.argmax(positions < 0))
        raise InputError(
            f"unknown {field} {ids[index]!r}, not among the {len(table)} {table.noun} of {table.where}",
            where=f"{path}, line {numbers[index]}, field {field!r}",
            cure="Use the file made for this collection, or remove the line",
        )
    return positions


def _floats(values: Sequence[str], numbers: list[int], path) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is said as that
        try:
            result = np.array(values, dtype=np.float64).astype(np.float32)
            if np.isfinite(result).all():
                return result
        except ValueError:
            pass
        for number, value in zip(numbers, values):
            try:
                good = np.isfinite(np.float32(float(value)))
            except ValueError:
                good = False
            if not good:
                raise InputError(
                    f"{value!r} is not a finite number of float32",
                    where=f"{path}, line {number}, field 'score'",
                    cure="Mend the score",
                )
    raise AssertionError("unreachable: every value was read")


def _integers(values: Sequence[str], numbers: list[int], path) -> np.ndarray:
    result = np.empty(len(values), dtype=np.int64)
    for index, value in enumerate(values):
        try:
            result[index] = int(value)
        except (ValueError, OverflowError):
            raise InputError(
                f"{value!r} is not a whole number",
                where=f"{path}, line {numbers[index]}, field 'grade'",
                cure="Use whole numbers: 0 for not relevant, 1 and more for relevant",
            ) from None
    return result


def mark_doubled(query: np.ndarray, document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of pairs that occur again: the first of them, and each later one."""
    order = np.lexsort((np.arange(len(query)), document, query))
    same = (query[order][1:] == query[order][:-1]) & (document[order][1:] == document[order][:-1])
    return order[:-1][same], order[1:][same]
