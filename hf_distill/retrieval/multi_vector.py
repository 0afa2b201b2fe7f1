"""Search with one vector a token: token vectors in shards, candidates from an index over tokens, exact MaxSim."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import atomic_path
from .index import EXACT, Index, best_keys, from_keys
from .inference import InferenceModel
from .plaid import SMALLEST, PlaidIndex, is_plaid
from .shards import write_array
from .store import EmbeddingStore, VectorStore


# Similarities of tokens that are held at once: 128 MiB.
_CELLS = 2**25
# Tokens of passages that are read at once.
_BLOCK_TOKENS = 2**15
# Queries that are searched for together.
_BLOCK_QUERIES = 64
# Passages found for each token of a query, at least, and candidates for each passage asked for.
_NEIGHBOURS, _POOL = 64, 4


class Tokens:
    """Vectors of the tokens of several texts, one after the other.

    Args:
        vectors: `float32[S, D]`, the tokens of all texts.
        lengths: `int64[n]`, how many of them each text has.
    """

    def __init__(self, vectors: np.ndarray, lengths: np.ndarray):
        self.vectors, self.lengths = vectors, np.asarray(lengths, np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.vectors.shape[1]

    def rows(self, start: int, stop: int) -> Tokens:
        """The texts `start` to `stop`."""
        return Tokens(self.vectors[self.offsets[start] : self.offsets[stop]], self.lengths[start:stop])

    def take(self, positions: Sequence[int] | np.ndarray) -> Tokens:
        """The texts at `positions`, in their order."""
        positions = np.asarray(positions, np.int64)
        lengths = self.lengths[positions]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return Tokens(self.vectors[np.repeat(self.offsets[positions], lengths) + within], lengths)

    def __getitem__(self, positions: np.ndarray) -> Tokens:
        return self.take(positions)

    @classmethod
    def concatenate(cls, parts: Sequence[Tokens]) -> Tokens:
        """The texts of all parts."""
        return cls(np.concatenate([part.vectors for part in parts]), np.concatenate([part.lengths for part in parts]))


class TokenStore(VectorStore):
    """Token vectors of a table on disk, read text by text.

    Args:
        folder: A folder that `encode_table` made for a multi-vector model.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.flat = EmbeddingStore(folder)
        self.key, self.dim = self.flat.key, self.flat.dim
        paths = [self.folder / f"shard-{number:05d}.npy" for number in range(int(self.key["num_shards"]))]
        counts = [np.load(_lengths_path(path), allow_pickle=False) for path in paths]
        self.lengths = np.concatenate(counts).astype(np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, start: int, stop: int) -> Tokens:
        """The texts `start` to `stop`, in float32."""
        return Tokens(self.flat.rows(int(self.offsets[start]), int(self.offsets[stop])), self.lengths[start:stop])

    def take(self, positions: Sequence[int] | np.ndarray) -> Tokens:
        """The texts at `positions`, in their order, in float32."""
        positions = np.asarray(positions, np.int64)
        lengths = self.lengths[positions]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return Tokens(self.flat.take(np.repeat(self.offsets[positions], lengths) + within), lengths)


def encode_tokens(
    inference: InferenceModel, features: Sequence[Sequence[int]], kind: str, advance: Any = None
) -> Tokens:
    """Vectors of the tokens that count, of tokenised texts.

    Args:
        inference: A multi-vector model.
        features: Token ids, as `processor.encode(texts, kind)` returns them.
        kind: `"query"` or `"passage"`.
        advance: Called with the number of texts after every batch.
    """
    vectors: list[np.ndarray] = []
    lengths = np.zeros(len(features), np.int64)
    order: list[np.ndarray] = []
    for batch, (found, counted) in inference.outputs(
        features, None, lambda chunk: inference.model.encode(chunk, kind)
    ):
        lengths[batch] = counted.sum(1).cpu().numpy()
        vectors.append(found[counted].float().cpu().numpy())
        order.append(batch)
        if advance is not None:
            advance(len(batch))
    places = np.concatenate(order)
    flat = np.concatenate(vectors)
    inference.check_finite(flat)
    return Tokens(flat, lengths[places]).take(np.argsort(places))


