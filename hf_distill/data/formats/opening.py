"""From a folder, a file or a Hub id, in whatever format, to a source of configs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...console import get_logger
from ...errors import InputError
from ...hub.client import split_revision
from .. import schema
from ..columns import rows_from_columns
from ..readers import Block
from ..sources import (
    DATA_FILES,
    HubSource,
    LoadingScriptError,
    LocalSource,
    content_hash,
    fetch_data_files,
    is_hub_id,
    open_source,
    resolve_revision,
)
from .detect import ROLES, by_columns, detect, named, refuse_pickle, scan
from .kinds import COLUMNS, CORPUS, ROWS
from .pickles import PICKLES, is_pickle
from .source import FORMAT_VERSION, FormatSource, Input
from .tables import TEXT_TRIPLES, table_blocks


if TYPE_CHECKING:
    from ..collection import Collection
    from ..rows import RowSet

logger = get_logger(__name__)

AUTO, COLLECTION = "auto", "collection"
FORMATS = (AUTO, COLLECTION, *ROLES)


@dataclass
class TextRows:
    """A file whose rows hold texts; see `hf_distill.data.columns`.

    Attributes:
        path: The file.
        cache_dir: Where texts are kept while they are compared.
    """

    path: Path
    cache_dir: str | os.PathLike | None = None
    revision: str | None = None

    @property
    def where(self) -> str:
        """The file, for messages."""
        return str(self.path)

    @property
    def name(self) -> str:
        """The collection's name."""
        return re.sub(r"\W+", "_", self.path.name.split(".")[0]).strip("_") or "collection"

    def key(self) -> Any:
        """Identifies the content."""
        return [FORMAT_VERSION, COLUMNS, content_hash(self.path, self.cache_dir)]

    def blocks(self) -> Iterator[Block]:
        """The rows, from the start."""
        return table_blocks(Input(self.path, COLUMNS, "train"), {3: TEXT_TRIPLES}, "triples of texts")

    def read(self, name: str | None = None) -> tuple[Collection, RowSet]:
        """Queries, passages and rows, with each distinct text once."""
        return rows_from_columns(self.blocks, name=name or self.name, cache_dir=self.cache_dir)


Source = LocalSource | HubSource | FormatSource | TextRows

_SPEC = re.compile(rf"({'|'.join(ROLES)})(?::([\w.\-]+))?=(.+)", re.DOTALL)


def open_collection(
    source: str | os.PathLike, revision: str | None = None, cache_dir: str | os.PathLike | None = None
) -> Source:
    """A collection of our own layout or BEIR's as it is, else what its files are found to be.

    Repositories that are Python loading scripts are read through their data files; the script is never run.
    """
    text = os.fspath(source)
    if not Path(text).is_dir() and (Path(text).exists() or not is_hub_id(text)):
        return open_source(source, revision, cache_dir)
    if not Path(text).exists():
        return _open_hub(text, revision, cache_dir, allow_pickle=False)
    local = open_source(source, revision, cache_dir)
    return local if is_collection(local) else _scanned(Path(text), local, cache_dir) or local


