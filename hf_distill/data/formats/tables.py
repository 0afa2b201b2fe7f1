"""Files of MS MARCO and its kin: passages, titles, queries, judgements, negatives, triples and runs.

Most have no header, so the number of fields tells what they are. Nothing is quoted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ...errors import InputError
from .. import schema
from ..lines import read_lines
from ..notes import Notes
from ..readers import TAB, Block, file_kind, read_blocks, tab_blocks
from ..row_columns import parse_list, plain, pool_rows, standard_rows
from ..values import find_column, id_array
from .grouping import grouped


if TYPE_CHECKING:
    from .source import FormatSource, Input

_ITERATION, _URL, _TAG, _RANK, _SCORE = "iteration", "url", "tag", "rank", "score"

# What the fields of a file without a header are, by their number.
CORPUS_FIELDS = {
    2: (schema.DOCUMENT_ID, schema.TEXT),
    3: (schema.DOCUMENT_ID, schema.TITLE, schema.TEXT),
    4: (schema.DOCUMENT_ID, _URL, schema.TITLE, schema.TEXT),
}
PAIR_FIELDS = {2: (schema.QUERY_ID, schema.TEXT)}
QRELS_FIELDS = {
    3: (schema.QUERY_ID, schema.DOCUMENT_ID, schema.RELEVANCE),
    4: (schema.QUERY_ID, _ITERATION, schema.DOCUMENT_ID, schema.RELEVANCE),
}
NEGATIVES_FIELDS = {2: (schema.QUERY_ID, schema.DOCUMENT_IDS)}
TRIPLES_FIELDS = {3: (schema.QUERY_ID, "positive_id", "negative_id")}
RUN_FIELDS = {
    3: (schema.QUERY_ID, schema.DOCUMENT_ID, _RANK),
    4: (schema.QUERY_ID, schema.DOCUMENT_ID, "query", "passage"),
    6: (schema.QUERY_ID, _ITERATION, schema.DOCUMENT_ID, _RANK, _SCORE, _TAG),
}
TEXT_TRIPLES = ("query", "positive", "negative")

_HEADER_NAMES = {
    *schema.QUERY_ID_NAMES,
    *schema.DOCUMENT_ID_NAMES,
    *schema.QUERY_TEXT_NAMES,
    *schema.DOCUMENT_TEXT_NAMES,
    *schema.RELEVANCE_NAMES,
    *(schema.TITLE, _ITERATION, _URL, _TAG, _RANK, _SCORE, "positive_id", "negative_id", schema.DOCUMENT_IDS),
    *("anchor", "positive", "negative", "sentence1", "sentence2", "docs", "labels", "scores"),
}


def first_lines(path: Path, count: int = 1) -> list[str]:
    """The first lines of a text file that are not blank."""
    return [line for _, line in islice(read_lines(path), count)]


def has_header(line: str) -> bool:
    """Whether a line names columns: all of its fields are names that we know."""
    return all(name.strip() in _HEADER_NAMES for name in line.split(TAB))


def table_blocks(item: Input, fields: Mapping[int, Sequence[str]], what: str) -> Iterator[Block]:
    """Blocks of a file of any suffix; one without a header has the columns that the number of its fields tells.

    Args:
        item: The file.
        fields: Columns by number of fields.
        what: What the file holds, for messages.
    """
    path = item.path
    if file_kind(path) not in (".tsv", None):
        yield from read_blocks(path)
        return
    first = next(iter(first_lines(path)), None)
    if first is None:
        raise InputError("the file is empty", where=str(path), cure=f"It should hold {what}")
    # Files of TREC are separated by blanks; a tab anywhere in the first line says that blanks belong to the text.
    blanks = TAB not in first
    split = first.split() if blanks else first.split(TAB)
    if item.columns is None and has_header(TAB.join(split)):
        yield from tab_blocks(path, blanks=blanks)
        return
    names = item.columns or fields.get(len(split))
    if names is None:
        forms = " or ".join(" ".join(names) for names in fields.values())
        raise InputError(
            f"{len(split)} fields where {what} have {' or '.join(map(str, fields))}: {first[:80]!r}",
            where=f"{path}, line 1",
            cure=f"A line is: {forms}",
        )
    yield from tab_blocks(path, names, blanks=blanks)


def read_corpus(source: FormatSource, item: Input, notes: Notes) -> Iterator[Block]:
    """Passages, with the titles that lie in a file of their own."""
    for block in table_blocks(item, CORPUS_FIELDS, "passages"):
        if len(block) and schema.TITLE not in block.columns:
            titles = source.titles(id_array(block, find_column(block, schema.DOCUMENT_ID_NAMES)))
            if titles is not None:
                notes.add("passages have no title", sum(not title for title in titles), block.where)
                block.columns[schema.TITLE] = titles
        yield block


def read_queries(source: FormatSource, item: Input, notes: Notes) -> Iterator[Block]:
    """Queries."""
    return table_blocks(item, PAIR_FIELDS, "queries")


def read_titles(source: FormatSource, item: Input, notes: Notes) -> Iterator[Block]:
    """Titles by document, under the names of queries, which is the table that keeps them."""
    for block in table_blocks(item, PAIR_FIELDS, "titles"):
        ids = next((name for name in schema.DOCUMENT_ID_NAMES if name in block.columns), schema.QUERY_ID)
        text = schema.TITLE if schema.TITLE in block.columns else schema.TEXT
        columns = {schema.QUERY_ID: block.columns[ids], schema.TEXT: block.columns[text]}
        yield Block(columns, block.where, block.first, block.unit, block.lines)


def read_qrels(source: FormatSource, item: Input, notes: Notes) -> Iterator[Block]:
    """Judgements: TREC's four columns, or three."""
    return table_blocks(item, QRELS_FIELDS, "judgements")


