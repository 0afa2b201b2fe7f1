"""Distil strong but slow retrievers and rerankers into small, fast ones."""

from __future__ import annotations

from .lazy import attach


__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "data": ["Collection", "Corpus", "Queries", "Qrels", "RowSet", "Run", "load_collection", "save_collection"],
        "errors": ["HubError", "InputError"],
        "evaluation": ["RetrievalEvaluation", "evaluate_run"],
        "models": ["CrossEncoderRanker", "DenseRetriever", "load_model", "student_from"],
        "retrieval": ["bm25_search", "encode_table", "mine", "score_rows", "search"],
        "teachers": ["CachedEmbeddings", "CachedScores", "LiveTeacher"],
        "trainers": ["DistillTrainer", "DistillTrainingArguments", "RetrievalTrainer", "RetrievalTrainingArguments"],
    },
)
