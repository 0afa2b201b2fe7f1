"""What the layers of a teacher say about the candidates of a row set, as a column of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from ..errors import InputError
from ..losses.maxsim import own_maxsim
from ..models.base import RetrievalModel
from ..models.bi_encoder import KINDS
from .encode import as_inference_model, model_identity
from .inference import InferenceModel
from .score import flat_documents
from .shards import ShardedJob, default_shard_rows, digest, write_array


if TYPE_CHECKING:
    from ..data import RowSet

# Raised by hand when the same key would give other scores.
LAYERS_VERSION = 1

_SHARD_PAIRS = 4096
# Hidden states of queries that are held at a time.
_QUERY_BYTES = 1 << 30


def score_layers(
    model: RetrievalModel | InferenceModel,
    rows: RowSet,
    *,
    layers: str | Sequence[int] = "all",
    column: str = "layer_scores_teacher",
    dtype: str = "auto",
    token_budget: int | None = None,
    device: Any = None,
    cache_dir: str | os.PathLike | None = None,
) -> RowSet:
    """A row set with one more column: the score of every document by each of a model's layers.

    With it a teacher's layers teach at no cost at training time, for the row's own candidates. Scores are float32 (raw
    MaxSim of layers is in the thousands), one list of as many as there are layers for each document; which layers,
    and whose, stands in `metadata["teachers"][column]`. Shards are spread over accelerate's processes and completed
    after a kill. See [`hf_distill.models.layer_scores`] for how a layer scores.

    Args:
        model: The teacher.
        rows: The candidates.
        layers: `"all"`, or numbers from 1.
        column: `"layer_scores_<name of the teacher>"`.
        dtype: `"auto"`, `"float32"` or `"bfloat16"` arithmetic.
        token_budget: Most tokens of a batch, padding included.
        device: Where to run.
        cache_dir: Instead of the default cache folder.
    """
    from ..data import schema

    if not schema.is_layer_column(column):
        raise InputError(
            f"{column!r} is no column of layers' scores", where="column", cure="Use layer_scores_<name of the teacher>"
        )
    inference = as_inference_model(model, dtype=dtype, device=device, token_budget=token_budget)
    source = inference._source
    chosen = list(range(1, source.num_layers + 1)) if layers == "all" else sorted(set(layers))
    source.check_layers(chosen)
    query, document = np.repeat(rows.query, rows.lengths), flat_documents(rows)
    size = default_shard_rows(len(query), _SHARD_PAIRS, 256)
    key = {
        "version": LAYERS_VERSION,
        **inference.key(),
        "layers": chosen,
        "queries": rows.queries.fingerprint,
        "corpus": rows.corpus.fingerprint,
        "pairs": digest(query, document),
        "shard_pairs": size,
    }
    job = ShardedJob.cached("layer_scores", key, -(-len(query) // size), cache_dir)
    score = {"dense": _by_vectors, "tokens": _by_tokens, "pair": _by_reading}[source.representation]

    def write(shard: int, path: Path) -> None:
        part = slice(shard * size, (shard + 1) * size)
        questions, q = np.unique(query[part], return_inverse=True)
        passages, d = np.unique(document[part], return_inverse=True)
        texts = rows.corpus.texts(passages, template=inference.processor.template)
        write_array(path, score(inference, chosen, rows.queries.texts(questions), texts, q, d))

    sizes = [min(size, len(query) - shard * size) for shard in range(job.num_shards)]
    job.run(write, "score layers", sizes=sizes, unit="pair")
    values = np.concatenate([np.load(path, allow_pickle=False) for path in job.paths()])
    return rows.with_column(
        column,
        _nested(values, rows.lengths),
        layers=chosen,
        num_layers=source.num_layers,
        queries_fingerprint=rows.queries.fingerprint,
        corpus_fingerprint=rows.corpus.fingerprint,
        **model_identity(inference),
    )


def _by_reading(
    inference: InferenceModel,
    layers: list[int],
    questions: list[str],
    passages: list[str],
    q: np.ndarray,
    d: np.ndarray,
) -> np.ndarray:
    """A ranker's head on each layer: `float32[pairs, K]`."""
    features, types = inference.processor.pairs([questions[one] for one in q], [passages[one] for one in d])
    return inference.run(features, types, lambda chunk: inference.model.score_chunk(chunk, None, layers)[1])


def _by_vectors(
    inference: InferenceModel,
    layers: list[int],
    questions: list[str],
    passages: list[str],
    q: np.ndarray,
    d: np.ndarray,
) -> np.ndarray:
    """Inner products of a dense model's pooled layers: `float32[pairs, K]`."""

    def vectors(texts: list[str], kind: str) -> np.ndarray:
        return inference.encode(inference.processor.encode(texts, kind), kind, layers=layers)

    left, right = vectors(questions, "query"), vectors(passages, "passage")
    return np.concatenate(
        [np.einsum("nkh,nkh->nk", left[q[i : i + 256]], right[d[i : i + 256]]) for i in range(0, len(q), 256)]
    )


def _by_tokens(
    inference: InferenceModel,
    layers: list[int],
    questions: list[str],
    passages: list[str],
    q: np.ndarray,
    d: np.ndarray,
) -> np.ndarray:
    """MaxSim of a multi-vector model's layers: `float32[pairs, K]`.

    The tokens of one batch of passages are held at a time, and those of as many queries as fit: 24 layers of 32 tokens
    are 3 MiB a query. The passages are read again for further queries, in the same batches, so that the scores do not
    depend on how many fit.
    """
    features = {kind: inference.processor.encode(texts, kind) for kind, texts in zip(KINDS, (questions, passages))}

    def encoded(kind: str) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
        forward = partial(inference.model.encode, kind=kind, layers=layers)
        for batch, (_, mask, *of_layers) in inference.outputs(features[kind], None, forward):
            yield batch, mask, torch.stack(of_layers, 1)  # [t, K, l, H]

    scores = np.empty((len(q), len(layers)), np.float32)

    def score(held: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        asked = np.isin(q, list(held))
        for batch, mask, found in encoded("passage"):
            lines = {text: line for line, text in enumerate(batch.tolist())}
            for pair in np.flatnonzero(asked & np.isin(d, batch)):
                query_mask, query = held[int(q[pair])]
                line = lines[int(d[pair])]
                # The layers stand where a batch has its queries: each layer of the query with that of the passage.
                best = own_maxsim(
                    query,
                    found[line][:, None],
                    mask[line].expand(len(layers), 1, -1),
                    query_mask.expand(len(layers), -1),
                )
                scores[pair] = best[:, 0].cpu().numpy()

    held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    size = 0
    for batch, mask, found in encoded("query"):
        if held and size + found.nbytes > _QUERY_BYTES:
            score(held)
            held, size = {}, 0
        held.update({text: (mask[line], found[line]) for line, text in enumerate(batch.tolist())})
        size += found.nbytes
    score(held)
    return scores


def _nested(values: np.ndarray, lengths: np.ndarray) -> pa.Array:
    """`float32[pairs, K]` as a list of lists for each row."""
    inner = pa.ListArray.from_arrays(
        pa.array(np.arange(len(values) + 1) * values.shape[1], pa.int32()), pa.array(values.reshape(-1), pa.float32())
    )
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()), inner)
