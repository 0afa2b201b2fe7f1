"""How long work will take, from a short measurement."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from ..models.base import RetrievalModel
from .encode import as_inference_model, encode_job
from .inference import InferenceModel
from .multi_vector import encode_tokens
from .searching import HasTexts


_SAMPLE = 48


def estimate_seconds(
    model: RetrievalModel | InferenceModel,
    collection: HasTexts,
    count: int,
    *,
    pairs: bool = False,
    dtype: str = "auto",
    token_budget: int | None = None,
    storage: str = "float32",
    device: Any = None,
    cache_dir: str | os.PathLike | None = None,
    anew: bool = False,
) -> float:
    """Seconds to encode `count` passages, or to score `count` pairs, with all of accelerate's processes.

    A fixed sample of the collection is tokenised and run once, after a short warm-up.

    Args:
        model: The model.
        collection: Anything with `queries` and `corpus`.
        count: Number of passages or pairs.
        pairs: Whether pairs are scored; a dense model scores them by its embeddings of passages.
        dtype: As in `encode_table`.
        token_budget: As in `encode_table`.
        storage: As in `encode_table`.
        device: As in `encode_table`.
        cache_dir: Where finished work may lie: encoding a corpus that is in the cache takes no time.
        anew: It takes its time all the same, as the batches of a training do.
    """
    from accelerate import PartialState

    if count < 1:
        return 0.0
    inference = as_inference_model(model, dtype=dtype, device=device, token_budget=token_budget)
    ranker = inference.representation == "pair"
    corpus, queries = collection.corpus, collection.queries
    if not ranker:
        job, _ = encode_job(inference, corpus, "passage", storage=storage, cache_dir=cache_dir)
        if not anew and job.is_complete():
            return 0.0
        if pairs:
            count = min(count, len(corpus))
    size = min(_SAMPLE, count)
    # Spread over the collection: texts that stand together are often alike in length.
    documents = np.linspace(0, len(corpus) - 1, size).astype(np.int64)
    texts = corpus.texts(documents, template=inference.processor.template)
    if ranker:
        questions = queries.texts(np.linspace(0, len(queries) - 1, size).astype(np.int64))

    def once(number: int) -> None:
        if ranker:
            inference.score(*inference.processor.pairs(questions[:number], texts[:number]))
        elif inference.representation == "tokens":
            encode_tokens(inference, inference.processor.encode(texts[:number], "passage"), "passage")
        else:
            inference.encode(inference.processor.encode(texts[:number], "passage"), "passage")

    once(min(4, size))
    start = time.perf_counter()
    once(size)
    return (time.perf_counter() - start) / size * count / PartialState().num_processes
