"""Measures of ranked retrieval (nDCG, RR, AP, R, P, Success at any cut-off) as a metric of `evaluate`."""

import datasets
import evaluate

from .trec_measures import DEFAULT_MEASURES, mean_measures, measure_run


# `evaluate` reads the imports above line by line, with a regular expression: one name per line, and the file next to
# this one as a relative import.

_DESCRIPTION = """\
Measures of ranked retrieval, computed by trec_eval through pytrec_eval: nDCG, reciprocal rank (RR), average precision
(AP), recall (R), precision (P) and Success, at any cut-off. Means run over all queries that have a relevant document;
a query without results counts 0.
"""

_INPUTS = """\
Every item is one query. A query may also come in several items, for example from several processes; then its
documents are put together.

Args:
    predictions: `{"query_id": str, "document_ids": [str], "scores": [float]}`; the order of the documents does not
        matter, their scores do. Empty lists where nothing was found.
    references: `{"query_id": str, "document_ids": [str], "relevances": [int]}`. Items are matched by `query_id`, not
        by place; there are as many references as predictions (with empty lists where there is nothing to say).
    measures: Names such as "nDCG@10", "RR@10", "AP", "R@100" (the default is nDCG@10, RR@10 and R@100).
    relevance_threshold: The lowest grade that is relevant. Default: 1.
    per_query: Also return the values of every query.

Returns:
    The mean of each measure under its name, and `n_queries`. With `per_query` also `per_query`, which holds
    `query_id` and one list for each measure.
"""

_CITATION = """\
@inproceedings{vangysel2018pytreceval,
  title={Pytrec\\_eval: An Extremely Fast Python Interface to trec\\_eval},
  author={Van Gysel, Christophe and de Rijke, Maarten},
  booktitle={SIGIR},
  year={2018}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class RankingMeasures(evaluate.Metric):
    """nDCG, RR, AP, R, P and Success at any cut-off."""

    def _info(self):
        text, number = datasets.Value("string"), datasets.Value
        features = {
            "predictions": {"query_id": text, "document_ids": [text], "scores": [number("float64")]},
            "references": {"query_id": text, "document_ids": [text], "relevances": [number("int64")]},
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
            reference_urls=["https://github.com/usnistgov/trec_eval"],
        )

    def _compute(self, predictions, references, measures=DEFAULT_MEASURES, relevance_threshold=1, per_query=False):
        run = _by_query(predictions, "scores", "predictions")
        qrels = _by_query(references, "relevances", "references")
        values = measure_run(qrels, run, measures, relevance_threshold)
        result = mean_measures(values)
        if per_query:
            columns = {measure: [row[measure] for row in values.values()] for measure in measures}
            result["per_query"] = {"query_id": list(values), **columns}
        return result


def _by_query(items, column, what):
    """query id -> document id -> value; a document may come twice only with the same value."""
    table = {}
    for item in items:
        query, documents, values = item["query_id"], item["document_ids"], item[column]
        if len(documents) != len(values):
            raise ValueError(f"{what}, query {query!r}: {len(values)} {column} for {len(documents)} document_ids")
        row = table.setdefault(query, {})
        for document, value in zip(documents, values):
            if row.setdefault(document, value) != value:
                raise ValueError(f"{what}, query {query!r}: document {document!r} has two different {column}")
    return table
