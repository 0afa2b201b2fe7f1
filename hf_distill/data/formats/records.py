"""Tevatron's JSON lines, with the passages' texts inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from .. import schema
from ..notes import Notes
from ..readers import Block, read_blocks
from ..row_columns import plain, pool_rows
from ..values import find_column


if TYPE_CHECKING:
    from .source import FormatSource, Input

POSITIVE_PASSAGES, NEGATIVE_PASSAGES = "positive_passages", "negative_passages"


def read_tevatron_queries(source: FormatSource, item: Input, notes: Notes) -> Iterator[Block]:
    """`query_id` and `query` of each line."""
    for block in read_blocks(item.path):
        names = {schema.QUERY_ID: schema.QUERY_ID_NAMES, schema.TEXT: ("query", "query_text", schema.TEXT)}
        columns = {name: block.columns[find_column(block, known)] for name, known in names.items()}
        yield Block(columns, block.where, block.first, block.unit, block.lines)


def read_tevatron_corpus(source: FormatSource, item: Input, notes: Notes) -> Iterator[Block]:
    """The passages of every line, positives first."""
    for block in read_blocks(item.path):
        ids, titles, texts, numbers = [], [], [], []
        columns = [(name, plain(block.columns[name])) for name in _passage_columns(block)]
        for row in range(len(block)):
            number = block.first + row if block.lines is None else int(block.lines[row])
            for name, values in columns:
                for passage in _passages(values[row], block, row, name):
                    ids.append(_docid(passage, block, row, name))
                    titles.append(passage.get("title"))
                    texts.append(passage.get("text"))
                    numbers.append(number)
        columns = {schema.DOCUMENT_ID: ids, schema.TITLE: titles, schema.TEXT: texts}
        yield Block(columns, block.where, numbers[0] if numbers else block.first, block.unit, numbers)


def read_tevatron_rows(source: FormatSource, item: Input, notes: Notes) -> Iterator[Block]:
    """The identifiers of every line's passages."""
    for block in read_blocks(item.path):
        lists = {
            name: [
                [_docid(passage, block, row, name) for passage in _passages(value, block, row, name)]
                for row, value in enumerate(plain(block.columns[name]))
            ]
            for name in _passage_columns(block)
        }
        empty: list[list[str]] = [[] for _ in range(len(block))]
        queries = [str(query) for query in plain(block.columns[find_column(block, schema.QUERY_ID_NAMES)])]
        pools = [[("negatives", ids, {})] for ids in lists.get(NEGATIVE_PASSAGES, empty)]
        yield pool_rows(block, queries, lists.get(POSITIVE_PASSAGES, empty), pools, notes)


def _passage_columns(block: Block) -> list[str]:
    return [name for name in (POSITIVE_PASSAGES, NEGATIVE_PASSAGES) if name in block.columns]


def _passages(value: Any, block: Block, row: int, name: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(passage, dict) for passage in value):
        raise InputError(
            f"{str(value)[:80]!r} is no list of passages",
            where=f"{block.place(row)}, field {name!r}",
            cure='A passage is an object such as {"docid": "7", "title": "…", "text": "…"}',
        )
    return value


def _docid(passage: Mapping[str, Any], block: Block, row: int, name: str) -> str:
    value = passage.get("docid")
    if not isinstance(value, (str, int)) or isinstance(value, bool) or value == "":
        raise InputError(
            f"a passage without an identifier: {str(dict(passage))[:80]!r}",
            where=f"{block.place(row)}, field {name!r}",
            cure="Give every passage a 'docid'; where there are none, read the texts as columns (anchor, positive, …)",
        )
    return str(value)
