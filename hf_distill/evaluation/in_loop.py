"""Retrieval measures during training: small enough to run every few hundred steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.sparse import issparse, vstack

from ..data.collection import Collection
from ..data.run import Run
from ..distributed import rank, world_size
from ..models.base import RetrievalModel
from .measures import evaluate_run


class RetrievalEvaluation:
    """Measures a model on the queries of one split; the call returns `{measure: value}`.

    A retriever searches the corpus, or with `corpus_size` all relevant passages and a seeded sample of the others
    (levels are then higher than on the whole corpus, and only comparable with each other). A ranker re-ranks
    `candidates`.

    Args:
        collection: Queries, passages and judgements.
        split: The judgements to use.
        measures: Names such as `"nDCG@10"`.
        depth: Passages retrieved or re-ranked for a query.
        corpus_size: Passages to search.
        num_queries: A seeded sample of the split's queries.
        candidates: The run to re-rank.
        seed: Of both samples.
        cache_dir: Where scores lie while a ranker is measured, instead of the default cache folder.

    Attributes:
        run: The results of the last call.
    """

    def __init__(
        self,
        collection: Collection,
        split: str,
        *,
        measures: Sequence[str] = ("nDCG@10", "RR@10", "R@100"),
        depth: int = 100,
        corpus_size: int | None = None,
        num_queries: int | None = None,
        candidates: Run | None = None,
        seed: int = 0,
        cache_dir: str | os.PathLike | None = None,
    ):
        self.cache_dir = cache_dir
        self.collection, self.measures, self.depth = collection, tuple(measures), depth
        generator = np.random.default_rng(seed)
        qrels = collection.qrels[split]
        queries = qrels.query_positions()
        if num_queries is not None and num_queries < len(queries):
            queries = np.sort(generator.choice(queries, num_queries, replace=False))
            qrels = qrels.subset(queries)
        self.queries, self.qrels = queries, qrels
        self.documents = np.arange(len(collection.corpus))
        if corpus_size is not None and corpus_size < len(collection.corpus):
            relevant = np.unique(qrels.document)
            others = np.setdiff1d(self.documents, relevant)
            sample = generator.choice(others, max(0, min(len(others), corpus_size - len(relevant))), replace=False)
            self.documents = np.sort(np.concatenate([relevant, sample]))
        self.run: Run | None = None
        self.candidates = None
        if candidates is not None:
            kept = np.isin(candidates.query, self.queries)
            self.candidates = Run(
                candidates.query[kept], candidates.documents[kept, :depth], candidates.scores[kept, :depth]
            )

    def __len__(self) -> int:
        return len(self.queries)

    def __call__(self, model: RetrievalModel) -> dict[str, float]:
        self.run = run = self._rerank(model) if model.representation == "pair" else self._search(model)
        collection = self.collection
        result = evaluate_run(
            self.qrels.as_dict(collection.queries, collection.corpus),
            run.as_dict(collection.queries, collection.corpus),
            self.measures,
        )
        return {name: result.means[name] for name in self.measures}

    def _rerank(self, model: RetrievalModel) -> Run:
        from ..retrieval.score import rerank

        # Nothing is kept: these weights are gone after the next step.
        return rerank(model, self.candidates, self.collection, cache_dir=self.cache_dir, keep=False)

    def _search(self, model: RetrievalModel) -> Run:
        from ..retrieval.searching import build_index

        template = model.config.template
        queries = self._encode(model, self.collection.queries.texts(self.queries), "query")
        passages = self._encode(model, self.collection.corpus.texts(self.documents, template), "passage")
        scores, positions = build_index(passages, model).search(queries, min(self.depth, passages.shape[0]))
        return Run(self.queries, np.where(positions >= 0, self.documents[positions], -1), scores)

    @staticmethod
    def _encode(model: RetrievalModel, texts: list[str], kind: str) -> Any:
        """The vectors of all texts, an array, a sparse matrix or tokens; every process encodes a part."""
        from ..retrieval.encode import encode_texts

        if world_size() == 1:
            return encode_texts(model, texts, kind)
        from accelerate.utils import gather_object

        mine: list[Any] = [(rank(), encode_texts(model, texts[rank() :: world_size()], kind))]
        numbers, parts = zip(*gather_object(mine))
        places = np.concatenate([np.arange(number, len(texts), world_size()) for number in numbers])
        if isinstance(parts[0], np.ndarray):
            stacked = np.concatenate(parts)
        else:
            stacked = vstack(parts, format="csr") if issparse(parts[0]) else type(parts[0]).concatenate(parts)
        return stacked[np.argsort(places)]
