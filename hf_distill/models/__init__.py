"""The models that are trained and served, and how they are read and written."""

from __future__ import annotations

from ..lazy import attach


__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "base": ["RetrievalModel", "use_attention"],
        "bi_encoder": ["RetrieverOutput"],
        "cross_encoder": ["CrossEncoderConfig", "CrossEncoderRanker"],
        "dense": ["DenseRetriever", "DenseRetrieverConfig"],
        "dropout": ["set_dropout"],
        "lexical": ["LexicalRetriever", "LexicalRetrieverConfig"],
        "multi_vector": ["MultiVectorConfig", "MultiVectorOutput", "MultiVectorRetriever"],
        "lexmae": ["LexMAEConfig", "LexMAEForPreTraining"],
        "native": ["RetrievalConfig"],
        "processing": ["DEFAULT_TEMPLATE", "TextProcessor"],
        "source": ["ModelSource", "find_model"],
        "student": ["layer_positions", "load_model", "reduce_layers", "student_from"],
    },
)
