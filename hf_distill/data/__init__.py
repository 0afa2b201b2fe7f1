"""From the Hub or from files to batches: collections, row sets, sampling, collators."""

from __future__ import annotations

from ..lazy import attach


__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "tables": ["Corpus", "DEFAULT_TEMPLATE", "Queries", "TextTable", "render_passage"],
        "qrels": ["PositiveIndex", "Qrels"],
        "run": ["Run", "load_trec", "load_trec_qrels", "write_trec_qrels"],
        "collection": ["Collection", "load_collection", "open_row_set"],
        "export": ["add_row_set", "save_collection"],
        "rows": ["RowSet"],
        "streaming": ["StreamSampler", "StreamedRows", "StreamedTrainingRows"],
        "columns": ["rows_from_columns"],
        "negatives": ["EpochSampler", "Example", "TrainingRows"],
        "collators": ["RetrievalCollator", "token_batch"],
        "demo": ["build_demo_collection"],
    },
)
