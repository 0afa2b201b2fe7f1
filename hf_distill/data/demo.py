"""The demo collection: find a Python function by what it does, made from the docstrings of installed packages.

A query is the first sentence of a docstring; the passage to find is the signature and the rest of that docstring,
under the dotted name. Nothing is downloaded, and nothing is imported: see [`~hf_distill.data.docstrings`].
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import os
import platform
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from ..console import get_logger, progress
from ..errors import InputError
from .docstrings import STANDARD_LIBRARY, DocRecord, documented, package_root, source_files


logger = get_logger(__name__)

PACKAGES = (
    STANDARD_LIBRARY,
    *"PIL accelerate aiohttp click datasets dateutil evaluate fontTools fsspec huggingface_hub hypothesis jinja2"
    " joblib matplotlib mpmath networkx numba numpy pandas peft psutil pyarrow pydantic pygments requests rich"
    " safetensors scipy sentence_transformers sklearn sympy tensorboard tokenizers torch tqdm transformers".split(),
)
"""Where docstrings are taken from, as far as installed."""

_MOST_WORDS = 160  # of a passage: about what a model of 256 word pieces reads
_LARGEST_SHARE = 0.15  # of one package in the collection
_SPLIT_SHARES = {"test": 0.12, "dev": 0.08}
_STOP_WORDS = frozenset(
    "a all an and any are as at be by can each for from given has have if in into is it its of on or other return"
    " returns that the this to used using when which whether with will get gets set sets object objects self class"
    " function method instance value values".split()
)
_NO_QUESTION = re.compile(
    r"deprecated|docstring|super\(\)|subclass(es)? (should|must)|not implemented|configuration class to store"
    r"|for (more )?(details|documentation)",
    re.IGNORECASE,
)


def build_demo_collection(
    folder: str | os.PathLike,
    *,
    num_passages: int = 8000,
    seed: int = 0,
    modules: Sequence[str] | None = None,
) -> Any:
    """Makes the demo collection and saves it in the layout of the other collections.

    The result is a function of the arguments and of the installed packages' versions.

    Args:
        folder: A new or empty folder.
        num_passages: Size of the corpus; every passage has one query. All that is found where there is less.
        seed: Chooses the docstrings and the split of every module.
        modules: Packages to read instead of `PACKAGES`; `"python"` is the standard library.

    Returns:
        The saved `Collection`, named `demo`, with splits train, dev and test that share no module.

    Raises:
        InputError: When a named package has no source here, or too little is documented.
    """
    from .export import save_collection

    if num_passages < 1:
        raise InputError(f"{num_passages} is not a size", where="num_passages", cure="Use some thousands")
    for module in modules or ():
        if package_root(module) is None:
            raise InputError(
                f"no package {module!r} with Python source is installed",
                where="modules",
                cure="Use top-level names of installed packages, or 'python' for the standard library",
            )
    found = read_docstrings([name for name in modules or PACKAGES if package_root(name) is not None])
    records = select_records(found, num_passages, seed)
    splits = split_by_module(records, seed)
    empty = [name for name in ("train", *_SPLIT_SHARES) if name not in splits.values()]
    if empty:
        raise InputError(
            f"{len(records)} usable docstrings, too few for a split {empty[0]!r} of its own modules",
            where="modules",
            cure="Name more packages",
        )
    logger.info("Demo collection: %d passages chosen from %d docstrings.", len(records), len(found))
    collection = _collection(records, splits)
    save_collection(collection, folder, card=_card(records, splits, len(found), num_passages, seed))
    collection.source = str(folder)
    return collection


def read_docstrings(packages: Iterable[str]) -> list[DocRecord]:
    """All documented functions, methods and classes of some packages, in a fixed order."""
    files = [(package, path) for package in packages for path in source_files(package)]
    records = []
    # Syntax trees are many small objects without cycles; collecting them again and again costs a third of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        for package, path in progress(files, label="Reading docstrings", unit="file"):
            records.extend(documented(package, path))
    finally:
        if collecting:
            gc.enable()
    return records


def select_records(records: Iterable[DocRecord], num_passages: int, seed: int) -> list[DocRecord]:
    """Up to `num_passages` records that make good questions, without copies, no package above its share.

    A summary that three or more share ("Fit the model") asks for nothing in particular and goes altogether; of other
    copies the first stays. Near copies are found by sketches of their word 4-grams, names aside.
    """
    good = [record for record in records if _is_good(record)]
    times = Counter(_normal(record.summary) for record in good)
    names, asked, kept = set(), set(), []
    sketches: dict[int, list[int]] = defaultdict(list)
    for record in good:
        question = _normal(record.summary)
        anonymous = _anonymous(record)
        keys = {question, " ".join(anonymous[0])}
        if times[question] > 2 or record.name in names or keys & asked or not anonymous[0]:
            continue
        sketch = _sketch(anonymous[1])
        shared = Counter(other for part in sketch for other in sketches[part])
        names.add(record.name)
        if shared and max(shared.values()) * 2 >= len(sketch):
            continue
        asked |= keys
        for part in sketch:
            sketches[part].append(len(kept))
        kept.append(record)
    kept.sort(key=lambda record: _rank(seed, record.name))
    kept = _within_shares(kept, num_passages)
    return sorted(kept, key=lambda record: record.name)


def split_by_module(records: Sequence[DocRecord], seed: int) -> dict[str, str]:
    """The split of every module group (`scipy.stats`, `asyncio`): about 80 % train, 8 % dev, 12 % test.

    Groups that hold a large part of the collection are for training; of the others, a seeded order fills test, then
    dev, and the rest is for training.
    """
    sizes = Counter(module_group(record) for record in records)
    order = sorted(sizes, key=lambda group: _rank(seed, group))
    splits = dict.fromkeys(order, "train")
    small = [group for group in order if sizes[group] <= max(0.025 * len(records), 1)]
    for name, share in _SPLIT_SHARES.items():
        held_out = 0
        while small and held_out < share * len(records):
            group = small.pop(0)
            splits[group] = name
            held_out += sizes[group]
    return splits


def module_group(record: DocRecord) -> str:
    """The unit of the splits: a module of the standard library, else a package's first level."""
    parts = record.title.split(".")
    if record.package == STANDARD_LIBRARY:
        return parts[0]
    return ".".join(parts[:2]) if len(parts) > 2 else parts[0]


