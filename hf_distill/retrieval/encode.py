"""Texts to vectors: a list in memory, or a whole table in resumable shards on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack

from ..console import progress
from ..errors import InputError
from ..files import fingerprint
from ..models.base import RetrievalModel
from ..models.processing import vocabulary_fingerprint
from .inference import InferenceModel
from .multi_vector import Tokens, TokenStore, empty_tokens, encode_tokens, write_tokens
from .shards import ShardedJob, default_shard_rows, write_array
from .sparse_store import SparseStore, write_rows
from .store import STORAGES, EmbeddingStore, VectorStore


if TYPE_CHECKING:
    from ..data import TextTable

# Raised by hand when the same key would give other bytes.
ENCODE_VERSION = 1

# Texts tokenised at once by `encode_texts`.
_BLOCK_TEXTS = 8192


def as_inference_model(model: RetrievalModel | InferenceModel, **settings: Any) -> InferenceModel:
    """`model` itself if it is prepared already, else its copy for inference."""
    return model if isinstance(model, InferenceModel) else InferenceModel(model, **settings)


def encode_texts(
    model: RetrievalModel | InferenceModel,
    texts: Sequence[str],
    kind: str = "passage",
    *,
    dtype: str = "auto",
    token_budget: int | None = None,
    device: str | torch.device | None = None,
    show_progress: bool = False,
) -> np.ndarray | csr_matrix | Tokens:
    """Vectors of texts, in memory.

    Args:
        model: The model; or an [`InferenceModel`] of it, for many small calls.
        texts: Queries or rendered passages, without prompts.
        kind: `"query"` or `"passage"`: which prompt, length and tower.
        dtype: `"auto"`, `"float32"` or `"bfloat16"` arithmetic.
        token_budget: Most tokens of a batch, padding included.
        device: Where to run.
        show_progress: Whether to show a bar.

    Returns:
        `float32[len(texts), D]`; of a lexical model `scipy.sparse.csr_matrix[len(texts), V]`; of a multi-vector model
        [`Tokens`].
    """
    _check_kind(kind)
    inference = as_inference_model(model, dtype=dtype, device=device, token_budget=token_budget)
    sparse, ragged = inference.representation == "sparse", inference.representation == "tokens"
    if not len(texts):
        if ragged:
            return empty_tokens(inference)
        empty = np.empty((0, inference.model.embedding_size), np.float32)
        return csr_matrix(empty) if sparse else empty
    run = inference.encode_sparse if sparse else inference.encode
    if ragged:
        run = partial(encode_tokens, inference)
    parts = []
    bar = progress(total=len(texts), label=f"encode {kind}", unit="text") if show_progress else None
    for start in range(0, len(texts), _BLOCK_TEXTS):
        features = inference.processor.encode(texts[start : start + _BLOCK_TEXTS], kind)
        parts.append(run(features, kind, bar.update if bar is not None else None))
    if bar is not None:
        bar.close()
    if len(parts) == 1:
        return parts[0]
    if ragged:
        return Tokens.concatenate(parts)
    return vstack(parts, format="csr") if sparse else np.concatenate(parts)


def encode_table(
    model: RetrievalModel | InferenceModel,
    table: TextTable,
    kind: str,
    *,
    dtype: str = "auto",
    token_budget: int | None = None,
    shard_rows: int | None = None,
    storage: str = "float32",
    layers: Sequence[int] = (),
    cache_dir: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
) -> VectorStore:
    """Vectors of all rows of a table, made once and found again.

    They are kept under a key of the weights, the texts and every setting, never of a name: the same weights in another
    folder find them, changed weights do not. The work is shared by accelerate's processes, all of which must call
    this; killed at any moment and called again, it leaves the same bytes.

    Args:
        model: The model.
        table: Queries or a corpus.
        kind: `"query"` or `"passage"`: which prompt, length and tower.
        dtype: `"auto"`, `"float32"` or `"bfloat16"` arithmetic.
        token_budget: Most tokens of a batch, padding included.
        shard_rows: Rows of a shard; by default a function of the number of rows.
        storage: `"float32"` or `"float16"`: how vectors are kept on disk.
        layers: Numbers of a dense model's layers, from 1, ascending: then their pooled vectors, neither projected nor
            normalised, are kept side by side, `[rows, K · H]`, instead of the model's own.
        cache_dir: Instead of the default cache folder.
        device: Where to run.

    Returns:
        An [`EmbeddingStore`]; of a lexical model a [`SparseStore`], of a multi-vector model a [`TokenStore`].
    """
    inference = as_inference_model(model, dtype=dtype, device=device, token_budget=token_budget)
    sparse = inference.representation == "sparse"
    job, rows = encode_job(inference, table, kind, shard_rows, storage, cache_dir, layers)

    def positions(shard: int) -> np.ndarray:
        return np.arange(shard * rows, min((shard + 1) * rows, len(table)))

    def tokenise(shard: int) -> list[list[int]]:
        return inference.processor.encode(_texts(table, positions(shard), inference), kind)

    def write(shard: int, path: Path, features: list[list[int]] | None = None) -> None:
        features = tokenise(shard) if features is None else features
        if inference.representation == "tokens":
            write_tokens(path, job.path(shard), encode_tokens(inference, features, kind, job.advance), storage)
        elif sparse:
            write_rows(path, inference.encode_sparse(features, kind, job.advance), storage)
        else:
            vectors = inference.encode(features, kind, job.advance, layers)
            write_array(path, vectors.reshape(len(vectors), -1).astype(storage))

    job.run(
        write,
        f"encode {table.noun}",
        sizes=[len(positions(shard)) for shard in range(job.num_shards)],
        unit="text",
        # On a CPU both would compete for the same cores.
        prepare=tokenise if inference.device.type != "cpu" else None,
    )
    store = {"sparse": SparseStore, "tokens": TokenStore}.get(inference.representation, EmbeddingStore)
    return store(job.folder)


def encode_job(
    inference: InferenceModel,
    table: TextTable,
    kind: str,
    shard_rows: int | None = None,
    storage: str = "float32",
    cache_dir: str | os.PathLike | None = None,
    layers: Sequence[int] = (),
) -> tuple[ShardedJob, int]:
    """The job of `encode_table`, and the rows of a shard."""
    _check_kind(kind)
    if storage not in STORAGES:
        raise InputError(f"{storage!r} is not a storage", where="storage", cure="Use float32 or float16")
    if inference.representation == "pair":
        raise InputError(
            "a cross-encoder has no embeddings", where="encoding", cure="Use score_rows or rerank with it"
        )
    if layers and inference.representation != "dense":
        raise InputError(
            "the layers of a text are one vector each in dense models alone",
            where="layers",
            cure="Score the rows by their layers (score_layers), or let the model read every batch",
        )
    if not len(table):
        raise InputError(f"no {table.noun}", where=table.where, cure="Give at least one row")
    rows = shard_rows or default_shard_rows(len(table))
    key = {
        "version": ENCODE_VERSION,
        **inference.key(),
        "table": table.fingerprint,
        "rows": len(table),
        "text_kind": kind,
        "shard_rows": rows,
        "storage": storage,
    }
    if layers:
        inference._source.check_layers(layers)
        key["layers"] = list(layers)
    sparse = inference.representation == "sparse"
    info = {"model": str(inference._source.name_or_path or ""), "texts": table.where}
    if sparse:
        key["terms"] = inference._source.embedding_size
        info["vocabulary"] = vocabulary_fingerprint(inference.processor.tokenizer)
    options = {"info": info, **({"suffix": SparseStore.suffix} if sparse else {})}
    return ShardedJob.cached("embeddings", key, -(-len(table) // rows), cache_dir, **options), rows


def model_identity(inference: InferenceModel) -> dict[str, Any]:
    """Who made vectors or scores, for provenance."""
    model = inference._source
    source = model.source
    return {
        "model": str(source.name if source is not None else model.name_or_path or type(model).__name__),
        "revision": getattr(source, "revision", None),
        "weights": inference.key()["weights"],
        "settings": fingerprint(inference.key()),
        "dtype": inference.dtype,
        "query_length": inference.processor.query_length,
        "passage_length": inference.processor.passage_length,
        "query_prompt": inference.processor.query_prompt,
        "passage_prompt": inference.processor.passage_prompt,
        "template": inference.processor.template,
    }


def _texts(table: TextTable, positions: np.ndarray, inference: InferenceModel) -> list[str]:
    return table.texts(positions, template=inference.processor.template)


def _check_kind(kind: str) -> None:
    if kind not in ("query", "passage"):
        raise InputError(f"{kind!r} is not a kind of text", where="kind", cure="Use query or passage")
