"""Sparse vectors for other engines: Anserini's and Pyserini's JSON, and the Common Index File Format (PISA, JASS, …).

Impacts are whole numbers, see [`quantise`]. For Anserini a text without any gets the unknown token with weight 1, as
in SPLADE's own tools; in a CIFF it is a document of length 0.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import progress
from ..errors import InputError
from ..files import atomic_path
from ..models.lexical import term_names
from .inverted import SCALE, InvertedIndex, quantise
from .sparse_store import SparseStore


if TYPE_CHECKING:
    from ..data import Corpus, Queries

_BLOCK = 8192


def query_string(impacts: Mapping[str, int]) -> str:
    """How a query is written for an engine that counts words: every term as often as it weighs."""
    return " ".join(" ".join([term] * weight) for term, weight in (impacts or {"[UNK]": 1}).items())


def term_impacts(store: SparseStore, tokenizer: Any, scale: int = SCALE) -> Iterator[dict[str, int]]:
    """For every row of a store its terms and impacts, heaviest weights as they come; empty where there is none."""
    names = term_names(tokenizer, store.dim)
    for _, rows in store.blocks(_BLOCK):
        impacts = quantise(rows, scale)
        for start, end in zip(impacts.indptr[:-1].tolist(), impacts.indptr[1:].tolist()):
            yield {
                names[term]: weight
                for term, weight in zip(impacts.indices[start:end].tolist(), impacts.data[start:end].tolist())
            }


def export_anserini(
    folder: str | os.PathLike,
    passages: SparseStore,
    corpus: Corpus,
    queries: SparseStore | None,
    query_table: Queries | None,
    tokenizer: Any,
    *,
    scale: int = SCALE,
    shards: int = 24,
) -> Path:
    """Writes a JsonVectorCollection and its topics, for `--impact --pretokenized` indexing and searching.

    Args:
        folder: Receives `corpus/vectors-NN.jsonl` and `queries.tsv`.
        passages: The corpus' vectors.
        corpus: The corpus, for its ids.
        queries: The queries' vectors, if topics are wanted.
        query_table: The queries, for their ids.
        tokenizer: Names the terms.
        scale: What weights are multiplied by before rounding.
        shards: How many files; document i goes to file i modulo `shards`.
    """
    folder = Path(folder)
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    bar = progress(total=len(passages), label="export", unit="passage")
    with atomic_path(folder / "corpus") as temporary:
        temporary.mkdir()
        files = [
            open(temporary / f"vectors-{number:02d}.jsonl", "w", encoding="utf-8")  # noqa: SIM115 - closed below
            for number in range(shards)
        ]
        try:
            for position, impacts in enumerate(term_impacts(passages, tokenizer, scale)):
                entry = {"id": corpus.ids_at([position])[0], "vector": impacts or {"[UNK]": 1}}
                files[position % shards].write(json.dumps(entry, ensure_ascii=False) + "\n")
                bar.update(1)
        finally:
            bar.close()
            for file in files:
                file.close()
    if queries is not None:
        # A line repeats every term as often as it weighs: those of many queries are not held.
        with atomic_path(folder / "queries.tsv") as temporary, open(temporary, "w", encoding="utf-8") as file:
            for position, impacts in enumerate(term_impacts(queries, tokenizer, scale)):
                file.write(f"{query_table.ids_at([position])[0]}\t{query_string(impacts)}\n")
    return folder


def export_ciff(path: str | os.PathLike, index: InvertedIndex, corpus: Corpus, tokenizer: Any) -> Path:
    """Writes an index in the Common Index File Format.

    Lin et al., "Supporting Interoperability Between Open-Source Search Engines with the Common Index File Format"
    (2020): length-prefixed protocol buffers, a header, a posting list a term (in the terms' byte order, documents as
    gaps), a record a document.

    Args:
        path: The file.
        index: An index of impacts.
        corpus: The corpus, for its ids.
        tokenizer: Names the terms.

    Raises:
        InputError: If the index holds floats.
    """
    if index.scale is None:
        raise InputError(
            "the index holds floats, but CIFF holds whole numbers", where="export_ciff", cure="Build it with Impact"
        )
    path = Path(path)
    frequencies = index.document_frequencies()
    names = term_names(tokenizer, index.dim)
    lengths = index.document_sums()
    order = sorted((frequencies > 0).nonzero()[0].tolist(), key=lambda term: names[term].encode())
    total = int(lengths.sum())
    header = (
        _number(1, 1)
        + _number(2, len(order))
        + _number(3, len(index))
        + _number(4, len(order))
        + _number(5, len(index))
        + _number(6, total)
        + _varint(7 << 3 | 1)
        + struct.pack("<d", total / len(index))
        + _bytes(8, f"learned sparse weights times {index.scale}".encode())
    )
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        _write(file, header)
        for term in order:
            documents, weights = index.postings(term)
            gaps = documents.copy()
            gaps[1:] -= documents[:-1]
            postings = (
                _bytes(4, _number(1, gap) + _number(2, weight)) for gap, weight in zip(gaps.tolist(), weights.tolist())
            )
            counts = _number(2, len(documents)) + _number(3, int(weights.sum()))
            _write(file, _bytes(1, names[term].encode()) + counts + b"".join(postings))
        for position, length in enumerate(lengths.tolist()):
            name = corpus.ids_at([position])[0].encode()
            _write(file, _number(1, position) + _bytes(2, name) + _number(3, length))
    return path


def _write(file: Any, message: bytes) -> None:
    file.write(_varint(len(message)) + message)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
