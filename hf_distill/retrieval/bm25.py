"""BM25 by the library bm25s: the lexical baseline and first stage."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.run import Run
from ..errors import InputError
from ..passages import DEFAULT_TEMPLATE
from .searching import HasTexts, _all_or, read_search, run_search
from .shards import ShardedJob, default_shard_rows


if TYPE_CHECKING:
    from ..data import Corpus

# Raised by hand when the same key would give another index or run.
BM25_VERSION = 1

_BLOCK_TEXTS = 8192
_SHARD_QUERIES = 16384
# Below this many query-document pairs the compilation of numba costs more than it saves.
_NUMBA_PAIRS = 10**9


class BM25Index:
    """A corpus indexed for BM25 in Lucene's form: lower-cased words, stemmed, without stop words.

    Args:
        corpus: The passages.
        k1: Saturation of term frequencies.
        b: Weight of the passage's length.
        language: Of the Snowball stemmer; None for no stemming.
        stopwords: A language of bm25s, `"en"` for example; None to keep all words.
        template: How title and text become one passage.
        cache_dir: Instead of the default cache folder.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        k1: float = 1.2,
        b: float = 0.75,
        language: str | None = "english",
        stopwords: str | None = "en",
        template: str = DEFAULT_TEMPLATE,
        cache_dir: str | os.PathLike | None = None,
    ):
        import bm25s

        self.corpus, self.template = corpus, template
        self._language, self._stopwords = language, stopwords
        self._stemmer = _stemmer(language)
        self.key = {
            "version": BM25_VERSION,
            "table": corpus.fingerprint,
            "k1": k1,
            "b": b,
            "language": language,
            "stopwords": stopwords,
            "template": template,
            "bm25s": bm25s.__version__,
        }
        job = ShardedJob.cached("bm25", self.key, 1, cache_dir, suffix="", info={"texts": corpus.where})

        def write(_: int, folder: Path) -> None:
            index = bm25s.BM25(method="lucene", k1=k1, b=b)
            ids, vocabulary = self._tokenise_corpus()
            index.index((ids, vocabulary), show_progress=False)
            index.save(str(folder), show_progress=False)

        job.run(write, "index for BM25", unit="index")
        self._index = bm25s.BM25.load(str(job.path(0)), mmap=True, load_corpus=False)

    def search(self, questions: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores `float32[n, k]` and positions `int64[n, k]` of the best passages that share a word with a question.

        Where scores are equal, positions ascend; -inf and -1 where fewer passages share a word.
        """
        import bm25s

        k = min(k, len(self.corpus))
        tokens = bm25s.tokenize(
            list(questions),
            stopwords=self._stopwords or [],
            stemmer=self._stemmer,
            return_ids=False,
            show_progress=False,
        )
        if self.backend(len(questions)) == "numba":
            self._index.activate_numba_scorer()
        self._index.backend = self.backend(len(questions))
        found = self._index.retrieve(tokens, k=k, show_progress=False, sorted=True)
        scores = np.asarray(found.scores, dtype=np.float32)
        positions = np.where(scores > 0, np.asarray(found.documents, dtype=np.int64), -1)
        scores = np.where(scores > 0, scores, -np.inf).astype(np.float32)
        order = np.lexsort((positions, -scores), axis=1)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(positions, order, 1)

    def backend(self, questions: int) -> str:
        """How so many questions at once are answered, `"numba"` or `"numpy"`."""
        return "numba" if questions * len(self.corpus) >= _NUMBA_PAIRS and _has_numba() else "numpy"

    def _tokenise_corpus(self) -> tuple[list[list[int]], dict[str, int]]:
        """Word numbers of every passage, and the words; a block of texts at a time."""
        import bm25s

        vocabulary: dict[str, int] = {}
        ids: list[Any] = []
        for texts in self._blocks():
            found = bm25s.tokenize(
                texts, stopwords=self._stopwords or [], stemmer=self._stemmer, return_ids=True, show_progress=False
            )
            # Numbers of this block's words in the common list.
            common = np.empty(len(found.vocab), dtype=np.int32)
            # bm25s numbers words in the order of a set, which Python shuffles from process to process.
            for word in sorted(found.vocab):
                common[found.vocab[word]] = vocabulary.setdefault(word, len(vocabulary))
            ids.extend(common[np.asarray(document, dtype=np.int64)] for document in found.ids)
        return ids, vocabulary

    def _blocks(self) -> Iterator[list[str]]:
        for start in range(0, len(self.corpus), _BLOCK_TEXTS):
            yield self.corpus.texts(np.arange(start, min(start + _BLOCK_TEXTS, len(self.corpus))), self.template)


def bm25_search(
    collection: HasTexts,
    query_positions: Sequence[int] | np.ndarray | None = None,
    k: int = 100,
    *,
    k1: float = 1.2,
    b: float = 0.75,
    language: str | None = "english",
    stopwords: str | None = "en",
    template: str = DEFAULT_TEMPLATE,
    cache_dir: str | os.PathLike | None = None,
) -> Run:
    """The k best documents of each query by BM25; index and results are kept in the cache.

    Documents that share no word with the query are not part of the result.

    Args:
        collection: Anything with `queries` and `corpus`.
        query_positions: `int[n]`, the queries to search for; all by default.
        k: How many documents.
        k1: Saturation of term frequencies.
        b: Weight of the passage's length.
        language: Of the Snowball stemmer; None for no stemming.
        stopwords: A language of bm25s; None to keep all words.
        template: How title and text become one passage.
        cache_dir: Instead of the default cache folder.
    """
    if k < 1:
        raise InputError(f"k is {k}", where="bm25_search", cure="Ask for one document at least")
    query = _all_or(query_positions, collection.queries)
    width = min(k, len(collection.corpus))
    if not len(query):
        return Run(query, np.empty((0, width), np.int64), np.empty((0, width), np.float32))
    index = BM25Index(
        collection.corpus,
        k1=k1,
        b=b,
        language=language,
        stopwords=stopwords,
        template=template,
        cache_dir=cache_dir,
    )
    wanted = collection.queries.select(query)
    rows = default_shard_rows(len(query), _SHARD_QUERIES)
    key = {**index.key, "queries": wanted.fingerprint, "k": width, "shard_rows": rows, "backend": index.backend(rows)}
    job = ShardedJob.cached("bm25-search", key, -(-len(query) // rows), cache_dir)
    run_search(job, rows, width, lambda a, z: index.search(wanted.texts(np.arange(a, z)), width), len(query))
    documents, scores = read_search(job)
    return Run(query, documents, scores).sorted(collection.corpus)


def _stemmer(language: str | None) -> Any:
    if language is None:
        return None
    import Stemmer

    try:
        return Stemmer.Stemmer(language)
    except KeyError:
        raise InputError(
            f"there is no stemmer for {language!r}",
            where="BM25 language",
            cure=f"Use one of: {', '.join(Stemmer.algorithms())}; or None for no stemming",
        ) from None


def _has_numba() -> bool:
    import importlib.util

    return importlib.util.find_spec("numba") is not None