def read_rows(source: FormatSource, item: Input, notes: Notes) -> Iterator[Block]:
    """Rows of identifiers, see `standard_rows`."""
    for block in read_blocks(item.path):
        yield standard_rows(block, notes) if len(block) else block


def read_rows_qrels(source: FormatSource, item: Input, notes: Notes) -> Iterator[Block]:
    """The positives of rows as judgements."""
    readers = source.kinds[item.kind].readers
    for block in readers["rows"](source, item, Notes()):
        if schema.NUM_POSITIVES in block.columns:
            yield positives_as_qrels(block)


def positives_as_qrels(block: Block) -> Block:
    """One judgement of grade 1 for each positive of a block of rows."""
    query, document, numbers = [], [], []
    rows = zip(
        plain(block.columns[find_column(block, schema.QUERY_ID_NAMES)]),
        plain(block.columns[schema.DOCUMENT_IDS]),
        plain(block.columns[schema.NUM_POSITIVES]),
    )
    for row, (identifier, documents, positives) in enumerate(rows):
        query += [identifier] * positives
        document += documents[:positives]
        numbers += [block.first + row if block.lines is None else int(block.lines[row])] * positives
    columns = {schema.QUERY_ID: query, schema.DOCUMENT_ID: document, schema.RELEVANCE: [1] * len(query)}
    return Block(columns, block.where, numbers[0] if numbers else block.first, block.unit, numbers)


def read_negatives(source: FormatSource, item: Input, notes: Notes) -> Iterator[Block]:
    """Lines of a query and its negatives, separated by commas; positives come from the judgements."""
    for block in table_blocks(item, NEGATIVES_FIELDS, "negatives"):
        queries = id_array(block, schema.QUERY_ID).to_pylist()
        name = schema.DOCUMENT_IDS
        pools = [
            [(item.name, _identifiers(text, f"{block.place(row)}, field {name!r}"), {})]
            for row, text in enumerate(plain(block.columns[name]))
        ]
        positives = source.positives().of(queries)
        _note_unlabelled(source, positives, block, notes)
        yield pool_rows(block, queries, positives, pools, notes)