def write_tokens(path: Path, target: Path, tokens: Tokens, storage: str) -> None:
    """Writes a shard: the lengths of its texts beside `target` first, then the vectors at `path`.

    A shard counts as finished when its vectors are there, and then its lengths are too.
    """
    with atomic_path(_lengths_path(target)) as temporary:
        write_array(temporary, tokens.lengths.astype(np.int32))
    write_array(path, tokens.vectors.astype(storage))


def _lengths_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.lengths.npy")


class TokenIndex:
    """Exact MaxSim over passages, all of them or those that an index over their tokens finds.

    Santhanam et al., "ColBERTv2: Effective and Efficient Retrieval via Lightweight Late Interaction" (2022): every
    token of a query looks up its nearest tokens; the passages they belong to are ranked by the sum of what was found,
    and the best of them by exact MaxSim. Here what a query token did not find of a passage counts as the last one it
    found (Lee et al., "Rethinking the Role of Token Retrieval in Multi-Vector Retrieval", 2023).

    Args:
        passages: A [`TokenStore`] or [`Tokens`].
        factory: `"Flat"` compares every passage; a factory string of FAISS or (of a store) `"Plaid"` finds candidates.
        device: Where to compute.
        search_options: Parameters of searching, for example `"nprobe=32"`.
        cache_dir: Instead of the default cache folder.
    """

    def __init__(
        self,
        passages: TokenStore | Tokens,
        factory: str = EXACT,
        *,
        device: Any = None,
        search_options: str | None = None,
        cache_dir: str | os.PathLike | None = None,
    ):
        self.passages, self.device = passages, torch.device(device or "cpu")
        self._candidates: TokenNeighbours | PlaidIndex | None = None
        options: dict[str, Any] = {"search_options": search_options, "cache_dir": cache_dir}
        if is_plaid(factory):
            # The engine cannot learn to compress a handful of tokens; they are compared in no time.
            if passages.lengths.sum() < SMALLEST:
                return
            self._candidates = PlaidIndex.build(passages, factory, device=self.device, **options)
        elif factory != EXACT:
            flat = passages.flat if isinstance(passages, TokenStore) else passages.vectors
            self._candidates = TokenNeighbours(Index.build(flat, factory, device=device, **options), passages.offsets)

    def __len__(self) -> int:
        return len(self.passages)

    def search(self, queries: Tokens, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best passages of each query.

        Returns:
            Scores `float32[n, k]`, descending, and positions `int64[n, k]`, -1 where there are fewer passages. Equal
            scores stand in the order of the passages.
        """
        k = min(k, len(self.passages))
        if not len(queries):
            return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
        search = self._search_all if self._candidates is None else self._search_candidates
        parts = [
            search(queries.rows(start, min(start + _BLOCK_QUERIES, len(queries))), k)
            for start in range(0, len(queries), _BLOCK_QUERIES)
        ]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _search_all(self, queries: Tokens, k: int) -> tuple[np.ndarray, np.ndarray]:
        best = torch.zeros((len(queries), 0), dtype=torch.int64, device=self.device)
        budget = min(_BLOCK_TOKENS, max(1, _CELLS // max(1, len(queries.vectors))))
        for start, stop in _blocks(self.passages.lengths, budget):
            scores = block_maxsim(queries, self.passages.rows(start, stop), self.device)
            best = torch.cat([best, best_keys(scores, k, start)], 1)
            if best.shape[1] > max(4 * k, 4096) or stop == len(self.passages):
                best = best.topk(min(k, best.shape[1]), dim=1).values
        scores, positions = from_keys(best)
        return scores.cpu().numpy(), positions.cpu().numpy()

    def _search_candidates(self, queries: Tokens, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = np.full((len(queries), k), -np.inf, np.float32)
        positions = np.full((len(queries), k), -1, np.int64)
        for row, found in enumerate(self._candidates.find(queries, _POOL * k)):
            exact = pair_scores(queries.rows(row, row + 1), self.passages, found, self.device)
            order = np.lexsort((found, -exact))[:k]
            scores[row, : len(order)], positions[row, : len(order)] = exact[order], found[order]
        return scores, positions


class TokenNeighbours:
    """The passages whose tokens are nearest to a query's, found by an index over all tokens; see [`TokenIndex`].

    Args:
        tokens: An index of the tokens of all passages.
        offsets: `int64[n + 1]`, where the tokens of each passage begin.
    """

    def __init__(self, tokens: Index, offsets: np.ndarray):
        self._tokens, self._offsets = tokens, offsets

    def find(self, queries: Tokens, count: int) -> list[np.ndarray]:
        """At most `count` passages for each query, as ascending positions `int64[m]`."""
        neighbours = min(max(_NEIGHBOURS, count // _POOL), len(self._tokens))
        similarity, token = self._tokens.search(queries.vectors, neighbours)
        document = np.searchsorted(self._offsets, token, side="right") - 1
        own = [slice(start, stop) for start, stop in zip(queries.offsets, queries.offsets[1:])]
        return [_candidates(document[rows], similarity[rows], token[rows] >= 0, count) for rows in own]


def _candidates(document: np.ndarray, similarity: np.ndarray, found: np.ndarray, count: int) -> np.ndarray:
    """The passages of a query's nearest tokens, best estimates first (at most `count`), in ascending order.

    Args:
        document: `int64[Lq, n]`, whose token was found.
        similarity: `float32[Lq, n]`, descending along n.
        found: `bool[Lq, n]`.
        count: How many to keep.
    """
    row = np.broadcast_to(np.arange(len(document))[:, None], document.shape)[found]
    last = np.where(found, similarity, np.inf).min(1, keepdims=True)
    passage, gain = document[found], similarity[found] - np.broadcast_to(last, found.shape)[found]
    # Only a passage's nearest token counts for a token of the query: the first in each run of (row, passage).
    order = np.lexsort((-gain, passage, row))
    row, passage, gain = row[order], passage[order], gain[order]
    first = np.ones(len(row), bool)
    first[1:] = (row[1:] != row[:-1]) | (passage[1:] != passage[:-1])
    names, inverse = np.unique(passage[first], return_inverse=True)
    estimate = np.bincount(inverse, weights=gain[first], minlength=len(names))
    return np.sort(names[np.argsort(-estimate, kind="stable")[:count]])


def block_maxsim(queries: Tokens, passages: Tokens, device: torch.device) -> torch.Tensor:
    """MaxSim of some queries with some passages, float32 `[queries, passages]`; 0 for a passage without tokens."""
    left = torch.as_tensor(queries.vectors, device=device)
    right = torch.as_tensor(passages.vectors, device=device)
    lengths = torch.as_tensor(passages.lengths, device=device)
    if not len(right):
        return torch.zeros(len(queries), len(passages), device=device)
    best = torch.segment_reduce(right @ left.T, "max", lengths=lengths, axis=0, initial=-torch.inf)
    best = best.masked_fill(lengths[:, None] == 0, 0.0)
    ends = torch.as_tensor(queries.lengths, device=device)
    return torch.segment_reduce(best.T.contiguous(), "sum", lengths=ends, axis=0)


def pair_scores(
    query: Tokens, passages: TokenStore | Tokens, documents: np.ndarray, device: torch.device
) -> np.ndarray:
    """MaxSim `float32[n]` of one query with the passages at `documents`, however many there are."""
    budget = min(_BLOCK_TOKENS, max(1, _CELLS // max(1, len(query.vectors))))
    parts = [
        block_maxsim(query, passages.take(documents[start:stop]), device)[0].cpu().numpy()
        for start, stop in _blocks(passages.lengths[documents], budget)
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def score_token_pairs(
    queries: TokenStore | Tokens,
    passages: TokenStore | Tokens,
    query: np.ndarray,
    document: np.ndarray,
    device: torch.device,
) -> np.ndarray:
    """MaxSim `float32[n]` of the pairs of `query` and `document`, both `int64[n]` positions; each query read once."""
    scores = np.empty(len(query), np.float32)
    order = np.argsort(query, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(query[order])) + 1) if len(order) else []:
        tokens = queries.take(query[group[:1]])
        scores[group] = pair_scores(tokens, passages, document[group], device)
    return scores


def _blocks(lengths: np.ndarray, budget: int) -> Iterator[tuple[int, int]]:
    """Cuts texts into consecutive blocks of at most `budget` tokens (at least one text each)."""
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + budget, side="right")))
        yield start, stop
        start = stop


def empty_tokens(inference: InferenceModel) -> Tokens:
    """No texts, of a model's width."""
    return Tokens(np.empty((0, inference.model.token_size), np.float32), np.empty(0, np.int64))
