"""Offline work on whole collections, sharded and resumable: encode, index, search, mine, score."""

from __future__ import annotations

from ..lazy import attach


__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "shards": ["ShardedJob"],
        "store": ["EmbeddingStore"],
        "inference": ["InferenceModel", "choose_dtype"],
        "encode": ["encode_table", "encode_texts"],
        "index": ["Index", "empty_index"],
        "sparse_store": ["SparseStore"],
        "inverted": ["InvertedIndex"],
        "sparse_export": ["export_anserini", "export_ciff"],
        "searching": ["Searcher", "search"],
        "bm25": ["bm25_search"],
        "mining": ["MiningOptions", "mine"],
        "teleport": ["mine_episode"],
        "score": ["rerank", "score_from_run", "score_rows"],
        "layer_scores": ["score_layers"],
        "estimate": ["estimate_seconds"],
    },
)
