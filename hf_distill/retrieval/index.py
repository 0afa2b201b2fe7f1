"""Nearest vectors: exact block search in torch, or any index of FAISS."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..console import get_logger, progress
from ..errors import InputError
from ..models.products import product
from .shards import ShardedJob
from .store import EmbeddingStore


logger = get_logger(__name__)

# Raised by hand when the same key would give another index.
INDEX_VERSION = 1

EXACT = "Flat"
# Queries and vectors at a time: some 100 MB of vectors and of scores on a CPU.
_QUERY_BLOCKS = {"cpu": 256}
_QUERY_BLOCK = 2048
_CORPUS_BLOCK = 65536
_BLOCK_NUMBERS = 2**25
_TRAIN_ROWS = 262144
# As many as FAISS wants for each list of an inverted index.
_TRAIN_ROWS_OF_A_LIST = 39


class Index:
    """The vectors of a corpus, searched by inner product.

    Build one with [`Index.build`].

    Attributes:
        factory: `"Flat"` for exact search, else the FAISS factory string.
        normalize: Whether vectors and queries are scaled to length 1 first (cosine).
    """

    def __init__(self, vectors: EmbeddingStore | np.ndarray, factory: str, normalize: bool, device: torch.device):
        self.vectors, self.factory, self.normalize, self.device = vectors, factory, normalize, device
        self.dim = int(vectors.shape[1])
        self._faiss: Any = None

    @classmethod
    def build(
        cls,
        vectors: EmbeddingStore | np.ndarray,
        factory: str = EXACT,
        *,
        normalize: bool = False,
        device: str | torch.device | None = None,
        search_options: str | None = None,
        train_rows: int | None = None,
        seed: int = 0,
        cache_dir: str | os.PathLike | None = None,
    ) -> Index:
        """Makes an index.

        Exact search (`"Flat"`) needs no preparation: blocks of queries meet blocks of the corpus in torch, on a CPU
        more than twice as fast as FAISS's flat index. Every other factory string (`"HNSW32,Flat"`,
        `"IVF4096,PQ48"`, `"SQfp16"`, …) is built by FAISS, trained on a seeded sample where it needs training; that
        of a store is kept in the cache and found again. All processes must call this together in that case.

        Args:
            vectors: `float[n, D]`.
            factory: `"Flat"`, or a factory string of FAISS, to which search options may be added after a semicolon:
                `"IVF1024,Flat;nprobe=32"`.
            normalize: Whether to compare by cosine instead of inner product.
            device: Where to search; by default a GPU if there is one.
            search_options: FAISS parameters of searching, for example `"nprobe=32"` or `"efSearch=128"`.
            train_rows: Most vectors to train on; by default 262,144, or 39 for each list of an inverted index.
            seed: Of the sample.
            cache_dir: Instead of the default cache folder.

        Raises:
            InputError: If FAISS is missing or cannot read the factory string or the options.
        """
        factory, _, inline = factory.partition(";")
        search_options = search_options or inline.strip() or None
        if not isinstance(vectors, EmbeddingStore):
            vectors = np.asarray(vectors)
            if vectors.ndim != 2:
                raise InputError(f"vectors of shape {vectors.shape}", where="Index.build", cure="Give [rows, dim]")
        if not len(vectors):
            raise InputError("no vectors to search", where="Index.build", cure="Encode a corpus first")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            if device == "cuda":
                from accelerate import PartialState

                device = PartialState().device
        index = cls(vectors, factory, normalize, torch.device(device))
        if factory != EXACT:
            index._build_faiss(search_options, train_rows, seed, cache_dir)
        elif search_options:
            raise InputError(
                f"exact search has no options such as {search_options!r}",
                where="search_options",
                cure="Leave them out, or choose a FAISS index",
            )
        return index

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def _block_rows(self) -> int:
        return max(1024, min(_CORPUS_BLOCK, _BLOCK_NUMBERS // self.dim))

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        query_block: int | None = None,
        corpus_block: int | None = None,
        show_progress: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best vectors of each query.

        Memory holds one block of the corpus, the scores of one block against another and the k best so far, whatever
        the size of the corpus.

        Args:
            queries: `float[n, D]`.
            k: How many; at most as many as there are vectors.
            query_block: Queries at a time; by default what suits the device.
            corpus_block: Vectors at a time; by default what suits their width.
            show_progress: Whether to show a bar.

        Returns:
            Scores `float32[n, k]`, descending, and positions `int64[n, k]`; where scores are equal, ascending
            positions. An approximate index may find fewer: -inf and -1 at the end.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise InputError(
                f"queries of shape {queries.shape} for vectors of width {self.dim}",
                where="Index.search",
                cure="Encode both with the same model",
            )
        if k < 1:
            raise InputError(f"k is {k}", where="Index.search", cure="Ask for one result at least")
        if self.normalize:
            queries = _unit(queries)
        k = min(k, len(self))
        query_block = query_block or _QUERY_BLOCKS.get(self.device.type, _QUERY_BLOCK)
        corpus_block = corpus_block or self._block_rows
        if not len(queries):
            return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
        if self._faiss is not None:
            return self._search_faiss(queries, k, query_block)
        return self._search_exact(queries, k, query_block, corpus_block, show_progress)

    # ------------------------------------------------------------------------------------------------------- exact

    def _search_exact(
        self, queries: np.ndarray, k: int, query_block: int, corpus_block: int, show_progress: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        blocks = range(0, len(queries), query_block)
        wanted = [torch.from_numpy(queries[start : start + query_block]).to(self.device) for start in blocks]
        best: list[torch.Tensor | None] = [None] * len(wanted)
        starts = range(0, len(self), corpus_block)
        bar = progress(total=len(starts) * len(wanted), label="search", unit="block") if show_progress else None
        with torch.inference_mode():
            for start in starts:
                block = torch.from_numpy(self._block(start, start + corpus_block)).to(self.device)
                for number, query in enumerate(wanted):
                    found = best_keys(product(query, block), k, start)
                    if best[number] is not None:
                        found = torch.cat([best[number], found], dim=1)
                        found = found.topk(min(k, found.shape[1]), dim=1).values
                    best[number] = found
                    if bar is not None:
                        bar.update(1)
        if bar is not None:
            bar.close()
        scores, positions = from_keys(torch.cat(best))
        return scores.cpu().numpy(), positions.cpu().numpy()

    def _block(self, start: int, stop: int) -> np.ndarray:
        if isinstance(self.vectors, EmbeddingStore):
            block = self.vectors.rows(start, stop)
        else:
            block = self.vectors[start:stop].astype(np.float32, copy=False)
        return _unit(block) if self.normalize else np.ascontiguousarray(block)

    # ------------------------------------------------------------------------------------------------------- FAISS

    def _build_faiss(self, search_options: str | None, train_rows: int | None, seed: int, cache_dir) -> None:
        faiss = _import_faiss()
        empty = empty_index(self.factory, self.dim)
        if train_rows is None:
            train_rows = max(_TRAIN_ROWS, _TRAIN_ROWS_OF_A_LIST * number_of_lists(empty))
        if isinstance(self.vectors, EmbeddingStore) and self.vectors.key:
            key = {
                "version": INDEX_VERSION,
                "vectors": self.vectors.fingerprint,
                "factory": self.factory,
                "normalize": self.normalize,
                "train_rows": train_rows,
                "seed": seed,
                "faiss": faiss.__version__,
            }
            job = ShardedJob.cached("faiss", key, 1, cache_dir, suffix=".faiss")

            def write(_: int, path: Path) -> None:
                faiss.write_index(self._fill(faiss, empty, train_rows, seed), str(path))

            job.run(write, f"build {self.factory}", unit="index")
            index = faiss.read_index(str(job.path(0)))
        else:
            index = self._fill(faiss, empty, train_rows, seed)
        if index.ntotal != len(self):
            raise InputError(
                f"the index holds {index.ntotal} of {len(self)} vectors",
                where=self.factory,
                cure="Remove it from the cache and build it again",
            )
        index = _to_gpus(faiss, index, self.device)
        if search_options:
            try:
                faiss.ParameterSpace().set_index_parameters(index, search_options)
            except RuntimeError as error:
                raise InputError(
                    f"{search_options!r} does not suit {self.factory} ({_reason(error)})",
                    where="search_options",
                    cure="Use for example nprobe=32 for IVF or efSearch=128 for HNSW",
                ) from None
        self._faiss = index

    def _fill(self, faiss: Any, index: Any, train_rows: int, seed: int) -> Any:
        if not index.is_trained:
            count = min(train_rows, len(self))
            sample = np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False))
            if isinstance(self.vectors, EmbeddingStore):
                vectors = self.vectors.take(sample)
            else:
                vectors = self.vectors[sample].astype(np.float32)
            try:
                index.train(_unit(vectors) if self.normalize else vectors)
            except RuntimeError as error:
                raise InputError(
                    f"{self.factory} cannot be trained on {count} vectors ({_reason(error)})",
                    where="index factory",
                    cure="Choose fewer clusters or centroids, or Flat",
                ) from None
        for start in progress(range(0, len(self), self._block_rows), label=f"build {self.factory}", unit="block"):
            block = self._block(start, start + self._block_rows)
            if type(index).__name__.startswith("IndexIDMap"):  # those want to be told the positions
                index.add_with_ids(block, np.arange(start, start + len(block)))
            else:
                index.add(block)
        return index

    def _search_faiss(self, queries: np.ndarray, k: int, query_block: int) -> tuple[np.ndarray, np.ndarray]:
        parts = [self._faiss.search(queries[at : at + query_block], k) for at in range(0, len(queries), query_block)]
        scores = np.concatenate([part[0] for part in parts])
        positions = np.concatenate([part[1] for part in parts]).astype(np.int64)
        # FAISS fills up with -1 where it has found less than k.
        scores = np.where(positions < 0, -np.inf, scores).astype(np.float32)
        order = np.lexsort((positions, -scores), axis=1)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(positions, order, 1)


def empty_index(factory: str, dim: int) -> Any:
    """An empty index of FAISS for vectors of width `dim`.

    Raises:
        InputError: If FAISS is missing or cannot read the factory string.
    """
    faiss = _import_faiss()
    factory = factory.partition(";")[0]
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(
            f"FAISS cannot make {factory!r} for vectors of width {dim} ({_reason(error)})",
            where="index factory",
            cure="Use Flat, or a factory string such as 'HNSW32,Flat', 'IVF1024,Flat' or 'IVF4096,PQ48'",
        ) from None


def number_of_lists(index: Any) -> int:
    """The lists of an inverted index of FAISS; 0 for any other."""
    try:
        return _import_faiss().extract_index_ivf(index).nlist
    except RuntimeError:
        return 0


def best_keys(scores: torch.Tensor, k: int, first: int) -> torch.Tensor:
    """The k best of a block of scores `[q, c]` as sortable keys `int64[q, k']`, descending.

    A key holds the score in its upper half and the inverted position in its lower one, so that no two are equal and
    every order of blocks gives the same result. `first` is the position of the block's first column.
    """
    width = scores.shape[1]
    values, columns = scores.topk(min(k + 1, width), dim=1)
    if torch.isnan(values[:, 0]).any():
        raise InputError("scores are not numbers", where="Index.search", cure="Look for NaN in the vectors")
    if width > k:
        # Where the k-th and the next score are equal, topk chose among equals by chance: choose the first positions.
        for row in (values[:, k - 1] == values[:, k]).nonzero().flatten().tolist():
            above = (scores[row] > values[row, k]).nonzero().flatten()
            equal = (scores[row] == values[row, k]).nonzero().flatten()[: k - len(above)]
            columns[row, :k] = torch.cat([above, equal])
            values[row, :k] = scores[row, columns[row, :k]]
        values, columns = values[:, :k], columns[:, :k]
    bits = (values + 0.0).view(torch.int32)  # adding 0 turns -0 into 0
    # Negative floats sort backwards as integers.
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    return ((ordered << 32) | (0xFFFFFFFF - (columns + first))).sort(dim=1, descending=True).values


def from_keys(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores float32 and positions int64 of the keys that [`best_keys`] made, in their shape."""
    ordered = (keys >> 32).to(torch.int32)
    scores = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)
    return scores, 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors / np.maximum(lengths, 1e-12), dtype=np.float32)


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise InputError(
            "FAISS is not installed",
            where="index factory",
            cure="Use Flat, or install faiss-cpu (or hf-distill[gpu] for GPUs, not both)",
        ) from None
    return faiss


def _to_gpus(faiss: Any, index: Any, device: torch.device) -> Any:
    """The index on this process's GPU, or on all of them if there is one process; as it is where that cannot be."""
    if device.type != "cuda" or not hasattr(faiss, "index_cpu_to_all_gpus") or not faiss.get_num_gpus():
        return index
    from accelerate import PartialState

    state = PartialState()
    try:
        if state.num_processes == 1:
            return faiss.index_cpu_to_all_gpus(index)
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), state.local_process_index, index)
    except RuntimeError as error:
        logger.info("FAISS searches this index on the CPU (%s)", _reason(error))
        return index


def _reason(error: Exception) -> str:
    """What FAISS says, without the place in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^Error in .*? at \S+:\d+: ", "", lines[-1] if lines else type(error).__name__)[:160]