# -- choosing -----------------------------------------------------------------------------------------------------


def _is_good(record: DocRecord) -> bool:
    """Whether the summary is a question one could ask and the body says enough to recognise the answer."""
    summary, words = record.summary, record.summary.split()
    if not 4 <= len(words) <= 30 or not summary.isascii() or re.search(r"[{}\[\]|\\=<>@%]|>>>|\.\.\.", summary):
        return False
    if _NO_QUESTION.search(summary):
        return False
    body = _words(record.body)
    if len(body) < 10 or sum(character.isascii() for character in record.body) < 0.97 * len(record.body):
        return False
    if re.match(r"(see|refer to|please see)\b", record.body, re.IGNORECASE) and len(body) < 25:
        return False
    if _normal(summary) in " ".join(body):
        return False
    content = {word for word in _words(summary) if word not in _STOP_WORDS and len(word) > 1}
    name = _name_words(record.title)
    told = {word for word in content if not any(_same_stem(word, part) for part in name)}
    return len(content) >= 3 and len(told) >= 1


def _same_stem(word: str, other: str) -> bool:
    shorter = min(len(word), len(other))
    return word[: max(4, shorter - 2)] == other[: max(4, shorter - 2)]


def _within_shares(records: list[DocRecord], num_passages: int) -> list[DocRecord]:
    """The first `num_passages`, of each package no more than its share (or more only where all others are used up)."""
    limit = max(int(_LARGEST_SHARE * min(num_passages, len(records))), 1)
    taken: Counter[str] = Counter()
    chosen, spare = [], []
    for record in records:
        taken[record.package] += 1
        (chosen if taken[record.package] <= limit else spare).append(record)
    return (chosen + spare)[:num_passages]


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _normal(text: str) -> str:
    return " ".join(_words(text))


def _name_words(title: str) -> set[str]:
    split = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", title.replace("_", " "))
    return set(_words(split)) | set(_words(title))


def _anonymous(record: DocRecord) -> tuple[list[str], list[str]]:
    """Words of the summary, and of summary and body, without those of the name: `BertTokenizer` is `RobertaTokenizer`
    then."""
    name = _name_words(record.title)
    summary = [word for word in _words(record.summary) if word not in name]
    return summary, summary + [word for word in _words(record.body) if word not in name]


def _sketch(words: Sequence[str], size: int = 12) -> list[int]:
    """The smallest hashes of the word 4-grams: two texts share as large a part of them as of their 4-grams."""
    grams = {zlib.crc32(" ".join(words[i : i + 4]).encode()) for i in range(max(len(words) - 3, 1))}
    return sorted(grams)[:size]


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


