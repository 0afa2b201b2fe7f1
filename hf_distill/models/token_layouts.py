"""The folders of multi-vector models: those of PyLate, of sentence-transformers 6, and of Stanford's ColBERT.

PyLate's layout is the one that most programs open (sentence-transformers reads it too), so it is written where it can
say everything; else sentence-transformers' own.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json, write_json
from . import layouts, writing
from .layouts import ProjectionLayout
from .loading import read_weights


PUNCTUATION = tuple(string.punctuation)
_NATIVE = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "MultiVectorMask": "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}
# Whose flat settings stand for a model of PyLate, and what they are where they are not written.
_PYLATE_LENGTHS = {"query_length": 32, "document_length": 180}


@dataclass(frozen=True)
class TokenLayout:
    """What a folder says about a multi-vector model; None where it says nothing.

    Attributes:
        folder: Of the transformer.
        projections: The linear layers on token vectors.
        is_multi_vector: False for a model that is yet to become one.
        prompts: Text before queries and passages, markers included.
        markers: Its marker tokens, where the folder tells them from prompts.
        expansion: Width that queries are filled up to with [MASK]; 0 for none.
        attend: Whether the encoder attends to the fill.
        expansion_token: Instead of [MASK].
        skip_words: Tokens of passages that do not count.
    """

    folder: Path
    projections: tuple[ProjectionLayout, ...] = ()
    is_multi_vector: bool = True
    prompts: tuple[str, str] = ("", "")
    markers: tuple[str, str] | None = None
    query_length: int | None = None
    passage_length: int | None = None
    expansion: int | None = None
    attend: bool = False
    expansion_token: str | None = None
    skip_words: tuple[str, ...] = ()
    normalize: bool = True
    lowercase: bool = False
    template: str | None = None
    temperature: float | None = None


def read_token_layout(folder: Path, name: str) -> TokenLayout:
    """Reads the layout of a multi-vector model's folder, or of any encoder that is to become one.

    Raises:
        InputError: If the folder is no model, or one with parts that this library does not have.
    """
    layout = layouts.read_layout(folder, name)
    extra = {"template": layout.extra.get("template")}
    if layout.kind != "multi-vector":
        if layout.passage is not None:
            raise InputError("the model has two towers", where=name, cure="Give a model of one tower")
        tower = layout.query
        return TokenLayout(
            tower.folder,
            projections=(*tower.projections, *layout.shared_projections),
            is_multi_vector=False,
            lowercase=tower.lowercase,
            **extra,
        )
    extra["temperature"] = layout.extra.get("temperature")
    if not (folder / "modules.json").is_file():
        return _read_stanford(folder, name, extra)
    settings = read_json(folder / "config_sentence_transformers.json")
    transformer, projections, skip_words, normalize = _read_modules(folder, name)
    lengths = layouts.read_lengths(transformer, name)
    more = {
        **extra,
        "projections": projections,
        "normalize": normalize,
        "lowercase": bool(lengths.get("do_lower_case")),
    }
    if settings.get("similarity_fn_name") == "meanmaxsim":
        raise InputError("the model divides MaxSim by the query's length (meanmaxsim)", where=name)
    if settings["model_type"] == "ColBERT":
        return _of_pylate(transformer, settings, lengths, more)
    expansion = lengths.get("query_expansion") or settings.get("query_expansion") or {}
    prompts = settings.get("prompts") or {}
    return TokenLayout(
        transformer,
        prompts=(prompts.get("query") or "", prompts.get("document") or ""),
        # A fixed width is floor and ceiling in one.
        query_length=expansion["length"] if expansion.get("strategy") == "fixed" else lengths.get("query_length"),
        passage_length=lengths.get("document_length"),
        expansion=expansion.get("length", 0),
        attend=bool(expansion.get("attend")),
        expansion_token=expansion.get("token"),
        skip_words=tuple(skip_words or ()),
        **more,
    )


def _of_pylate(folder: Path, settings: dict[str, Any], lengths: dict[str, Any], more: dict[str, Any]) -> TokenLayout:
    markers = tuple(settings.get(key) or "" for key in ("query_prefix", "document_prefix"))
    prompts = settings.get("prompts") or {}
    texts = [(prompts.get(key) or "").removeprefix(marker) for key, marker in zip(("query", "document"), markers)]
    found = {key: settings.get(key) or lengths.get(key) or usual for key, usual in _PYLATE_LENGTHS.items()}
    skip_words = settings.get("skiplist_words")
    return TokenLayout(
        folder,
        prompts=(texts[0], texts[1]),
        markers=(markers[0], markers[1]),
        query_length=found["query_length"],
        passage_length=found["document_length"],
        expansion=found["query_length"] if settings.get("do_query_expansion", True) is not False else 0,
        attend=bool(settings.get("attend_to_expansion_tokens", settings.get("attend_to_mask_tokens"))),
        # PyLate leaves punctuation out where its settings do not speak of it.
        skip_words=PUNCTUATION if skip_words is None else tuple(skip_words),
        **more,
    )


def _read_stanford(folder: Path, name: str, extra: dict[str, Any]) -> TokenLayout:
    path = folder / "artifact.metadata"
    metadata = read_json(path) if path.is_file() else {}
    length = metadata.get("query_maxlen") or 32
    return TokenLayout(
        folder,
        projections=(_inline_projection(folder, name),),
        markers=(metadata.get("query_token_id") or "[unused0]", metadata.get("doc_token_id") or "[unused1]"),
        query_length=length,
        passage_length=metadata.get("doc_maxlen") or _PYLATE_LENGTHS["document_length"],
        expansion=length,
        attend=bool(metadata.get("attend_to_mask_tokens")),
        skip_words=PUNCTUATION if metadata.get("mask_punctuation", True) else (),
        **extra,
    )


def _inline_projection(folder: Path, name: str) -> ProjectionLayout:
    """The projection of Stanford's checkpoints, whose weight stands as `linear.weight` beside the transformer's."""
    weight = read_weights(folder).get("linear.weight")
    if weight is None:
        raise InputError("the checkpoint lacks the weight 'linear.weight', its projection", where=name)
    width, hidden = weight.shape
    return ProjectionLayout(hidden, width, bias=False, folder=folder)


def _read_modules(folder: Path, name: str) -> tuple[Path, tuple[ProjectionLayout, ...], list[str] | None, bool]:
    """The transformer's folder, the projections, the words of the mask module, and whether a normalisation ends it."""
    transformer, projections, words, is_pylate = None, [], None, True
    normalize = False
    for entry in sorted(read_json(folder / "modules.json"), key=lambda module: module.get("idx", 0)):
        kind, path = (
            layouts.module_class(entry["type"], name),
            layouts.module_folder(folder, entry.get("path", ""), name),
        )
        config = read_json(path / "config.json") if kind != "Transformer" and (path / "config.json").is_file() else {}
        where = f"{name}, {path.name}"
        if kind == "Transformer":
            transformer = path
        elif kind == "Dense":
            if config.pop("module_input_name", "token_embeddings") != "token_embeddings":
                raise InputError("the Dense module does not work on token vectors", where=where)
            projections.append(layouts.read_dense(config, path, where))
        elif kind == "MultiVectorMask":
            is_pylate, words = False, config.get("skiplist_words") or []
            if config.get("keep_only_token_ids") or config.get("skiplist_tasks", ["document"]) != ["document"]:
                raise InputError("the model's mask leaves out more than words of passages", where=where)
        elif kind == "Normalize":
            is_pylate, normalize = False, True
        else:
            raise InputError(
                f"modules of type {kind} are not supported",
                where=where,
                cure="Supported are Transformer, Dense, MultiVectorMask and Normalize",
            )
    if transformer is None:
        raise InputError("modules.json lists no Transformer", where=name, cure="Copy or download the model again")
    # PyLate masks and normalises in its own code, without modules for it.
    return transformer, tuple(projections), words, normalize or is_pylate


