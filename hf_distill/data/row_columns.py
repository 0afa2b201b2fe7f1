"""The forms in which others keep rows of identifiers, turned into `query_id, document_ids, num_positives`."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa

from ..errors import InputError
from . import schema
from .notes import Notes
from .readers import Block


POSITIVE_NAMES = ("positive_document_ids", "positive_ids", "positive_id", "pos_ids", "positive_pids", "pos")
_NEGATIVE = re.compile(
    r"^(negative_document_ids|negative_ids|negative_pids|neg_ids|neg|negative(_\d+)?_id|negative_id_\d+)$"
)

POSITIVE_SOURCE = "positive"

# One place where candidates came from: its name, identifiers in order, their ranks or scores if it has them.
Pool = tuple[str, Sequence[str], dict[str, Sequence[float]]]


def is_row_block(columns: Iterable[str]) -> bool:
    """Whether columns of these names are rows of identifiers."""
    names = list(columns)
    return any(name in names for name in schema.QUERY_ID_NAMES) and (
        schema.DOCUMENT_IDS in names or any(name in names for name in POSITIVE_NAMES)
    )


def standard_rows(block: Block, notes: Notes) -> Block:
    """A block with the columns of a row set, whatever it calls its positives and negatives.

    Read are `document_ids` as it is, and one or more columns of positives and negatives: `positive_document_ids` and
    `negative_document_ids` (Tevatron), `positive_id` and `negative_id` or `negative_1_id` … (sentence-transformers),
    each an identifier or a list of them. Lists may be stored as strings; see `parse_list`. Where the negatives are
    `{retriever: [...]}` (msmarco-hard-negatives), the rows have `sources` and `ranks`, and a negative that several
    retrievers found stands there once for each.
    """
    if schema.DOCUMENT_IDS in block.columns:
        lists = [name for name in block.columns if name == schema.DOCUMENT_IDS or schema.per_document_type(name)]
        parsed = {name: _parsed(block, name) for name in lists if _holds(block.columns[name], str, _is_string)}
        return Block({**block.columns, **parsed}, block.where, block.first, block.unit, block.lines)
    positive = next((name for name in POSITIVE_NAMES if name in block.columns), None)
    if positive is None:
        return block
    query = next((name for name in schema.QUERY_ID_NAMES if name in block.columns), None)
    negatives = [name for name in block.columns if _NEGATIVE.match(name)]
    if query is None:
        return block
    positives = id_lists(block, positive)
    queries = [identifiers[0] if identifiers else None for identifiers in id_lists(block, query)]
    systems = next((name for name in negatives if _holds(block.columns[name], dict, pa.types.is_struct)), None)
    if systems is not None:
        return pool_rows(block, queries, positives, _pools_by_system(block, systems), notes)
    columns = [id_lists(block, name) for name in negatives]
    tails = [[item for part in row for item in part] for row in zip(*columns)] or [[] for _ in positives]
    made = pool_rows(block, queries, positives, [[("negatives", ids, {})] for ids in tails], notes)
    return Block({name: made.columns[name] for name in made.columns if name != schema.SOURCES}, *_place(made))


def _pools_by_system(block: Block, name: str) -> list[list[Pool]]:
    """A pool for each retriever whose results a row has, best first."""
    pools: list[list[Pool]] = []
    for row, systems in enumerate(plain(block.columns[name])):
        if not isinstance(systems, dict):
            raise InputError(
                f"{str(systems)[:80]!r} is no object of lists",
                where=f"{block.place(row)}, field {name!r}",
                cure='It maps a retriever to its results: {"bm25": [17, 4]}',
            )
        part = Block({system: [ids] for system, ids in systems.items() if ids}, block.place(row), 1, "row")
        lists = {system: id_lists(part, system)[0] for system in part.columns}
        found = [(system, ids, {schema.RANKS: range(1, len(ids) + 1)}) for system, ids in lists.items()]
        pools.append(found or [("none", (), {schema.RANKS: ()})])
    return pools


def pool_rows(
    origin: Block,
    queries: Sequence[Any],
    positives: Sequence[Sequence[str]],
    pools: Sequence[Sequence[Pool]],
    notes: Notes,
    *,
    among: bool = False,
) -> Block:
    """Rows of positives, then the candidates of every pool.

    A candidate that is a positive of its query, or that its pool names twice, is left out and counted; two pools may
    name the same one. Rows without any document are left out too.

    Args:
        origin: The block that the rows come from, for places.
        queries: The identifier of each row's query.
        positives: Each row's positives.
        pools: Each row's pools, all with the same columns beside the identifiers.
        notes: Takes what was left out.
        among: Whether positives belong among the candidates, as in results of a search; then nothing is counted.

    Returns:
        A block with `query_id`, `document_ids`, `num_positives`, `sources` (`"positive"` or the pool's name) and the
        pools' own columns, where a positive has 0 unless a pool named it.
    """
    extra = list(dict.fromkeys(name for row in pools for pool in row for name in pool[2]))
    result: dict[str, list[Any]] = {
        name: [] for name in (schema.QUERY_ID, schema.DOCUMENT_IDS, schema.NUM_POSITIVES, schema.SOURCES, *extra)
    }
    kept: list[int] = []
    for row, (query, relevant, row_pools) in enumerate(zip(queries, positives, pools)):
        head = dict.fromkeys(relevant)
        values: dict[str, dict[str, float]] = {name: {} for name in extra}
        documents, sources = list(head), [POSITIVE_SOURCE] * len(head)
        tails: dict[str, list[float]] = {name: [] for name in extra}
        inside = doubled = 0
        for source, candidates, columns in row_pools:
            named: set[str] = set()
            for index, candidate in enumerate(candidates):
                if candidate in head:
                    inside += 1
                    for name in columns:
                        values[name].setdefault(candidate, columns[name][index])
                elif candidate in named:
                    doubled += 1
                else:
                    named.add(candidate)
                    documents.append(candidate)
                    sources.append(source)
                    for name in extra:
                        tails[name].append(columns[name][index])
        if inside and not among:
            notes.add("negatives are positives of their query and were left out", inside, origin.place(row))
        if doubled:
            notes.add("candidates are named twice by one source; the first counts", doubled, origin.place(row))
        if not documents:
            notes.add("rows have no documents and were left out", 1, origin.place(row))
            continue
        kept.append(row)
        result[schema.QUERY_ID].append(query)
        result[schema.DOCUMENT_IDS].append(documents)
        result[schema.NUM_POSITIVES].append(len(head))
        result[schema.SOURCES].append(sources)
        for name in extra:
            result[name].append([values[name].get(document, 0) for document in head] + tails[name])
    return Block(result, *_place(origin, kept))


def id_lists(block: Block, name: str) -> list[list[str]]:
    """A column of identifiers or of lists of them, as lists of strings; integers are converted."""
    rows = []
    for index, value in enumerate(plain(block.columns[name])):
        if isinstance(value, str) and value[:1] == "[":
            value = parse_list(value, f"{block.place(index)}, field {name!r}")
        items = [] if value is None else value if isinstance(value, list) else [value]
        for item in items:
            if not isinstance(item, (str, int)) or isinstance(item, bool) or item == "":
                raise InputError(
                    f"{str(item)[:80]!r} is no identifier",
                    where=f"{block.place(index)}, field {name!r}",
                    cure="Use strings or whole numbers",
                )
        rows.append([str(item) for item in items])
    return rows


def parse_list(text: str, where: str) -> list[Any]:
    """A list that was stored as a string: JSON, Python's notation, or values separated by commas.

    Nothing is evaluated: only literals of lists, strings and numbers are read.

    Raises:
        InputError: Anything else.
    """
    text = text.strip()
    if not text.startswith("["):
        return [item.strip() for item in text.split(",")] if text else []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = None
    if not isinstance(value, list) or any(isinstance(item, (dict, tuple, set, bytes)) for item in value):
        raise InputError(
            f"{text[:80]!r} is not a list of values",
            where=where,
            cure="Store lists as lists, as JSON, or as values separated by commas",
        )
    return value


def plain(values: Any) -> list[Any]:
    """The Python values of a column."""
    return values.to_pylist() if isinstance(values, (pa.Array, pa.ChunkedArray)) else list(values)


def _holds(values: Any, kind: type, arrow_kind: Callable[[pa.DataType], bool]) -> bool:
    """Whether a column has values of a type, in Python or in Arrow."""
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        return arrow_kind(values.type)
    return any(isinstance(value, kind) for value in values)


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _parsed(block: Block, name: str) -> list[Any]:
    number = float if schema.is_score_column(name) else int if name == schema.RANKS else None
    rows = []
    for index, value in enumerate(plain(block.columns[name])):
        if isinstance(value, str):
            where = f"{block.place(index)}, field {name!r}"
            value = parse_list(value, where)
            try:
                value = value if number is None else [number(item) for item in value]
            except (ValueError, TypeError, OverflowError):
                raise InputError(f"{str(value)[:80]} are not numbers", where=where, cure="Mend the list") from None
        rows.append(value)
    return rows


def _place(block: Block, kept: Sequence[int] | None = None) -> tuple[str, int, str, Sequence[int] | None]:
    """The last four fields of a block, for all of its rows or those that were kept."""
    if kept is None or len(kept) == len(block):
        return block.where, block.first, block.unit, block.lines
    numbers = [block.first + row if block.lines is None else int(block.lines[row]) for row in kept]
    return block.where, numbers[0] if numbers else block.first, block.unit, numbers