def open_inputs(
    specs: Sequence[str],
    *,
    format: str = AUTO,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    allow_pickle: bool = False,
    corpus_columns: Sequence[str] | None = None,
) -> Source:
    """What `hf-distill convert` is to read.

    Args:
        specs: Files, folders and Hub ids, each perhaps with what it is: `negatives=bm25.tsv`, `qrels:dev=judged.txt`;
            a Hub id perhaps with a revision of its own: `user/name@v1`.
        format: What inputs are that do not say so: `"auto"`, `"collection"` or a format of single files.
        revision: Branch, tag or commit on the Hub.
        cache_dir: For titles, scores and rows that have to be put in order.
        allow_pickle: Whether pickles may be read, by the restricted reader.
        corpus_columns: The fields of a file of passages without a header, in order.

    Raises:
        InputError: Nothing there, or nothing that is recognised.
    """
    if format not in FORMATS:
        raise InputError(f"{format!r} is no format", where="--format", cure=f"Choose one of: {', '.join(FORMATS)}")
    if not specs:
        raise InputError("nothing to convert", where="--input", cure="Name files, folders or a Hub id")
    parsed = [_spec(spec) for spec in specs]
    if len(parsed) == 1 and parsed[0][0] is None:
        only = parsed[0][2]
        if Path(only).is_dir() and format in (AUTO, COLLECTION):
            local = LocalSource(only, cache_dir)
            if format == COLLECTION or is_collection(local):
                return local
            found = _scanned(Path(only), local, cache_dir, allow_pickle)
            if found is None:
                raise InputError(f"no format is recognised ({local.looked_for()})", where=only, cure=_cure())
            return found
        repo, at = split_revision(only)
        if not Path(only).exists() and is_hub_id(repo) and format in (AUTO, COLLECTION):
            return _open_hub(repo, at or revision, cache_dir, allow_pickle=allow_pickle)
    inputs: list[Input] = []
    for role, name, text in parsed:
        role = role if role is not None or format == AUTO else format
        inputs += _inputs(text, role, name, revision, allow_pickle, corpus_columns)
    texts = [item for item in inputs if item.kind == COLUMNS]
    if len(inputs) == 1 and texts:
        return TextRows(texts[0].path, cache_dir)
    if texts:
        raise InputError(
            "rows of texts beside other files", where=str(texts[0].path), cure="Convert this file by itself"
        )
    return FormatSource(
        inputs,
        name=re.sub(r"\W+", "_", _stem(inputs)).strip("_") or "collection",
        where=_places(inputs),
        cache_dir=cache_dir,
        allow_pickle=allow_pickle,
    )


