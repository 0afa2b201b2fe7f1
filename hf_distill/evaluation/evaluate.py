"""Everything that is kept about one system on one split."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..console import get_logger, is_main_process
from .measures import DEFAULT_MEASURES, Result, evaluate_run
from .report import update_metrics, write_per_query


if TYPE_CHECKING:
    from ..data.collection import Collection
    from ..data.run import Run


logger = get_logger(__name__)


def run_file(output_dir: str | os.PathLike, name: str, collection: str, split: str) -> Path:
    """Where the TREC run of a system is: `<output_dir>/runs/<name>.<collection>.<split>.trec`."""
    stem = ".".join(re.sub(r"[^\w@+-]+", "_", part) for part in (name, collection, split))
    return Path(output_dir) / "runs" / f"{stem}.trec"


def evaluate_system(
    name: str,
    run: Run,
    collection: Collection,
    split: str,
    output_dir: str | os.PathLike | None = None,
    *,
    measures: Sequence[str] = DEFAULT_MEASURES,
    relevance_threshold: int = 1,
    figures: Mapping[str, Any] | None = None,
) -> Result:
    """Measures a run and adds it to the output folder.

    Written are the run (`runs/<name>.<collection>.<split>.trec`), the measures of each query
    (`per_query/<name>.<collection>.<split>.parquet`) and the means (`metrics.json`, see [`update_metrics`]). With
    several processes only the main one writes.

    Args:
        name: The system, for example `student`.
        run: Its results.
        collection: With the judgements.
        split: The judgements to use.
        output_dir: Where to write; nothing is written without one.
        measures: See [`evaluate_run`].
        relevance_threshold: The lowest relevant grade.
        figures: Further figures for `metrics.json`, such as `parameters` or `passages_per_second`.

    Raises:
        InputError: If the collection has no such split, or as [`evaluate_run`].
    """
    queries, corpus, qrels = collection.queries, collection.corpus, collection.split(split)
    result = evaluate_run(
        qrels.as_dict(queries, corpus),
        run.as_dict(queries, corpus),
        measures,
        relevance_threshold=relevance_threshold,
    )
    labelled = qrels.query_positions(relevance_threshold)
    missing = len(np.setdiff1d(labelled, run.query[(run.documents >= 0).any(1)]))
    if missing:
        logger.warning(
            "%s on %s/%s: %d of %d queries have no results and count 0.",
            name,
            collection.name,
            split,
            missing,
            result.means["n_queries"],
        )
    if output_dir is not None and is_main_process():
        target = run_file(output_dir, name, collection.name, split)
        target.parent.mkdir(parents=True, exist_ok=True)
        run.save(target, queries, corpus, tag=name)
        write_per_query(target.parent.parent / "per_query" / f"{target.stem}.parquet", result)
        update_metrics(
            Path(output_dir) / "metrics.json",
            f"{collection.name}/{split}",
            name,
            {**result.means, **(figures or {})},
        )
    return result
