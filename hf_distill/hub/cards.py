"""Model cards made from a run's figures, through the templates in `model_cards/`."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..files import write_text
from .client import split_revision


if TYPE_CHECKING:
    from huggingface_hub import EvalResult


def template_path(name: str) -> Path:
    """The card template `name` (without ending) of this checkout or installation.

    Raises:
        InputError: If there is none.
    """
    checkout = Path(__file__).parents[2] / "model_cards"
    installed = Path(sysconfig.get_path("data")) / "share" / "hf_distill" / "model_cards"
    for folder in (checkout, installed):
        path = folder / f"{name}.md"
        if path.is_file():
            return path
    raise InputError(f"there is no card template {name}.md", where=str(checkout), cure="Reinstall hf_distill")


# How a model is loaded and used without this package, by what it makes of texts (see `RetrievalModel.representation`).
_PAIRS = 'scores = model.predict([("a query", "a passage")])'
_VECTORS = (
    'queries = model.encode_query(["a query"])\n'
    'passages = model.encode_document(["a passage"])\n'
    "scores = model.similarity(queries, passages)"
)
_USAGE = {
    "dense": ("SentenceTransformer", _VECTORS, "sentence-similarity"),
    "sparse": ("SparseEncoder", _VECTORS, "feature-extraction"),
    "tokens": ("MultiVectorEncoder", _VECTORS, "sentence-similarity"),
    "pair": ("CrossEncoder", _PAIRS, "text-ranking"),
    "masked_lm": ("AutoModelForMaskedLM", 'tokenizer = AutoTokenizer.from_pretrained("{name}")', "fill-mask"),
}


def usage_of(kind: str, name: str) -> str:
    """How a checkpoint is loaded without this package.

    Args:
        kind: What the model makes of texts: `"dense"`, `"sparse"`, `"tokens"` or `"pair"`; or
            `"masked_lm"` for a model that has yet to be fine-tuned.
        name: Its Hub id or folder.
    """
    loader, use, _ = _USAGE[kind]
    if kind == "masked_lm":
        code = f'from transformers import {loader}, AutoTokenizer\n\nmodel = {loader}.from_pretrained("{name}")\n'
        return f"A masked language model, to be fine-tuned:\n\n```python\n{code}{use.format(name=name)}\n```"
    code = f'from sentence_transformers import {loader}\n\nmodel = {loader}("{name}")\n{use}'
    return f"Nothing but sentence-transformers (or plain transformers) is needed:\n\n```python\n{code}\n```"


def bibtex(paper: Mapping[str, str] | None) -> str | None:
    """A BibTeX entry of a trainer's paper."""
    if paper is None:
        return None
    key = f"{paper['authors'].split(',')[0].split()[-1].lower()}{paper['year']}"
    lines = [f"  {name} = {{{paper[name]}}}" for name in ("title", "year") if name in paper]
    authors = " and ".join(author.strip() for author in paper["authors"].split(","))
    lines.insert(1, f"  author = {{{authors}}}")
    if "arxiv" in paper:
        lines += [f"  eprint = {{{paper['arxiv']}}}", "  archivePrefix = {arXiv}"]
    return "@misc{" + key + ",\n" + ",\n".join(lines) + "\n}"


def write_model_card(
    folder: str | Path,
    *,
    title: str,
    summary: str,
    kind: str,
    results: str,
    training: str,
    reading: str = "",
    template: str = "student",
    base_models: Sequence[str] = (),
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    measured: Mapping[str, float] | None = None,
    collection: str | None = None,
    split: str | None = None,
    citation: str | None = None,
    teachers: Sequence[str] = (),
    dataset_revision: str | None = None,
    model_id: str | None = None,
) -> Path:
    """Writes `README.md`, a model card with the metadata that the Hub reads.

    Args:
        folder: The checkpoint.
        title, summary, results, training, reading: Texts of its sections.
        kind: What the model makes of texts, see [`usage_of`].
        template: Name of the template.
        base_models: What the model started from; local folders are left out of the metadata.
        datasets: Hub ids of the data.
        tags: Further tags.
        measured: Measures of the student, for the metadata.
        collection, split: What they were measured on.
        citation: BibTeX.
        teachers: Its teachers; like `base_models`.
        dataset_revision: The commit of the data that the measures belong to.
        model_id: The repository; the name of the folder by default.

    Returns:
        The file's path.
    """
    from huggingface_hub import ModelCard, ModelCardData

    library = "transformers" if kind == "masked_lm" else "sentence-transformers"
    data = ModelCardData(
        library_name=library,
        pipeline_tag=_USAGE[kind][2],
        base_model=on_hub([*base_models, *teachers]) or None,
        datasets=on_hub(datasets) or None,
        tags=[*dict.fromkeys([library, *tags])],
        model_name=title,
        eval_results=_evaluations(measured or {}, collection or "local", split, dataset_revision) or None,
        **({"teachers": on_hub(teachers)} if on_hub(teachers) else {}),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(template_path(template)),
        title=title,
        summary=summary,
        usage=usage_of(kind, model_id or Path(folder).name),
        results=results,
        reading=reading,
        training=training,
        citation=citation,
    )
    path = Path(folder) / "README.md"
    write_text(path, str(card))
    return path


def _evaluations(
    measured: Mapping[str, float], dataset: str, split: str | None, revision: str | None
) -> list[EvalResult]:
    """Measures as the metadata of a card has them."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-retrieval",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            dataset_revision=revision,
            metric_type=name.lower().replace("@", "_at_"),
            metric_name=name,
            metric_value=round(float(value), 4),
        )
        for name, value in measured.items()
    ]


def on_hub(names: Sequence[str]) -> list[str]:
    """Those of the names that can be ids of the Hub; folders of this machine mean nothing to others."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from ..models.source import split_kind

    found = []
    ids = [split_kind(name)[1] for name in names]
    for name in dict.fromkeys(split_revision(name)[0] for name in ids if not Path(name).exists()):
        try:
            validate_repo_id(name)
        except HFValidationError:
            continue
        found.append(name)
    return found