def open_rows(path: str | os.PathLike, cache_dir: str | os.PathLike | None = None) -> FormatSource | None:
    """A file or folder that holds exactly one row set in a foreign format; None where none is recognised.

    Raises:
        InputError: A pickle, several row sets.
    """
    path = Path(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if is_pickle(file):
            raise refuse_pickle(file)
    try:
        inputs = list(scan(path)) if path.is_dir() else [found for found in (detect(path),) if found is not None]
    except InputError as error:  # whoever reads the file says what is wrong with it
        logger.debug("%s: %s", path, error)
        return None
    # Rows of identifiers need no translation; whoever reads the schema of a row set reads them.
    inputs = [item for item in inputs if item.kind not in (COLUMNS, ROWS)]
    source = FormatSource(inputs, path.name, str(path), cache_dir=cache_dir)
    sets = source.row_sets()
    if len(sets) > 1:
        raise InputError(
            f"{len(sets)} row sets where one is expected", where=str(path), cure="Name the file of one row set"
        )
    return source if sets else None


def is_collection(opened: LocalSource | HubSource) -> bool:
    """Whether queries and a corpus are there under their names, with columns that can be read."""
    for configs, names in (
        (schema.CORPUS_CONFIGS, schema.DOCUMENT_ID_NAMES),
        (schema.QUERIES_CONFIGS, schema.QUERY_ID_NAMES),
    ):
        found = next((name for name in configs if name in opened.configs()), None)
        if found is None:
            return False
        # A file of tab-separated values without a header is none of ours.
        if isinstance(opened, LocalSource) and opened.place(found).removesuffix(".gz").endswith(".tsv"):
            if not set(opened.columns(found)) & set(names):
                return False
    return True


def _open_hub(repo: str, revision: str | None, cache_dir, *, allow_pickle: bool) -> Source:
    try:
        hub: HubSource | None = HubSource(repo, revision)
    except LoadingScriptError as error:
        hub, refusal = None, error
    if hub is not None and (is_collection(hub) or not _has_foreign_config(hub)):
        return hub
    commit = hub.revision if hub else resolve_revision(repo, revision)
    try:
        folder = fetch_data_files(repo, commit, (*DATA_FILES, *PICKLES) if allow_pickle else DATA_FILES)
    except InputError as error:  # what was found before says more
        logger.debug("%s: %s", repo, error)
        folder = None
    found: Source | None = None
    if folder is not None:
        local = LocalSource(folder, cache_dir)
        found = local if is_collection(local) else _scanned(folder, local, cache_dir, allow_pickle)
    if found is None:
        if hub is not None:
            return hub
        raise refusal
    found.name, found.where, found.revision = repo.split("/")[-1], repo, commit
    if isinstance(found, FormatSource):
        found.inputs = [replace(one, repository=(repo, commit)) for one in found.inputs]
    logger.info("%s is read through its data files: %s", repo, found.looked_for())
    return found


def _has_foreign_config(hub: HubSource) -> bool:
    """Whether the repository is one config of rows in a format that has to be read from its files."""
    if hub.configs() != ["default"]:
        return False
    from datasets.exceptions import DatasetsError

    try:
        columns = hub.columns("default")
    except (InputError, DatasetsError) as error:  # columns that change from part to part, for example
        logger.debug("%s: %s", hub.where, error)
        return True
    return by_columns(dict.fromkeys(columns, {}), hub.name) in ("tevatron", "hard_negatives", ROWS)


def _scanned(folder: Path, local: LocalSource, cache_dir, allow_pickle: bool = False) -> FormatSource | None:
    found = list(scan(folder, allow_pickle))
    inputs = [item for item in found if item.kind != COLUMNS]
    if not inputs:
        return None
    for path in sorted(folder.iterdir()):
        if is_pickle(path) and not allow_pickle:
            logger.warning("%s: a pickle, which is passed over; --allow_pickle true reads scores and negatives", path)
    if len(inputs) < len(found):
        left = ", ".join(item.path.name for item in found if item not in inputs)
        logger.warning("%s: not read beside the others, because its rows hold texts: %s", folder, left)
    return FormatSource(inputs, local.name, str(folder), cache_dir=cache_dir, allow_pickle=allow_pickle)


def _stem(inputs: Sequence[Input]) -> str:
    """What a collection of these files is called where nobody has named it."""
    first = inputs[0]
    if first.repository is not None:
        return first.repository[0].split("/")[-1]
    place = first.path.parent if len(inputs) > 1 else first.path
    return place.absolute().name.split(".")[0]


def _places(inputs: Sequence[Input]) -> str:
    """Where the files are from: repositories by their names, files by the folder that they have in common."""
    repositories = dict.fromkeys(item.repository[0] for item in inputs if item.repository is not None)
    files = [item.path for item in inputs if item.repository is None]
    if len(files) > 1:
        files = [Path(os.path.commonpath([path.absolute() for path in files]))]
    return ", ".join([*repositories, *map(str, files)])


def _spec(spec: str) -> tuple[str | None, str | None, str]:
    match = None if Path(spec).exists() else _SPEC.fullmatch(spec)
    return (None, None, spec) if match is None else match.groups()


def _inputs(text, role, name, revision, allow_pickle: bool, corpus_columns) -> list[Input]:
    path = Path(text)
    if not path.exists():
        repo, at = split_revision(text)
        if not is_hub_id(repo):
            raise InputError("no such file or folder", where=text, cure="Check the path")
        commit = resolve_revision(repo, at or revision)
        path = fetch_data_files(repo, commit, (*DATA_FILES, "*.parquet", *(PICKLES if allow_pickle else ())))
        if path is None:
            raise InputError("the repository has no data files that are read", where=text, cure=_cure())
        found = _inputs(str(path), role, name, None, allow_pickle, corpus_columns)
        return [replace(one, repository=(repo, commit)) for one in found]
    if path.is_dir():
        files = [item.path for item in scan(path, allow_pickle)]
        if not files:
            raise InputError("no format is recognised among its files", where=text, cure=_cure())
        return [one for file in files for one in _inputs(str(file), role, name, None, allow_pickle, corpus_columns)]
    if is_pickle(path) and not allow_pickle:
        raise refuse_pickle(path)
    if is_pickle(path):
        role = None  # whether scores or negatives, its first entry says
    found = detect(path, allow_pickle) if role is None else named(path, role)
    if found is None:
        raise InputError("it does not show what it is", where=str(path), cure=_cure())
    return [named(path, found.kind, name or None, corpus_columns if found.kind == CORPUS else None)]


def _cure() -> str:
    return f"Say it, for example --input corpus=FILE queries=FILE; known are: {', '.join(ROLES)}"
