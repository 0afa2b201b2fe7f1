"""What a lexical model sees: the heaviest terms of a query and a passage, and the terms that make their score."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..files import atomic_path


if TYPE_CHECKING:
    from ..models import LexicalRetriever

_QUERY, _PASSAGE, _SHARED = "#0072B2", "#D55E00", "#009E73"


class Terms(NamedTuple):
    """Terms with their weights, the heaviest first.

    Attributes:
        query: Of the query.
        passage: Of the passage.
        shared: Of the score: the products of the weights of terms that both have.
    """

    query: dict[str, float]
    passage: dict[str, float]
    shared: dict[str, float]


def text_terms(model: LexicalRetriever, query: str, passage: str, dtype: str = "float32") -> Terms:
    """The terms of one query and one rendered passage.

    Args:
        model: The model.
        query: Without prompt.
        passage: Without prompt.
        dtype: Precision of encoding.
    """
    from ..models.lexical import term_names
    from ..retrieval import encode_texts

    names = term_names(model.tokenizer, model.embedding_size)
    weights = []
    for text, kind in ((query, "query"), (passage, "passage")):
        row = encode_texts(model, [text], kind, dtype=dtype)
        weights.append({int(term): float(weight) for term, weight in zip(row.indices, row.data)})
    shared = {term: weight * weights[1][term] for term, weight in weights[0].items() if term in weights[1]}

    def named(found: dict[int, float]) -> dict[str, float]:
        order = sorted(found.items(), key=lambda item: (-item[1], item[0]))
        return {names[term]: weight for term, weight in order}

    return Terms(*(named(found) for found in (*weights, shared)))


def plot_terms(terms: Terms, path: str | os.PathLike, *, top: int = 15, title: str | None = None) -> Path:
    """Bars of the heaviest terms of query and passage, and of the terms that make the score.

    Terms that both have are drawn full, others pale.

    Args:
        terms: From `text_terms`.
        path: The PNG.
        top: Terms to draw of each.
        title: Above the plot.
    """
    from matplotlib.figure import Figure

    score = sum(terms.shared.values())
    panels = (
        (f"query: {len(terms.query)} terms", terms.query, _QUERY),
        (f"passage: {len(terms.passage)} terms", terms.passage, _PASSAGE),
        (f"score {score:.2f}: {len(terms.shared)} shared terms", terms.shared, _SHARED),
    )
    figure = Figure(figsize=(11, 1.2 + 0.28 * min(top, max(len(found) for _, found, _ in panels) or 1)))
    for axes, (heading, found, colour) in zip(figure.subplots(1, 3), panels):
        names = list(found)[:top]
        bars = axes.barh(range(len(names)), [found[name] for name in names], color=colour)
        for bar, name in zip(bars, names):
            bar.set_alpha(1.0 if name in terms.shared else 0.35)
        # A dollar sign would begin a formula.
        axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
        axes.invert_yaxis()
        axes.set_title(heading, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title.replace("$", r"\$"), fontsize=11)
    figure.tight_layout()
    path = Path(path)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return path
