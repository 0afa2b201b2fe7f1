"""Collections: queries, corpus and judgements from a folder or the Hub, checked before any long work."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..console import get_logger
from ..errors import InputError
from ..files import cache_folder, fingerprint, read_json, write_json
from ..provenance import note_source
from . import schema
from .arrow import build_once
from .qrels import Qrels
from .readers import Block
from .row_columns import is_row_block
from .run import mark_doubled
from .sources import HubSource, LocalSource, open_source
from .tables import CACHE_VERSION, Corpus, Queries, TextTable
from .values import find_column, id_array, integer_array


if TYPE_CHECKING:
    from .formats.opening import Source
    from .rows import RowSet
    from .streaming import StreamedRows

logger = get_logger(__name__)

RESERVED_CONFIGS = (*schema.CORPUS_CONFIGS, *schema.QUERIES_CONFIGS, schema.QRELS)


@dataclass
class Collection:
    """A search task.

    Attributes:
        name: Its short name; results stand under `<name>/<split>` in `metrics.json`.
        queries: All queries, of every split.
        corpus: All passages.
        qrels: Judgements by split; empty for a collection of unlabelled queries.
        source: The folder or the Hub id that it was read from.
        revision: The commit on the Hub.
        row_sets: Names of the row sets that lie there too.
    """

    name: str
    queries: Queries
    corpus: Corpus
    qrels: dict[str, Qrels]
    source: str = "memory"
    revision: str | None = None
    row_sets: tuple[str, ...] = ()
    _opened: Any = field(default=None, repr=False)
    _cache_dir: str | os.PathLike | None = field(default=None, repr=False)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of queries, corpus and judgements."""
        judgements = {split: qrels.fingerprint for split, qrels in self.qrels.items()}
        return fingerprint([self.queries.fingerprint, self.corpus.fingerprint, judgements])

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprints of the parts, by what they are called in messages."""
        judgements = {f"judgements of {split}": qrels.fingerprint for split, qrels in self.qrels.items()}
        return {"queries": self.queries.fingerprint, "corpus": self.corpus.fingerprint, **judgements}

    def split(self, name: str) -> Qrels:
        """The judgements of split `name`; `InputError` lists the splits when there is no such."""
        if name not in self.qrels:
            raise InputError(
                f"no split {name!r}", where=self.source, cure=f"Its splits are: {', '.join(self.qrels) or 'none'}"
            )
        return self.qrels[name]

    def rows(self, name: str) -> RowSet:
        """The row set `name` of the same folder or repository."""
        from .rows import RowSet

        return RowSet.from_source(self._source_of(name), name, self.queries, self.corpus, cache_dir=self._cache_dir)

    def stream(self, name: str) -> StreamedRows:
        """The same row set, read while it is used."""
        from .streaming import StreamedRows

        opened = self._source_of(name)
        return StreamedRows.from_source(opened, name, self.queries, self.corpus, cache_dir=self._cache_dir)

    def _source_of(self, name: str) -> Source:
        if self._opened is None or name not in self._opened.configs() or name in RESERVED_CONFIGS:
            raise InputError(
                f"no row set {name!r}",
                where=self.source,
                cure=f"Its row sets are: {', '.join(self.row_sets) or 'none'}",
            )
        return self._opened


def open_row_set(
    source: str | os.PathLike,
    config: str | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> tuple[Source, str]:
    """Where a row set lies, and its name there.

    Args:
        source: The folder of a row set, a file of rows (also of a foreign format), or a repository on the Hub.
        config: The row set's name, where `source` holds several.
        revision: Branch, tag or commit on the Hub.
        cache_dir: Instead of the default cache folder.

    Raises:
        InputError: No such source, no row set in it, or several.
    """
    path = Path(source)
    if config is None and path.exists():
        path = path.resolve() if path.name in ("", "..") else path
        opened: Source = LocalSource(path.parent, cache_dir, only=path.name)
        if not any(_is_row_set(opened, name) for name in opened.configs()):
            from .formats.opening import open_rows

            foreign = open_rows(path, cache_dir)
            if foreign is not None:
                return foreign, foreign.row_sets()[0]
    else:
        opened = open_source(source, revision, cache_dir)
    there = [name for name in opened.configs() if name not in RESERVED_CONFIGS]
    names = [name for name in there if config in (None, name)]
    if len(names) != 1:
        problem = f"no row set {config!r}" if config else "several row sets" if names else "no file to read"
        cure = f"Name one of: {', '.join(there)}" if there else "A row set lies in .parquet or .jsonl files"
        raise InputError(problem, where=str(path) if path.exists() else opened.where, cure=cure)
    return opened, names[0]


def load_collection(
    source: str | os.PathLike,
    *,
    name: str | None = None,
    revision: str | None = None,
    splits: Sequence[str] | None = None,
    cache_dir: str | os.PathLike | None = None,
    require_positives: bool = False,
    unknown_ids: Literal["error", "drop"] = "error",
) -> Collection:
    """Reads a collection from a folder or the Hub.

    Read are our own layout (configs `queries`, `corpus`, `qrels`, row sets; as folders of parquet, JSON lines, TSV or
    CSV, or as a Hub repository), BEIR folders (`corpus.jsonl`, `queries.jsonl`, each also `.gz`, `qrels/<split>.tsv`),
    and on the Hub `mteb/<name>` (configs `corpus`, `queries`, `default` or `qrels`) and `BeIR/<name>` with its
    judgements in `BeIR/<name>-qrels`. Folders of MS MARCO's files, Tevatron's JSON lines and lists of negatives are
    known by their files (docs/formats.md), also in repositories that are loading scripts. Everything is parsed once
    into memory-mapped Arrow under the cache folder, keyed by the content of the files, and checked on the way.

    Args:
        source: A folder, else a Hub id.
        name: Instead of the last part of `source`.
        revision: Branch, tag or commit on the Hub.
        splits: The splits of judgements to read; all by default.
        cache_dir: Instead of the default cache folder.
        require_positives: Whether queries without any relevant document are an error; by default they are counted in
            a warning, because unlabelled queries can train on teacher scores.
        unknown_ids: What to do with judgements of queries or documents that are not there: `"error"`, or `"drop"`
            them with a warning.

    Raises:
        InputError: Anything wrong with the files; the message names file, line or row, field, and the cure.
    """
    if unknown_ids not in ("error", "drop"):
        raise InputError(f"{unknown_ids!r} is not a choice", where="unknown_ids", cure="Use 'error' or 'drop'")
    from .formats.opening import open_collection

    opened = open_collection(source, revision, cache_dir)
    corpus_config = _config(opened, schema.CORPUS_CONFIGS)
    queries_config = _config(opened, schema.QUERIES_CONFIGS)
    corpus = _table(Corpus, opened, corpus_config, cache_dir)
    queries = _table(Queries, opened, queries_config, cache_dir)
    judged, judged_config = qrels_config(opened)
    qrels = {}
    if judged_config is not None:
        available = judged.splits(judged_config)
        for split in available if splits is None else splits:
            if split not in available:
                raise InputError(
                    f"no split {split!r}",
                    where=judged.place(judged_config),
                    cure=f"Its splits are: {', '.join(available)}",
                )
            qrels[split] = _qrels(judged, judged_config, split, queries, corpus, unknown_ids, cache_dir)
    elif splits:
        raise InputError("no judgements", where=opened.where, cure="Add qrels/<split>.tsv, or leave splits out")
    _check_positives(queries, qrels, all_splits=splits is None, require=require_positives, where=opened.where)
    used = {corpus_config, queries_config, judged_config if judged is opened else None, *RESERVED_CONFIGS}
    collection = Collection(
        name=name or opened.name,
        queries=queries,
        corpus=corpus,
        qrels=qrels,
        source=opened.where,
        revision=opened.revision,
        row_sets=tuple(config for config in opened.configs() if config not in used and _is_row_set(opened, config)),
        _opened=opened,
        _cache_dir=cache_dir,
    )
    note_source("data", opened.where, lambda: {"fingerprints": collection.fingerprints}, opened.revision)
    return collection


def _config(opened: Source, names: Sequence[str]) -> str:
    for name in names:
        if name in opened.configs():
            return name
    raise InputError(
        f"no {names[0]} ({opened.looked_for()})",
        where=opened.where,
        cure=(
            "A BEIR folder has corpus.jsonl, queries.jsonl (each may end in .gz) and qrels/<split>.tsv; our own "
            "layout has the configs corpus, queries and qrels, as folders of parquet or named in README.md; on the "
            "Hub the layouts of mteb/<name> and BeIR/<name> are read too"
        ),
    )


def _table(kind: type[TextTable], opened: Source, config: str, cache_dir) -> Any:
    splits = opened.splits(config)

    def blocks() -> Iterator[Block]:
        for split in splits:
            yield from opened.blocks(config, split)

    key = [opened.key(config, split) for split in splits]
    return kind.from_blocks(blocks(), key, where=opened.place(config), cache_dir=cache_dir)


def _is_row_set(opened: Source, config: str) -> bool:
    if not isinstance(opened, LocalSource):
        return True  # looking inside would download it or read it; `Collection.rows` does
    try:
        return is_row_block(opened.columns(config))
    except InputError:  # some other file that lies there; if it is meant as a row set, `Collection.rows` tells
        return False


def qrels_config(opened: Source) -> tuple[Source, str | None]:
    """Where the judgements of a collection lie: their source, which may be another repository, and config there."""
    for name in schema.QRELS_CONFIGS:
        if name in opened.configs() and (name == schema.QRELS or judges(opened.columns(name))):
            return opened, name
    if isinstance(opened, HubSource) and opened.repo.lower().startswith("beir/"):
        judged = HubSource(f"{opened.repo}-qrels", None)
        for name in judged.configs():
            if judges(judged.columns(name)):
                return judged, name
    return opened, None


def judges(columns: Sequence[str]) -> bool:
    """Whether columns of these names are judgements."""
    wanted = (schema.QRELS_QUERY_NAMES, schema.QRELS_DOCUMENT_NAMES, schema.RELEVANCE_NAMES)
    return all(any(name in columns for name in names) for names in wanted)


def _qrels(opened, config: str, split: str, queries: Queries, corpus: Corpus, unknown_ids: str, cache_dir) -> Qrels:
    where = opened.place(config, split)
    key = [CACHE_VERSION, opened.key(config, split), queries.fingerprint, corpus.fingerprint, unknown_ids]
    folder = cache_folder(cache_dir) / "data" / f"qrels-{fingerprint(key)}"
    names = ("query", "document", "relevance")

    def build(temporary: Path) -> None:
        arrays, info = _read_qrels(opened.blocks(config, split), queries, corpus, where, drop=unknown_ids == "drop")
        for array_name, array in zip(names, arrays):
            np.save(temporary / f"{array_name}.npy", array)
        write_json(temporary / "info.json", info)

    build_once(folder, build)
    for count, problem in (
        ("dropped", "judgements of unknown queries or documents were dropped"),
        ("doubled", "judgements are given twice; the last one counts"),
    ):
        number = read_json(folder / "info.json")[count]
        if number:
            logger.warning("%s: %d %s", where, number, problem)
    return Qrels(*(np.load(folder / f"{array_name}.npy") for array_name in names))


def _read_qrels(blocks: Iterator[Block], queries: Queries, corpus: Corpus, where: str, *, drop: bool):
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    dropped = 0
    for block in blocks:
        query_name = find_column(block, schema.QRELS_QUERY_NAMES)
        document_name = find_column(block, schema.QRELS_DOCUMENT_NAMES)
        grade_name = find_column(block, schema.RELEVANCE_NAMES)
        if not len(block):
            continue
        grades = integer_array(block, grade_name)
        sides = []
        for table, column in ((queries, query_name), (corpus, document_name)):
            ids = id_array(block, column)
            positions = table.positions(ids)
            if not drop and (positions < 0).any():
                index = int(np.argmax(positions < 0))
                raise InputError(
                    f"{ids[index].as_py()!r} is not among the {len(table)} {table.noun} of {table.where}",
                    where=f"{block.place(index)}, field {column!r}",
                    cure="Add it there or remove the judgement; load_collection(unknown_ids='drop') and "
                    "hf-distill convert --unknown_ids drop leave such judgements out",
                )
            sides.append(positions)
        keep = (sides[0] >= 0) & (sides[1] >= 0)
        dropped += int((~keep).sum())
        parts.append((sides[0][keep], sides[1][keep], grades[keep]))
    arrays = [np.concatenate(columns) for columns in zip(*parts)] if parts else [np.empty(0, np.int64)] * 3
    if not len(arrays[0]):
        raise InputError(
            "no judgements in it" + (f" ({dropped} of unknown queries or documents were dropped)" if dropped else ""),
            where=where,
            cure="Add judgements (query-id, corpus-id, score), or remove the file",
        )
    earlier, _ = mark_doubled(arrays[0], arrays[1])
    keep = np.ones(len(arrays[0]), dtype=bool)
    keep[earlier] = False
    return [array[keep] for array in arrays], {"dropped": dropped, "doubled": len(earlier)}


def _check_positives(
    queries: Queries, qrels: Mapping[str, Qrels], *, all_splits: bool, require: bool, where: str
) -> None:
    problems = []
    for split, judged in qrels.items():
        bare = np.setdiff1d(judged.query, judged.query_positions())
        if len(bare):
            problems.append((f"split {split!r}: {len(bare)} judged queries have no relevant document", bare))
    if all_splits:
        judged = [part.query for part in qrels.values()]
        bare = np.setdiff1d(np.arange(len(queries)), np.concatenate(judged) if judged else [])
        if len(bare):
            problems.append((f"{len(bare)} of {len(queries)} queries are in no split of the judgements", bare))
    for problem, bare in problems:
        examples = ", ".join(map(repr, queries.ids_at(bare[:3])))
        if require:
            raise InputError(
                f"{problem}, for example {examples}",
                where=where,
                cure="Judge a relevant document for each, remove the queries, or leave require_positives off",
            )
        logger.warning("%s: %s, for example %s; they train only on teacher scores", where, problem, examples)
