"""Measures of a ranking, computed by trec_eval through pytrec_eval."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from .ranking_measures import trec_measures
from .ranking_measures.trec_measures import DEFAULT_MEASURES


@dataclass(frozen=True)
class Result:
    """The measures of one run.

    Args:
        means: Mean of each measure over all queries with a relevant document, and `n_queries`, their number.
        per_query: query id -> measure -> value, for exactly these queries.
    """

    means: dict[str, float]
    per_query: dict[str, dict[str, float]]


def evaluate_run(
    qrels: Mapping[str, Mapping[str, int]],
    run: Mapping[str, Mapping[str, float]],
    measures: Sequence[str] = DEFAULT_MEASURES,
    *,
    relevance_threshold: int = 1,
) -> Result:
    """Measures a run; what the measures mean, and the arguments, are those of [`measure_run`].

    The mean runs over *all* queries that have a relevant document; a query without results counts 0.

    Raises:
        InputError: For an unknown measure, a threshold below 1, a score that is not a number, or judgements without
            any relevant document.
    """
    with _input_errors():
        per_query = trec_measures.measure_run(qrels, run, measures, relevance_threshold)
    return Result(trec_measures.mean_measures(per_query), per_query)


def parse_measure(measure: str) -> tuple[str, int | None]:
    """Name and cut-off of a measure: `"nDCG@10"` is `("nDCG", 10)`, `"AP"` is `("AP", None)`.

    Raises:
        InputError: If there is no such measure, or it lacks its cut-off.
    """
    with _input_errors():
        return trec_measures.parse_measure(measure)


def metric_folder() -> Path:
    """The folder for `evaluate.load`; uploaded as it is (`repo_type="space"`), it is a metric on the Hub."""
    return Path(trec_measures.__file__).parent


@contextmanager
def _input_errors() -> Iterator[None]:
    # The definitions must not import this package, see there.
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from None
