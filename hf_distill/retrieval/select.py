"""Data progression: the queries on which the teacher is right and the student nearly so (PROD, Lin et al. 2023)."""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..console import get_logger
from ..data import schema
from ..data.answers import AnswerMatcher
from ..data.lists import list_offsets
from ..data.rows import RowSet
from ..errors import InputError


if TYPE_CHECKING:
    from collections.abc import Iterator

logger = get_logger(__name__)

# PROD on MS MARCO; with answers as the positives, its rule on NQ is `teacher < student and teacher <= 15`.
PROD_RULE = "2 <= student <= 15 and teacher == 1"
_ALMOST_NONE = 0.01
# Counted one by one in the report; PROD's rule ends at 15.
_SINGLE_RANKS = 15
_COMPARE = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}  # fmt: skip
_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


class RankRule:
    """A condition on ranks, such as `"2 <= student <= 15 and teacher == 1"`.

    Comparisons of names and numbers, sums, differences and products, joined by `and`, `or` and `not`.

    Args:
        text: The condition.
        names: What it may speak of.

    Raises:
        InputError: For anything else.
    """

    def __init__(self, text: str, names: Sequence[str]):
        self.text, self.names = text, tuple(names)
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
            self({name: np.ones(1) for name in names})
        except SyntaxError as error:
            raise self._refused(error.msg) from error

    def _refused(self, problem: str) -> InputError:
        cure = f"Compare {', '.join(self.names)} with numbers, as in {PROD_RULE!r}"
        return InputError(f"{self.text!r} is no condition on ranks ({problem})", where="select", cure=cure)

    def __call__(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """Whether it holds: bool[n] for float[n] of every name."""
        result = self._value(self._tree, values)
        if result.dtype != bool:
            raise self._refused("it compares nothing")
        return result

    def _value(self, node: ast.expr, values: Mapping[str, np.ndarray]) -> Any:
        if isinstance(node, ast.BoolOp):
            parts = [self._truth(one, values) for one in node.values]
            return np.logical_and.reduce(parts) if isinstance(node.op, ast.And) else np.logical_or.reduce(parts)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self._truth(node.operand, values)
        if isinstance(node, ast.Compare) and all(type(one) in _COMPARE for one in node.ops):
            sides = [self._value(one, values) for one in (node.left, *node.comparators)]
            tests = [_COMPARE[type(one)](*pair) for one, pair in zip(node.ops, zip(sides, sides[1:]))]
            return np.logical_and.reduce([np.asarray(test) for test in tests])
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            return _ARITHMETIC[type(node.op)](self._value(node.left, values), self._value(node.right, values))
        if isinstance(node, ast.Name) and node.id in self.names:
            return values[node.id]
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return np.asarray(float(node.value))
        raise self._refused(f"{ast.unparse(node)!r} is not understood")

    def _truth(self, node: ast.expr, values: Mapping[str, np.ndarray]) -> np.ndarray:
        value = self._value(node, values)
        if value.dtype != bool:
            raise self._refused(f"{ast.unparse(node)!r} is neither true nor false")
        return value


def select_rows(
    rows: RowSet,
    rule: str = PROD_RULE,
    *,
    columns: Mapping[str, str] | None = None,
    num_negatives: int | None = 100,
    answers: Mapping[str, Sequence[str]] | None = None,
    fewest: int = 1,
) -> RowSet:
    """The rows whose query satisfies a rule on the ranks of student and teacher.

    The rows are a student's results (all of them, so that ranks are those of the whole list) with a column of a
    teacher's scores. `student` is the rank (from 1) of the first positive that the student retrieved, `teacher` its
    rank after the retrieved documents are sorted by the teacher's score (the student's order where scores are equal);
    infinite where no positive was retrieved.

    Args:
        rows: With the column `ranks` and those of `columns`.
        rule: See [`RankRule`].
        columns: Name in the rule -> column of scores; by default `teacher` is `scores`, and every `scores_NAME` is
            NAME.
        num_negatives: Keep so many negatives, the best of the student's results first; None for all.
        answers: Query id -> answers: a retrieved document that holds one counts as a positive in the ranks, and is
            not kept as a negative (PROD on NQ).
        fewest: Fewer selected rows than this are an error.

    Returns:
        The selected rows, `metadata["selection"]` telling how many queries had which ranks.

    Raises:
        InputError: If a column is missing, or fewer rows than `fewest` are left; the message says how many queries
            there are at each rank.
    """
    if columns is None:
        columns = {
            "teacher" if name == schema.SCORES else name.removeprefix(schema.SCORES_PREFIX): name
            for name in rows.score_columns
            if name != schema.RETRIEVER_SCORES
        }
    for name in (schema.RANKS, *columns.values()):
        if name not in rows.columns:
            raise InputError(
                f"the rows have no column {name!r}",
                where="select",
                cure="Mine them with the student (ranks) and let the teacher score them (hf-distill score)",
            )
    condition = RankRule(rule, ["student", *columns])
    ranks: dict[str, list[np.ndarray]] = {name: [] for name in condition.names}
    parts: list[pa.Table] = []
    for block in _blocks(rows, columns, answers):
        found = block.ranks()
        for name, values in found.items():
            ranks[name].append(values)
        parts.append(block.kept(condition(found) & block.has_negatives, num_negatives))
    joined = {name: np.concatenate(values) for name, values in ranks.items()}
    report = _report(joined, condition(joined))
    _look_at(report, rule, fewest)
    table = pa.concat_tables(parts)
    names = [name for name in table.column_names if schema.per_document_type(name) is not None]
    return RowSet.from_arrays(
        rows.queries,
        rows.corpus,
        table.column(schema.QUERY).to_numpy(),
        table.column(schema.DOCUMENTS),
        table.column(schema.NUM_POSITIVES).to_numpy(),
        metadata={**rows.metadata, "selection": {"rule": rule, "num_negatives": num_negatives, **report}},
        **{name: table.column(name) for name in names},
    )


class _Block:
    """Some rows: every document with its row, place, rank, scores, and whether it is a positive."""

    def __init__(self, table: pa.Table, columns: Mapping[str, str], hits: np.ndarray | None):
        self.table = table
        documents = table.column(schema.DOCUMENTS).combine_chunks()
        self.offsets = list_offsets(documents).astype(np.int64)
        lengths = np.diff(self.offsets)
        self.row = np.repeat(np.arange(len(lengths)), lengths)
        place = np.arange(len(self.row)) - np.repeat(self.offsets[:-1] - self.offsets[0], lengths)
        self.labelled = place < table.column(schema.NUM_POSITIVES).to_numpy()[self.row]
        self.hit = self.labelled if hits is None else hits
        self.rank = self._flat(schema.RANKS)
        self.scores = {name: self._flat(column) for name, column in columns.items()}

    def _flat(self, name: str) -> np.ndarray:
        return self.table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)

    def ranks(self) -> dict[str, np.ndarray]:
        """Rank of the first positive of each row in the student's and in each teacher's order."""
        shown = np.flatnonzero(self.rank > 0)
        found = {"student": self._first(shown, self.rank[shown])}
        for name, scores in self.scores.items():
            # The student's rank decides between equal scores.
            order = shown[np.lexsort((self.rank[shown], -scores[shown], self.row[shown]))]
            counts = np.bincount(self.row[order], minlength=len(self.table))
            within = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
            found[name] = self._first(order, within + 1)
        return found

    def _first(self, places: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        best = np.full(len(self.table), np.inf)
        hit = self.hit[places]
        np.minimum.at(best, self.row[places[hit]], ranks[hit].astype(float))
        return best

    @property
    def has_negatives(self) -> np.ndarray:
        """Which rows have a document to train against."""
        return np.bincount(self.row[~self.labelled & ~self.hit], minlength=len(self.table)) > 0

    def kept(self, rows: np.ndarray, num_negatives: int | None) -> pa.Table:
        """The chosen rows with their positives and best negatives."""
        negative = ~self.labelled & ~self.hit & rows[self.row]
        # Unretrieved documents have no rank and stand behind.
        depth = np.where(self.rank > 0, self.rank, np.iinfo(np.int32).max)
        order = np.lexsort((np.arange(len(depth)), np.where(self.labelled, 0, depth), ~self.labelled, self.row))
        wanted = order[(self.labelled[order] & rows[self.row[order]]) | negative[order]]
        counts = np.bincount(self.row[wanted[negative[wanted]]], minlength=len(rows))
        if num_negatives is not None:
            isneg = negative[wanted]
            before = np.cumsum(isneg) - isneg
            starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
            wanted = wanted[~isneg | (before - starts[self.row[wanted]] < num_negatives)]
        lengths = np.bincount(self.row[wanted], minlength=len(rows))[rows]
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        chosen = self.table.filter(pa.array(rows))
        columns = {}
        for name in self.table.column_names:
            if name in (schema.QUERY, schema.NUM_POSITIVES):
                columns[name] = chosen.column(name)
            else:
                values = self.table.column(name).combine_chunks().flatten().take(pa.array(wanted))
                columns[name] = pa.chunked_array([pa.ListArray.from_arrays(offsets, values)])
        return pa.table(columns)


def _blocks(rows: RowSet, columns: Mapping[str, str], answers: Mapping[str, Sequence[str]] | None) -> Iterator[_Block]:
    for table in rows.blocks():
        yield _Block(table, columns, None if answers is None else _answer_hits(rows, table, answers))


def _answer_hits(rows: RowSet, table: pa.Table, answers: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Which documents hold an answer of their query; positives are hits as they are."""
    documents = table.column(schema.DOCUMENTS).combine_chunks()
    lengths = np.diff(list_offsets(documents))
    flat = documents.flatten().to_numpy()
    unique, inverse = np.unique(flat, return_inverse=True)
    texts = rows.corpus.texts(unique, template="{text}")
    row = np.repeat(np.arange(len(table)), lengths)
    place = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    hits = place < table.column(schema.NUM_POSITIVES).to_numpy()[row]
    start = 0
    for query, length in zip(rows.queries.ids_at(table.column(schema.QUERY).to_numpy()), lengths):
        matches = AnswerMatcher(answers.get(query, ()))
        for entry in range(start, start + length):
            hits[entry] = hits[entry] or matches(texts[inverse[entry]])
        start += length
    return hits


def _report(ranks: Mapping[str, np.ndarray], selected: np.ndarray) -> dict[str, Any]:
    """How many queries there are at which rank, for people and for the metadata."""
    bands = {f"rank {rank}": (rank, rank) for rank in range(1, _SINGLE_RANKS + 1)}
    bands |= {f"ranks {_SINGLE_RANKS + 1} to 100": (_SINGLE_RANKS + 1, 100), "rank 101 or more": (101, 1e9)}

    def counts(values: np.ndarray) -> dict[str, int]:
        table = {name: int(((values >= low) & (values <= high)).sum()) for name, (low, high) in bands.items()}
        return {**table, "not retrieved": int(np.isinf(values).sum())}

    return {
        "queries": len(selected),
        "selected": int(selected.sum()),
        "ranks": {name: counts(values) for name, values in ranks.items()},
    }


def _look_at(report: Mapping[str, Any], rule: str, fewest: int) -> None:
    shown = "; ".join(
        f"by {name} " + ", ".join(f"{place}: {count:,}" for place, count in counts.items() if count)
        for name, counts in report["ranks"].items()
    )
    sentence = f"{report['selected']:,} of {report['queries']:,} queries satisfy {rule!r} ({shown})"
    if report["selected"] < max(fewest, 1):
        raise InputError(
            sentence,
            where="select",
            cure="Widen the rule, or train the teacher further: it must put a positive above where the student has it",
        )
    if report["selected"] < _ALMOST_NONE * report["queries"]:
        logger.warning("%s: hardly any", sentence)
    else:
        logger.info("%s", sentence)