def _identifiers(text: str, where: str) -> list[str]:
    if text.startswith("["):
        return [str(item) for item in parse_list(text, where)]
    return [item for item in text.replace(",", " ").split() if item]


def _note_unlabelled(source: FormatSource, positives: Sequence[Sequence[str]], block: Block, notes: Notes) -> None:
    bare = [row for row, found in enumerate(positives) if not found]
    if bare and len(source.positives()):
        notes.add("rows are of queries without a judged positive", len(bare), block.place(bare[0]))


def read_triples(source: FormatSource, item: Input, notes: Notes) -> Iterator[Block]:
    """Lines of a query, a positive and a negative, as one row for each query."""
    blocks = table_blocks(item, TRIPLES_FIELDS, "triples")
    names = TRIPLES_FIELDS[3]
    for group in grouped(blocks, names, source.grouping_key(item), item.path, source.cache_dir):
        positives = [list(dict.fromkeys(ids)) for ids in group.lists(names[1])]
        pools = [[(item.name, list(dict.fromkeys(ids)), {})] for ids in group.lists(names[2])]
        yield pool_rows(group.origin, group.queries, positives, pools, notes)


def read_run(source: FormatSource, item: Input, notes: Notes) -> Iterator[Block]:
    """Results, as one row for each query: those judged positive first, then the others by rank."""
    blocks = table_blocks(item, RUN_FIELDS, "results")
    names = (schema.QUERY_ID, schema.DOCUMENT_ID, _RANK, _SCORE)
    for group in grouped(blocks, names, source.grouping_key(item), item.path, source.cache_dir):
        positives = source.positives().of(group.queries)
        _note_unlabelled(source, positives, group.origin, notes)
        pools, found = [], []
        scores = group.lists(_SCORE) if group.has(_SCORE) else None
        ranks = group.lists(_RANK) if group.has(_RANK) else None
        for row, documents in enumerate(group.lists(schema.DOCUMENT_ID)):
            columns: dict[str, list[Any]] = {}
            if scores is not None or ranks is not None:
                place = group.origin.place(row)
                if scores is not None:
                    values = [-value for value in _numbers(scores[row], place, _SCORE)]
                else:
                    values = _numbers(ranks[row], place, _RANK)
                order = np.argsort(values, kind="stable").tolist()
                documents = [documents[index] for index in order]
                columns[schema.RANKS] = list(range(1, len(order) + 1))
                if scores is not None:
                    columns[schema.RETRIEVER_SCORES] = [-values[index] for index in order]
            retrieved = set(documents)
            found.append([document for document in positives[row] if document in retrieved])
            pools.append([(item.name, documents, columns)])
        yield pool_rows(group.origin, group.queries, found, pools, notes, among=True)


def _numbers(values: Sequence[str], place: str, field: str) -> list[float]:
    numbers = []
    for value in values:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise InputError(
                f"{value!r} is not a finite number",
                where=f"{place} and the lines of the same query, field {field!r}",
                cure="Mend the line",
            )
        numbers.append(number)
    return numbers


def read_run_queries(source: FormatSource, item: Input, notes: Notes) -> Iterator[Block]:
    """The queries of results that bring their texts along."""
    yield from _run_texts(item, schema.QUERY_ID, "query")


def read_run_corpus(source: FormatSource, item: Input, notes: Notes) -> Iterator[Block]:
    """The passages of results that bring their texts along."""
    yield from _run_texts(item, schema.DOCUMENT_ID, "passage")


def _run_texts(item: Input, identifier: str, text: str) -> Iterator[Block]:
    for block in table_blocks(item, RUN_FIELDS, "results"):
        if text in block.columns:
            columns: dict[str, pa.Array] = {identifier: block.columns[identifier], schema.TEXT: block.columns[text]}
            yield Block(columns, block.where, block.first, block.unit, block.lines)
