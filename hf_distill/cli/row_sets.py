"""Row sets as the verbs name, mine and write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..console import get_logger, is_main_process
from ..data import RowSet, Run, StreamedRows, open_row_set
from ..errors import InputError
from ..provenance import note_source
from .options import PoolOptions, RowOptions


if TYPE_CHECKING:
    from ..models.base import RetrievalModel
    from ..retrieval import MiningOptions
    from .steps import Data

logger = get_logger(__name__)

# A row set on the Hub, as an option names it: user/repository, and perhaps :name.
HUB_ROWS = re.compile(r"^[\w.\-]+/[\w.\-]+(:[^:/]+)?$")


def named_rows(data: Data, name: str, revision: str | None = None, streaming: bool = False) -> RowSet | StreamedRows:
    """A row set by its name in the collection, its folder or file, or its Hub id."""
    collection = data.collection
    if name in collection.row_sets:
        rows = collection.stream(name) if streaming else collection.rows(name)
        note_source("rows", name, lambda: {"fingerprint": rows.fingerprint})
        return rows
    if not Path(name).exists() and not HUB_ROWS.match(name):
        raise InputError(
            f"there is no row set {name!r}",
            where="--rows",
            cure=f"Give a folder, a Hub id such as user/rows, or one of: "
            f"{', '.join(collection.row_sets) or '(the collection has none)'}; hf-distill mine makes one",
        )
    source, _, config = (name, "", "") if Path(name).exists() else name.partition(":")
    opened = open_row_set(source, config or None, revision=revision, cache_dir=data.cache_dir)
    kind = StreamedRows if streaming else RowSet
    rows = kind.from_source(*opened, collection.queries, collection.corpus, cache_dir=data.cache_dir)
    note_source("rows", name, lambda: {"fingerprint": rows.fingerprint}, opened[0].revision)
    return rows


def wanted_rows(data: Data, options: RowOptions, seed: int) -> RowSet | StreamedRows:
    """The row set that was named, opened once; a sample of it where that was asked for."""
    key = (options.rows, options.rows_revision, options.streaming)
    if key not in data.opened_rows:
        data.opened_rows[key] = named_rows(data, *key)
    rows = data.opened_rows[key]
    return rows if options.streaming else sample_rows(rows, options.max_queries, seed)


def check_streaming(options: RowOptions) -> None:
    """Raises [`InputError`] for wishes that streamed rows cannot meet."""
    if options.streaming and options.rows is None:
        raise InputError(
            "rows are streamed from a row set, and none is named",
            where="--streaming",
            cure="Name one with --rows, or leave --streaming out: the rows are then mined",
        )
    if options.streaming and options.max_queries is not None:
        raise InputError(
            "no sample can be drawn from rows that are streamed",
            where="--max_queries",
            cure="Limit the training with --max_steps, or leave --streaming out",
        )


def rows_fingerprint(data: Data, options: RowOptions) -> str | None:
    """Identifies the content of the row set that was named; None where rows are mined from the data."""
    return None if options.rows is None else wanted_rows(data, replace(options, max_queries=None), 0).fingerprint


def parse_window(text: str | None, depth: int) -> tuple[int, int]:
    """`"1,200"` as first and last rank; None is everything that is retrieved.

    Raises:
        InputError: If it is anything else.
    """
    if text is None:
        return 1, depth
    try:
        first, last = (int(part) for part in text.split(","))
    except ValueError:
        first = last = 0
    if not 1 <= first <= last:
        raise InputError(f"{text!r} is not a window of ranks", where="--mine_window", cure="Write for example '1,200'")
    return first, last


def sample_rows(rows: RowSet, limit: int | None, seed: int) -> RowSet:
    """At most `limit` rows, a seeded sample in the order of the rows."""
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(np.sort(np.random.default_rng(seed).choice(len(rows), limit, replace=False)))


def mining_options(options: PoolOptions, seed: int, **more: Any) -> MiningOptions:
    """The person's wishes about mining; `more` are further fields."""
    from ..retrieval import MiningOptions

    return MiningOptions(
        depth=options.mine_depth,
        window=parse_window(options.mine_window, options.mine_depth),
        num_negatives=options.mine_negatives,
        margin=options.mine_margin,
        relative_margin=options.mine_relative_margin,
        sampling=options.mine_sampling,
        seed=seed,
        **more,
    )


def sampled_queries(data: Data, limit: int | None, seed: int) -> np.ndarray | None:
    """Positions of at most `limit` training queries, a seeded sample; None for all."""
    if limit is None:
        return None
    queries = data.collection.split(data.train).query_positions()
    if limit >= len(queries):
        return queries
    return np.sort(np.random.default_rng(seed).choice(queries, limit, replace=False))


def mined_rows(
    retriever: str | RetrievalModel | Run,
    data: Data,
    options: PoolOptions,
    settings: Mapping[str, Any],
    *,
    index: str = "Flat",
    seed: int = 42,
    include_unlabelled: bool = False,
    **more: Any,
) -> RowSet:
    """Mines training rows as `options` say.

    Args:
        retriever: `"bm25"`, a bi-encoder, or a run.
        data: The opened collection.
        options: The person's wishes.
        settings: Keyword arguments of encoding.
        index: `"Flat"` or a FAISS factory string.
        seed: Of all samples.
        include_unlabelled: Also make rows for queries without a positive.
        more: Further arguments of [`mine`].
    """
    from ..retrieval import mine
    from ..retrieval.searching import check_factory

    if not isinstance(retriever, (str, Run)):
        check_factory(retriever, index)
    queries = sampled_queries(data, options.max_queries, seed)
    return mine(
        retriever,
        data.collection,
        data.train,
        options=mining_options(options, seed, include_unlabelled=include_unlabelled),
        query_positions=queries,
        factory=index,
        **settings,
        **more,
    )


def row_folder(data: Data, output_dir: str | None, name: str) -> Path:
    """Where a row set goes: `output_dir`, else into the collection's own folder."""
    if output_dir is not None:
        return Path(output_dir)
    source = Path(data.collection.source)
    if (source / "README.md").is_file() and (source / "corpus").is_dir():
        return source / Path(name).name
    raise InputError(
        f"{data.collection.source} is no folder in this project's layout, so rows cannot be added to it",
        where="--output_dir",
        cure="Say where the rows should go",
    )


def save_rows(rows: RowSet, data: Data, folder: Path, name: str) -> None:
    """Writes a row set with its manifest, and tells the collection's card about it if it lies in the collection."""
    from ..data import add_row_set
    from ..hub.manifest import write_manifest

    if not is_main_process():
        return
    if folder.parent == Path(data.collection.source):
        add_row_set(folder.parent, folder.name, rows)
    else:
        rows.save(folder)
    facts = {"number": len(rows), "fingerprint": rows.fingerprint, "provenance": rows.metadata}
    write_manifest(folder, data={**data.facts(), "rows": facts})


def warn_of_scores(rows: RowSet, column: str) -> None:
    """Says when a teacher's scores look flat or saturated."""
    import torch

    from ..losses import check_teacher_scores

    width = int(rows.lengths.max())
    sample = np.linspace(0, len(rows) - 1, min(len(rows), 1000)).astype(int)
    scores, keep = torch.zeros(len(sample), width), torch.zeros(len(sample), width, dtype=torch.bool)
    for line, row in enumerate(sample):
        values = torch.from_numpy(np.array(rows.values_at(column, int(row)), np.float32))
        scores[line, : len(values)], keep[line, : len(values)] = values, True
    for warning in check_teacher_scores(scores, keep):
        logger.warning("%s: %s", column, warning)