# ---------------------------------------------------------------------------------------------------- writing


def write_pylate(folder: Path, config: Any, projections: list) -> None:
    """Writes what stands beside the transformer in PyLate's layout.

    Args:
        folder: The model's folder.
        config: A [`MultiVectorConfig`] that [`fits_pylate`].
        projections: Pairs of [`ProjectionLayout`] and the tensors `linear.weight` (and `linear.bias`).
    """
    entries = [("", "Transformer")]
    for number, projection in enumerate(projections, start=1):
        path = writing.write_dense(folder, f"{number}_Dense", *projection)
        entries.append((path, "pylate.models.Dense.Dense"))
    writing.write_modules(folder, entries)
    writing.write_lengths(folder, config.passage_length, config.passage_length)
    writing.write_settings(
        folder,
        "ColBERT",
        {},
        similarity_fn_name="MaxSim",
        query_prefix=config.query_marker,
        document_prefix=config.passage_marker,
        query_length=config.query_length,
        document_length=config.passage_length,
        do_query_expansion=bool(config.query_expansion),
        attend_to_expansion_tokens=config.attend_to_expansion,
        skiplist_words=list(config.skip_words),
    )


def fits_pylate(config: Any) -> bool:
    """Whether PyLate's settings can say what `config` says: a projection, unit vectors, markers and no prompts."""
    return bool(
        config.projections
        and config.normalize
        and not config.query_prompt
        and not config.passage_prompt
        and config.query_expansion in (0, config.query_length)
        and config.expansion_token is None
    )


def write_native(folder: Path, config: Any, projections: list) -> None:
    """Writes what stands beside the transformer in sentence-transformers 6's own layout; see [`write_pylate`]."""
    entries = [("", _NATIVE["Transformer"])]
    for number, projection in enumerate(projections, start=1):
        path = writing.write_dense(folder, f"{number}_Dense", *projection, module_input_name="token_embeddings")
        entries.append((path, _NATIVE["Dense"]))
    path = f"{len(entries)}_MultiVectorMask"
    write_json(
        folder / path / "config.json", {"skiplist_words": list(config.skip_words), "skiplist_tasks": ["document"]}
    )
    entries.append((path, _NATIVE["MultiVectorMask"]))
    if config.normalize:
        path = f"{len(entries)}_Normalize"
        write_json(folder / path / "config.json", {"module_input_name": "token_embeddings"})
        entries.append((path, _NATIVE["Normalize"]))
    writing.write_modules(folder, entries)
    lengths: dict[str, Any] = {"module_output_name": "token_embeddings", "document_length": config.passage_length}
    if config.query_expansion:
        lengths["query_expansion"] = {
            "strategy": "fixed" if config.query_expansion == config.query_length else "min",
            "attend": config.attend_to_expansion,
            "token": config.expansion_token,
            "length": config.query_expansion,
        }
    write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "query_length": config.query_length,
            **lengths,
        },
    )
    prompts = {
        "query": config.query_marker + config.query_prompt,
        "document": config.passage_marker + config.passage_prompt,
    }
    writing.write_settings(folder, "MultiVectorEncoder", prompts, similarity_fn_name="maxsim")
