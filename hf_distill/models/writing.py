"""The files beside a model's weights, as sentence-transformers reads them.

Older paths and keys are written, which every one of its versions understands.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_json
from .layouts import ACTIVATIONS, POOLING_KEYS, ProjectionLayout


if TYPE_CHECKING:
    import torch

# Modules that are not in sentence_transformers.models.
_MODULE_PACKAGES = {
    "SpladePooling": "sentence_transformers.sparse_encoder.models",
    "MultiVectorMask": "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask",
}


def module_path(kind: str) -> str:
    """Where sentence-transformers has a class of modules; a full path is left as it is."""
    return kind if "." in kind else f"{_MODULE_PACKAGES.get(kind, 'sentence_transformers.models')}.{kind}"


def write_dense(
    folder: Path, path: str, layout: ProjectionLayout, tensors: dict[str, torch.Tensor], **more: Any
) -> str:
    """Writes a Dense module and returns its path.

    Args:
        folder: The model's folder.
        path: The module's folder in it.
        layout: What it is.
        tensors: `linear.weight` (and `linear.bias`).
        more: Further settings of its configuration.
    """
    from safetensors.torch import save_file

    config = layout.settings() | {"activation_function": ACTIVATIONS[layout.activation]} | more
    del config["activation"]
    write_json(folder / path / "config.json", config)
    save_file(tensors, folder / path / "model.safetensors", metadata={"format": "pt"})
    return path


def write_tail(
    folder: Path, pooling: str | None, dimension: int, projections: list, normalize: bool, prefix: str = ""
) -> list[tuple[str, str]]:
    """Writes the modules after a transformer into `folder` and returns their (path, class) in order.

    Args:
        folder: Where the module folders are made.
        pooling: `"cls"`, `"mean"`, `"last"`, or None for no pooling module.
        dimension: Width of the transformer's hidden states.
        projections: Pairs of [`ProjectionLayout`] and the tensors `linear.weight` (and `linear.bias`).
        normalize: Whether a normalisation ends the list.
        prefix: Put before the names of the module folders, which are numbered from 1.
    """
    entries: list[tuple[str, str]] = []
    if pooling is not None:
        chosen = {"last": "lasttoken"}.get(pooling, pooling)
        config = {"word_embedding_dimension": dimension, "include_prompt": True}
        config |= {key: mode == chosen for mode, key in POOLING_KEYS.items()}
        entries.append((f"{prefix}1_Pooling", "Pooling"))
        write_json(folder / entries[-1][0] / "config.json", config)
    for layout, tensors in projections:
        entries.append((write_dense(folder, f"{prefix}{1 + len(entries)}_Dense", layout, tensors), "Dense"))
    if normalize:
        entries.append((f"{prefix}{1 + len(entries)}_Normalize", "Normalize"))
        (folder / entries[-1][0]).mkdir(parents=True, exist_ok=True)
    return entries


def write_lexical_tail(folder: Path, terms: int, skipped_tokens: tuple[str, ...]) -> list[tuple[str, str]]:
    """Writes the modules after a masked-LM transformer and returns their (path, class) in order.

    Args:
        folder: Where the module folders are made.
        terms: Size of the vocabulary.
        skipped_tokens: Tokens that take no part in pooling.
    """
    entries = []
    if skipped_tokens:
        entries.append(("1_MultiVectorMask", "MultiVectorMask"))
        config: dict[str, Any] = {"skiplist_words": list(skipped_tokens), "skiplist_tasks": ["query", "document"]}
        write_json(folder / entries[-1][0] / "config.json", config | {"keep_only_token_ids": None})
    entries.append((f"{1 + len(entries)}_SpladePooling", "SpladePooling"))
    config = {"pooling_strategy": "max", "activation_function": "relu", "word_embedding_dimension": terms}
    write_json(folder / entries[-1][0] / "config.json", config)
    return entries


def write_modules(folder: Path, entries: list[tuple[str, str]]) -> None:
    """Writes `modules.json` from (path, class) pairs; a class of a library's own package by its full path."""
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": module_path(kind)}
        for number, (path, kind) in enumerate(entries)
    ]
    write_json(folder / "modules.json", modules)


def write_router(folder: Path, query: list[tuple[str, str]], passage: list[tuple[str, str]]) -> None:
    """Writes `router_config.json` for two towers whose modules lie in subfolders of `folder`."""
    types = {path: module_path(kind) for path, kind in (*query, *passage)}
    structure = {"query": [path for path, _ in query], "document": [path for path, _ in passage]}
    parameters = {"default_route": "document", "allow_empty_key": True}
    write_json(folder / "router_config.json", {"types": types, "structure": structure, "parameters": parameters})


def write_lengths(folder: Path, query_length: int, passage_length: int, **more: Any) -> None:
    """Writes `sentence_bert_config.json`; lengths by task only where they differ, as only new versions know them."""
    config: dict[str, Any] = {"max_seq_length": max(query_length, passage_length), "do_lower_case": False, **more}
    if query_length != passage_length:
        config |= {"query_length": query_length, "document_length": passage_length}
    write_json(folder / "sentence_bert_config.json", config)


def write_settings(folder: Path, model_type: str, prompts: dict[str, str], **more: Any) -> None:
    """Writes `config_sentence_transformers.json`."""
    import torch
    import transformers

    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": model_type,
            "__version__": {"transformers": transformers.__version__, "pytorch": torch.__version__},
            "prompts": prompts,
            "default_prompt_name": None,
            **more,
        },
    )
