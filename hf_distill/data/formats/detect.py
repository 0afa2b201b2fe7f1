"""What a file is, by its name and its first line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError
from .. import schema
from ..readers import TAB, file_kind
from ..row_columns import is_row_block
from .kinds import COLUMNS, CORPUS, KINDS, QRELS, QUERIES, ROWS, SCORES, TITLES
from .pickles import CURE, is_pickle, read_pickled_items
from .source import Input
from .tables import first_lines, has_header


ROLES = (*KINDS, COLUMNS)

_TEXT_SUFFIXES = (".tsv", ".txt", ".trec", ".run", ".qrels")
# Words that say what a file of judgements is, not of which split.
_QRELS_WORDS = re.compile(r"msmarco|qrels?|(?<=\W)(tsv|txt)$", re.IGNORECASE)

# The first one that fits a file's name tells what it is.
_BY_NAME = (
    (TITLES, r"titles?$|title"),
    ("triples", r"triples"),
    (QRELS, r"qrel"),
    ("negatives", r"negatives?|(^|\W)(negs?|hn)(\W|$)"),
    ("run", r"top1000|^run\W|\W(run|trec)$"),
    (QUERIES, r"quer|topics|questions"),
    (CORPUS, r"collection|corpus|docs|documents|passages?|para|psgs"),
)


def detect(path: Path, allow_pickle: bool = False) -> Input | None:
    """What a file is, or None if neither name nor content tells.

    Args:
        path: The file.
        allow_pickle: Whether its first entry may be read if it is a pickle.
    """
    if is_pickle(path):
        if not allow_pickle:
            return None
        _, value = next(read_pickled_items(path), (None, None))
        return named(path, SCORES if isinstance(value, dict) else "pickled_negatives")
    kind = file_kind(path)
    if kind in (".jsonl", ".json", ".parquet", ".csv"):
        found = by_columns(_sample(path, kind), _stem(path))
    elif kind == ".tsv" or _suffix(path) in _TEXT_SUFFIXES or (QRELS in path.name and _suffix(path) == ""):
        found = _by_line(path)
    else:
        return None
    return None if found is None else named(path, found)


def named(path: Path, kind: str, name: str | None = None, columns: Sequence[str] | None = None) -> Input:
    """An input whose split or row set is called `name`, by default after the file."""
    if kind != COLUMNS and kind not in KINDS:
        raise InputError(f"there is no format {kind!r}", where=str(path), cure=f"Choose one of: {', '.join(ROLES)}")
    if name is None:
        name = _stem(path)
        if kind == QRELS:
            name = _QRELS_WORDS.sub("", name).strip("._- ") or "train"
    return Input(path, kind, check_name(name, str(path)), tuple(columns) if columns else None)


def scan(folder: Path, allow_pickle: bool = False) -> Iterator[Input]:
    """The inputs among the files of a folder and of its `qrels` folder."""
    for path in [*sorted(folder.iterdir()), *sorted(folder.glob("qrels/*"))]:
        hidden = path.name.startswith((".", "README", "LICENSE")) or path.name == "metadata.json"
        if path.is_file() and not hidden:
            found = detect(path, allow_pickle)
            if found is not None:
                yield found


def refuse_pickle(path: Path) -> InputError:
    """What to say of a pickle that nobody allowed."""
    return InputError("a pickle, which is not read here", where=str(path), cure=CURE)


def check_name(name: str, where: str) -> str:
    """A name that can stand for a row set or a split; other characters become underscores."""
    cleaned = re.sub(r"[^\w.]+", "_", name)
    cleaned = re.sub(r"\.{2,}", ".", cleaned).strip("._")
    if not cleaned:
        raise InputError(f"{name!r} is no name", where=where, cure="Use letters, digits, underscores and dots")
    reserved = (*schema.CORPUS_CONFIGS, *schema.QUERIES_CONFIGS, *schema.QRELS_CONFIGS, TITLES)
    return f"{cleaned}_rows" if cleaned in reserved else cleaned


def by_columns(sample: dict[str, Any], stem: str) -> str | None:
    """The format that has such columns.

    Args:
        sample: The first value of each column.
        stem: The file's name, which tells queries from passages.
    """
    names = set(sample)
    if names & {"positive_passages", "negative_passages"}:
        return "tevatron"
    if "neg" in names and isinstance(sample["neg"], dict):
        return "hard_negatives"
    if is_row_block(names):
        return "tevatron_ids" if names & {"query", "query_text"} else ROWS
    judged = (schema.QRELS_QUERY_NAMES, schema.QRELS_DOCUMENT_NAMES, schema.RELEVANCE_NAMES)
    if all(names & set(group) for group in judged):
        return QRELS
    identified = names & {*schema.QUERY_ID_NAMES, *schema.DOCUMENT_ID_NAMES}
    if identified and names & {*schema.QUERY_TEXT_NAMES, *schema.DOCUMENT_TEXT_NAMES}:
        queries = re.search(_BY_NAME[5][1], stem, re.IGNORECASE) or names & {"query", "query_text", "question"}
        return QUERIES if queries else CORPUS
    if identified and schema.TITLE in names:
        return TITLES
    texts = [name for name, value in sample.items() if isinstance(value, (str, list))]
    return COLUMNS if len(texts) > 1 and not identified else None


def _by_line(path: Path) -> str | None:
    line = next(iter(first_lines(path)), "")
    fields = line.split(TAB) if TAB in line else line.split()
    if has_header(TAB.join(fields)) and fields:
        found = by_columns(dict.fromkeys(fields, ""), _stem(path))
    else:
        stem = path.name.lower().removesuffix(".gz").removesuffix(".tsv").removesuffix(".txt")
        found = next((kind for kind, pattern in _BY_NAME if re.search(pattern, stem)), None)
        found = found or (QRELS if path.parent.name == QRELS else _by_fields(fields))
    if found == "triples" and any(" " in field for field in fields):
        return COLUMNS
    return "top1000" if found == "run" and len(fields) == 4 else found


def _by_fields(fields: Sequence[str]) -> str | None:
    if any(" " in field for field in fields):
        return COLUMNS if len(fields) == 3 else None
    if len(fields) == 6 and fields[1] == "Q0":
        return "run"
    if len(fields) == 4 and fields[1] in ("0", "Q0"):
        return QRELS
    if len(fields) == 2 and "," in fields[1]:
        return "negatives"
    return "triples" if len(fields) == 3 else None


def _sample(path: Path, kind: str) -> dict[str, Any]:
    """The columns of a file, with the values of its first row where they are cheap to have."""
    if kind == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            arrow_schema = pq.read_schema(path)
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"not a readable parquet file ({error})", where=str(path), cure="Copy or download the file again"
            ) from None
        return {
            field.name: {} if pa.types.is_struct(field.type) else "" if pa.types.is_string(field.type) else []
            for field in arrow_schema
        }
    line = next(iter(first_lines(path)), "")
    if kind == ".csv":
        return dict.fromkeys((name.strip().strip('"') for name in line.split(",")), "")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _stem(path: Path) -> str:
    name = re.sub(r"(\.gz)?$", "", path.name, flags=re.IGNORECASE)
    suffix = Path(name).suffix.lower()
    known = (*_TEXT_SUFFIXES, ".jsonl", ".json", ".csv", ".parquet", ".pkl", ".pickle")
    return name[: -len(suffix)] if suffix in known else name