# -- writing ------------------------------------------------------------------------------------------------------


def passage_text(record: DocRecord) -> str:
    """Signature and body, cut to as many words as a small model reads."""
    text = f"{record.signature}\n{record.body}"
    words = list(re.finditer(r"\S+", text))
    return text if len(words) <= _MOST_WORDS else text[: words[_MOST_WORDS - 1].end()] + " …"


def _collection(records: Sequence[DocRecord], splits: dict[str, str]) -> Any:
    from .collection import Collection
    from .qrels import Qrels
    from .tables import Corpus, Queries

    # The query's identifier differs from its passage's: several tools drop a passage with the id of the query.
    queries = [{"query_id": f"{record.name}?", "text": record.summary} for record in records]
    corpus = [{"document_id": record.name, "title": record.title, "text": passage_text(record)} for record in records]
    places: dict[str, list[int]] = {name: [] for name in ("train", "dev", "test")}
    for position, record in enumerate(records):
        places[splits[module_group(record)]].append(position)
    return Collection(
        name="demo",
        queries=Queries.from_records(queries, where="demo queries"),
        corpus=Corpus.from_records(corpus, where="demo corpus"),
        qrels={name: Qrels(found, found, [1] * len(found)) for name, found in places.items()},
    )


def _card(records: Sequence[DocRecord], splits: dict[str, str], found: int, num_passages: int, seed: int) -> str:
    counts = Counter(record.package for record in records)
    queries = Counter(splits[module_group(record)] for record in records)
    groups = Counter(splits.values())
    sources = "\n".join(
        f"| {package} | {' | '.join(_origin(package))} | {count:,} |"
        for package, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )
    parts = "\n".join(f"| {name} | {queries[name]:,} | {groups[name]:,} |" for name in ("train", "dev", "test"))
    held_out = ", ".join(sorted(group for group, split in splits.items() if split == "test"))
    return f"""---
pretty_name: Python documentation search
language:
- en
task_categories:
- text-retrieval
tags:
- code-search
- hf-distill
---

# Python documentation search

Find a Python function, method or class by what it does. A **query** is the first sentence of a docstring, for
example *"{_shown(records)}"*; the **passage** to find has the dotted name
as its title, and as its text the signature and the rest of the docstring, without that sentence. Every query has one
relevant passage in one corpus of {len(records):,}.

The collection was made on this machine from the source of installed packages, which were parsed and not imported.
The texts belong to these packages and stay under their licences.

| split | queries | modules |
|---|---:|---:|
{parts}

The splits share no module: a module of the standard library, or a first-level module of a package (`scipy.stats`), is
in one split as a whole. Test modules: {held_out}.

## How it was made

`build_demo_collection(num_passages={num_passages}, seed={seed})` found {found:,} docstrings with a summary and a body.
Markup, doctests, code blocks, references and lists of other functions were removed. Left out were: summaries under
4 or over 30 words, with fewer than 3 words of content, or that only restate the name; bodies under 10 words or
that repeat the summary; summaries that three or more docstrings share; copies and near copies (by word 4-grams,
the words of the name aside). A package has at most {_LARGEST_SHARE:.0%} of the passages while others have some
left. A passage is cut after {_MOST_WORDS} words.

Mind what follows from this: queries are written by the author of the passage, so they share its vocabulary; and a
query can have other good answers than its own docstring, which count as wrong.

## Sources

| package | version | licence | passages |
|---|---|---|---:|
{sources}
"""


def _shown(records: Sequence[DocRecord]) -> str:
    return min((record.summary for record in records), key=lambda text: (abs(len(text.split()) - 9), text))


def _origin(package: str) -> tuple[str, str]:
    """Version and licence of the distribution that a package belongs to."""
    if package == STANDARD_LIBRARY:
        return platform.python_version(), "PSF-2.0"
    names = sorted(set(importlib.metadata.packages_distributions().get(package, [])))
    if not names:
        return "?", "?"
    metadata = importlib.metadata.metadata(names[0])
    classifiers = [c.rsplit(" :: ", 1)[-1] for c in metadata.get_all("Classifier", []) if c.startswith("License ::")]
    licence = metadata.get("License-Expression") or ", ".join(classifiers) or metadata.get("License") or "?"
    return metadata["Version"], licence.splitlines()[0].replace("|", "/")[:60]
