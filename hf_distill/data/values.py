"""Checks that turn a column of a file into a clean Arrow column, or say which value in which row is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError
from .readers import Block, file_kind


# Such characters would break the line-based files (TREC, TSV) in which identifiers travel.
_BREAKS_LINES = r"[\t\n\v\f\r\x00]"


def find_column(block: Block, names: Sequence[str]) -> str:
    """The first of `names` that the block has; `InputError` lists both sides when there is none."""
    for name in names:
        if name in block.columns:
            return name
    has_header = file_kind(block.where) in (".tsv", ".csv")
    raise InputError(
        f"no column {names[0]!r} (found: {', '.join(map(repr, block.columns)) or 'no columns'})",
        where=block.where if block.unit == "row" else block.place(0),
        cure=f"Name it {names[0]!r}{' in the first line' if has_header else ''}"
        + (f"; also read: {', '.join(map(repr, names[1:]))}" if names[1:] else ""),
    )


def id_array(block: Block, name: str) -> pa.Array:
    """Identifiers as strings; integers are converted, missing or empty ones are errors."""
    array = _strings(block, name, integers=True)
    if array.null_count:
        index = pc.index(pc.is_null(array), True).as_py()
        raise InputError(
            "the identifier is missing", where=_at(block, index, name), cure="Give every row an identifier"
        )
    bad = pc.index(pc.equal(array, ""), True).as_py()
    if bad >= 0:
        raise InputError("the identifier is empty", where=_at(block, bad, name), cure="Give every row an identifier")
    bad = pc.index(pc.match_substring_regex(array, _BREAKS_LINES), True).as_py()
    if bad >= 0:
        raise InputError(
            f"the identifier {array[bad].as_py()!r} holds a tab, line break or null character",
            where=_at(block, bad, name),
            cure="Remove it; TREC and TSV files could not hold such an identifier",
        )
    return array


def text_array(block: Block, name: str) -> pa.Array:
    """Texts as strings; a missing text is an error, an empty one is not."""
    array = _strings(block, name, integers=False)
    if array.null_count:
        index = pc.index(pc.is_null(array), True).as_py()
        raise InputError(
            "the text is missing",
            where=_at(block, index, name),
            cure='Fill it in or remove the row; write "" if there really is no text',
        )
    return array


def title_array(block: Block, name: str) -> pa.Array:
    """Titles as strings; a missing title, in one row or in all, is the empty string."""
    if name not in block.columns:
        return pa.array([""] * len(block), pa.string())
    return pc.fill_null(_strings(block, name, integers=False), "")


def integer_array(block: Block, name: str) -> np.ndarray:
    """Whole numbers as `int64`, also from strings such as `"2"` and from floats such as `2.0`."""
    values = block.columns[name]
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        if pa.types.is_integer(values.type) and not values.null_count:
            return values.to_numpy(zero_copy_only=False).astype(np.int64)
        values = values.to_pylist()
    result = np.empty(len(values), dtype=np.int64)
    for index, value in enumerate(values):
        try:
            number = int(value) if not isinstance(value, float) else int(value) if value == int(value) else None
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None or isinstance(value, bool) or not -(2**63) <= number < 2**63:
            raise InputError(
                f"{value!r} is not a whole number",
                where=_at(block, index, name),
                cure="Use whole numbers: 0 for not relevant, 1 and more for relevant",
            )
        result[index] = number
    return result


def _at(block: Block, index: int, name: str) -> str:
    return f"{block.place(index)}, field {name!r}"


def _strings(block: Block, name: str, *, integers: bool) -> pa.Array:
    values = block.columns[name]
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.Array):
        return _arrow_strings(block, name, values, integers)
    try:
        return pa.array(values, pa.string())
    except (pa.ArrowException, UnicodeEncodeError, TypeError):
        return pa.array(
            [_string(block, name, index, value, integers) for index, value in enumerate(values)], pa.string()
        )


def _arrow_strings(block: Block, name: str, values: pa.Array, integers: bool) -> pa.Array:
    kind = values.type
    if pa.types.is_dictionary(kind):
        values, kind = values.dictionary_decode(), kind.value_type
    stringy = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if pa.types.is_null(kind) or stringy or (integers and pa.types.is_integer(kind)):
        strings = values.cast(pa.string())
        try:
            strings.validate(full=True)
        except pa.ArrowInvalid:
            raise InputError(
                "a value is not UTF-8",
                where=f"{_at(block, 0, name)} and the {len(block)} rows from there",
                cure="Write the file again from UTF-8 text",
            ) from None
        return strings
    raise InputError(
        f"values of type {kind} where strings are expected",
        where=f"{block.where}, field {name!r}",
        cure="Convert them",
    )


def _string(block: Block, name: str, index: int, value: Any, integers: bool) -> str | None:
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and integers:
        return str(value)
    if not isinstance(value, str):
        raise InputError(
            f"{str(value)[:80]!r} is a {type(value).__name__}, not a string",
            where=_at(block, index, name),
            cure="Put the value in quotation marks",
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            "half of a surrogate pair (such as \\ud83d alone), which UTF-8 cannot hold",
            where=_at(block, index, name),
            cure="Remove it or write the whole character",
        ) from None
    return value
