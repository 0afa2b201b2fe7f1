"""What each measure means, computed by trec_eval through pytrec_eval.

This file stands alone: it is part of the package (`hf_distill.evaluation.measures` wraps it) and of the metric in this
folder, which `evaluate` copies away from the package before it imports it. So the measures are defined once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence


DEFAULT_MEASURES = ("nDCG@10", "RR@10", "R@100")

# Our names (those of ir_measures) -> the measure of trec_eval without and with a cut-off. trec_eval has no reciprocal
# rank with a cut-off; it follows from the whole run's, see `_value`.
_TREC_EVAL = {
    "nDCG": ("ndcg", "ndcg_cut"),
    "RR": ("recip_rank", "recip_rank"),
    "AP": ("map", "map_cut"),
    "R": (None, "recall"),
    "P": (None, "P"),
    "Success": (None, "success"),
}
_ALIASES = {"mrr": "RR", "map": "AP", "recall": "R", "precision": "P", "hit": "Success", "hits": "Success"}
_NAMES = {name.lower(): name for name in _TREC_EVAL} | _ALIASES


def measure_run(
    qrels: Mapping[str, Mapping[str, int]],
    run: Mapping[str, Mapping[str, float]],
    measures: Sequence[str] = DEFAULT_MEASURES,
    relevance_threshold: int = 1,
) -> dict[str, dict[str, float]]:
    """The measures of every query that has a relevant document: query id -> measure -> value.

    A query without results counts 0, and results of other queries are ignored. Results are sorted by score and, where
    scores are equal, by document id, both descending, as trec_eval does; `RR@k` and `AP@k` are those of the first k.

    Args:
        qrels: query id -> document id -> grade.
        run: query id -> document id -> score.
        measures: `nDCG`, `RR` and `AP`, with or without a cut-off such as `nDCG@10`; `R`, `P` and `Success` (a
            relevant document among the first k) with one. `MRR`, `MAP` and `Recall` are understood.
        relevance_threshold: The lowest grade that is relevant (TREC Deep Learning: 2). nDCG uses all positive grades.

    Raises:
        ValueError: For an unknown measure, a threshold below 1, a score that is not a number, or judgements without
            any relevant document.
    """
    try:
        import pytrec_eval
    except ImportError as error:  # `pip install pytrec_eval` would be an old package that has to be compiled
        raise ImportError("pytrec_eval is missing: pip install pytrec-eval-terrier") from error

    parsed = {measure: parse_measure(measure) for measure in measures}
    if relevance_threshold < 1:
        raise ValueError(f"the relevance threshold {relevance_threshold} is below 1; give 1 or more")
    judged = {
        str(query): {str(document): int(grade) for document, grade in documents.items()}
        for query, documents in qrels.items()
        if any(grade >= relevance_threshold for grade in documents.values())
    }
    if not judged:
        raise ValueError(
            f"qrels: no query has a document of grade {relevance_threshold} or more; give judgements with relevant "
            "documents, or lower the relevance threshold"
        )
    scored = {query: _scores(query, run[query]) for query in judged if run.get(query)}
    wanted: dict[str, set[int]] = {}
    for name, k in parsed.values():
        whole, cut = _TREC_EVAL[name]
        wanted.setdefault(whole if k is None else cut, set()).update([] if k is None or whole == cut else [k])
    names = {f"{name}.{','.join(map(str, sorted(cuts)))}" if cuts else name for name, cuts in wanted.items()}
    values = pytrec_eval.RelevanceEvaluator(judged, names, relevance_level=relevance_threshold).evaluate(scored)
    return {query: {measure: _value(values.get(query), *parsed[measure]) for measure in parsed} for query in judged}


def mean_measures(per_query: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means of what [`measure_run`] gives, over all of its queries, and their number as `n_queries`."""
    measures = next(iter(per_query.values()))
    means: dict[str, float] = {
        measure: math.fsum(row[measure] for row in per_query.values()) / len(per_query) for measure in measures
    }
    return {**means, "n_queries": len(per_query)}


def parse_measure(measure: str) -> tuple[str, int | None]:
    """Name and cut-off of a measure: `"nDCG@10"` is `("nDCG", 10)`, `"AP"` is `("AP", None)`.

    Raises:
        ValueError: If there is no such measure, or it lacks its cut-off.
    """
    match = re.fullmatch(r"([A-Za-z]+)(?:@([1-9]\d*))?", measure.strip())
    name = _NAMES.get(match[1].lower()) if match else None
    if match is None or name is None:
        raise ValueError(f"unknown measure {measure!r}; choose among {', '.join(_TREC_EVAL)}, for example nDCG@10")
    if match[2] is None and _TREC_EVAL[name][0] is None:
        raise ValueError(f"the measure {measure!r} lacks a cut-off; write for example {measure.strip()}@100")
    return name, int(match[2]) if match[2] else None


def _scores(query: str, documents: Mapping[str, float]) -> dict[str, float]:
    scores = {str(document): float(score) for document, score in documents.items()}
    for document, score in scores.items():
        if math.isnan(score):
            raise ValueError(f"run, query {query!r}: the score of document {document!r} is not a number")
    return scores


def _value(values: Mapping[str, float] | None, name: str, k: int | None) -> float:
    if values is None:
        return 0.0
    whole, cut = _TREC_EVAL[name]
    if name == "RR":
        reciprocal = values[cut]
        return reciprocal if k is None or (reciprocal > 0 and round(1 / reciprocal) <= k) else 0.0
    return values[str(whole) if k is None else f"{cut}_{k}"]
