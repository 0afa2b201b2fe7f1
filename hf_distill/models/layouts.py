"""What other libraries' folders say of a model: bare transformers checkpoints and sentence-transformers' modules.

What is read: `modules.json` with the module paths of sentence-transformers 2 to 6 (Transformer, Pooling, Dense,
Normalize, Dropout, Router), the older and the newer keys of their configurations, two towers as a `Router` or as the
folders `query_model/` and `passage_model/`, and folders without any of this. What is written is in `writing.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..console import get_logger
from ..errors import InputError
from ..files import read_json


logger = get_logger(__name__)

EXTRA_FILE = "hf_distill.json"
TRAINING_FILE = "training_modules.safetensors"
POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
_POOLINGS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
ACTIVATIONS = {
    "Identity": "torch.nn.modules.linear.Identity",
    "Tanh": "torch.nn.modules.activation.Tanh",
    "ReLU": "torch.nn.modules.activation.ReLU",
    "GELU": "torch.nn.modules.activation.GELU",
    "SiLU": "torch.nn.modules.activation.SiLU",
    "Sigmoid": "torch.nn.modules.activation.Sigmoid",
}
# sentence-transformers' and PyLate's names for multi-vector models; read by token_layouts.
_MULTI_VECTOR = ("MultiVectorEncoder", "ColBERT")
_LENGTH_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


@dataclass(frozen=True)
class ProjectionLayout:
    """One linear layer after pooling; `folder` holds its weights, None for one that is yet to be trained."""

    in_features: int
    out_features: int
    bias: bool = True
    activation: str = "Identity"
    folder: Path | None = None

    def settings(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias,
            "activation": self.activation,
        }


@dataclass(frozen=True)
class TowerLayout:
    """One encoder: the folder of its transformer, and what follows it."""

    folder: Path
    pooling: str | None = None
    projections: tuple[ProjectionLayout, ...] = ()
    normalize: bool = False
    max_length: int | None = None
    query_length: int | None = None
    passage_length: int | None = None
    lowercase: bool = False
    skipped_tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """What a folder says about a model.

    `passage` is None where one tower reads queries and passages. `is_guess` says that the folder is a masked language
    model's and nothing in it tells whether dense or lexical vectors are meant.
    """

    kind: str
    query: TowerLayout
    passage: TowerLayout | None = None
    shared_projections: tuple[ProjectionLayout, ...] = ()
    query_prompt: str = ""
    passage_prompt: str = ""
    default_prompt: str = ""
    similarity: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    is_guess: bool = False


def read_layout(folder: Path, name: str) -> Layout:
    """Reads the layout of a model's folder.

    Args:
        folder: The folder.
        name: What the user called the model, for messages.

    Raises:
        InputError: If the folder is no model, or one that this library does not read.
    """
    settings = _read(folder / "config_sentence_transformers.json", name)
    extra = _read(folder / EXTRA_FILE, name)
    prompts = settings.get("prompts") or {}
    shared = {
        "query_prompt": prompts.get("query") or "",
        "passage_prompt": next((prompts[key] for key in ("document", "passage", "corpus") if prompts.get(key)), ""),
        "default_prompt": prompts.get(settings.get("default_prompt_name")) or "",
        "similarity": {"dot": "dot", "dot_product": "dot", "cosine": "cosine"}.get(settings.get("similarity_fn_name")),
        "extra": extra,
    }
    model_type = settings.get("model_type", "SentenceTransformer")
    architectures = _read(folder / "config.json", name).get("architectures") or []
    if model_type in _MULTI_VECTOR or "HF_ColBERT" in architectures:
        return Layout("multi-vector", TowerLayout(folder), **shared)
    if settings.get("truncate_dim"):
        logger.warning("%s: vectors are not cut to the recorded truncate_dim %s.", name, settings["truncate_dim"])
    if (folder / "modules.json").is_file():
        modules = _read(folder / "modules.json", name)
        return replace(_read_modules(folder, modules, name), **shared)
    if (folder / "query_model").is_dir() and (folder / "passage_model").is_dir():
        towers = [read_layout(folder / part, f"{name}/{part}") for part in ("query_model", "passage_model")]
        return Layout("dense", towers[0].query, towers[1].query, **{**shared, **_prompts_of_towers(shared, towers)})
    if not (folder / "config.json").is_file():
        raise _no_model(folder, name)
    if any(architecture.endswith("ForSequenceClassification") for architecture in architectures):
        # sentence-transformers takes the length of a bare cross-encoder from its tokenizer.
        return Layout("cross-encoder", TowerLayout(folder), **shared)
    # What LexMAE has pre-trained is a plain masked-LM checkpoint, meant to become a lexical model.
    if extra.get("archetype") == "lexmae":
        return Layout("lexical", TowerLayout(folder), **shared)
    is_guess = any(architecture.endswith("ForMaskedLM") for architecture in architectures)
    return Layout("dense", TowerLayout(folder), is_guess=is_guess, **shared)


def expect_kind(layout: Layout, wanted: str, name: str) -> None:
    """Raises [`InputError`] if a multi-vector model is opened as something else (`wanted` is what it is to be)."""
    if layout.kind == "multi-vector" != wanted:
        raise InputError(
            f"this is a multi-vector model, not a {wanted} one",
            where=name,
            cure="Open it with MultiVectorRetriever (--kind multi_vector), or start from its base model",
        )


def _prompts_of_towers(shared: dict[str, Any], towers: list[Layout]) -> dict[str, str]:
    return {
        "query_prompt": shared["query_prompt"] or towers[0].query_prompt,
        "passage_prompt": shared["passage_prompt"] or towers[1].passage_prompt,
    }


def _no_model(folder: Path, name: str) -> InputError:
    if (folder / "adapter_config.json").is_file():
        return InputError(
            "the folder holds only a PEFT adapter",
            where=name,
            cure="Merge it into its base model (peft: merge_and_unload, save_pretrained) and give that folder",
        )
    return InputError(
        f"the folder {folder} holds no config.json",
        where=name,
        cure="Give a folder written by save_pretrained, or a model id of the Hub",
    )


def _read(path: Path, name: str) -> Any:
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except ValueError as error:
        raise InputError(
            f"the file is no valid JSON ({error})",
            where=f"{name}, {path.name}",
            cure="Copy or download the model again",
        ) from None


def module_class(path: str, name: str) -> str:
    """The class name of a module of sentence-transformers (or PyLate's projection); other code is refused."""
    if path == "pylate.models.Dense.Dense":
        return "Dense"
    if not path.startswith("sentence_transformers."):
        raise InputError(
            f"the module {path!r} is code of the repository's own, which this library never runs",
            where=f"{name}, modules.json",
            cure="Give a model made of sentence-transformers' own modules, or a checkpoint of transformers",
        )
    return path.rpartition(".")[2]


def _read_modules(folder: Path, modules: list[dict[str, Any]], name: str) -> Layout:
    entries = sorted(modules, key=lambda module: module.get("idx", 0))
    kinds = [
        (module_class(entry["type"], name), module_folder(folder, entry.get("path", ""), name)) for entry in entries
    ]
    if not kinds:
        raise InputError("modules.json lists no module", where=name, cure="Copy or download the model again")
    first, root = kinds[0]
    if first not in ("Router", "Asym"):
        tower, kind = _read_tower(kinds, name)
        return Layout(kind, tower)
    router = _read(root / "router_config.json", name) or _read(root / "config.json", name)
    types, structure = router.get("types", {}), router.get("structure", {})
    query = structure.get("query")
    passage = next((structure[key] for key in ("document", "passage", "corpus") if key in structure), None)
    if query is None or passage is None:
        raise InputError(
            f"the router knows the routes {sorted(structure)}",
            where=name,
            cure="A router has to have the routes 'query' and 'document'",
        )
    towers = []
    for route in (query, passage):
        modules_of_route = [(module_class(types[part], name), module_folder(root, part, name)) for part in route]
        towers.append(_read_tower(modules_of_route, name)[0])
    tail = _read_tail(kinds[1:], name)
    query_tower, passage_tower = (replace(tower, normalize=tower.normalize or tail.normalize) for tower in towers)
    if tail.pooling is not None:
        query_tower = replace(query_tower, pooling=tail.pooling)
        passage_tower = replace(passage_tower, pooling=tail.pooling)
    return Layout(
        "dense", query_tower, None if query == passage else passage_tower, shared_projections=tail.projections
    )


def module_folder(folder: Path, path: str, name: str) -> Path:
    """The folder of a module; [`InputError`] if its path leads out of the model's."""
    target = folder / path
    if not target.resolve().is_relative_to(folder.resolve()) and ".." in Path(path).parts:
        raise InputError(f"the module path {path!r} leaves the folder", where=f"{name}, modules.json")
    return target


def _read_tower(kinds: list[tuple[str, Path]], name: str) -> tuple[TowerLayout, str]:
    first, folder = kinds[0]
    if first not in ("Transformer", "MLMTransformer"):
        raise InputError(
            f"the model starts with a {first} module",
            where=f"{name}, modules.json",
            cure="Only models that start with a Transformer can be read: static and bag-of-words models cannot",
        )
    if not (folder / "config.json").is_file():
        raise _no_model(folder, name)
    lengths = read_lengths(folder, name)
    task = lengths.get("transformer_task", "fill-mask" if first == "MLMTransformer" else "feature-extraction")
    if lengths.get("query_expansion"):
        raise InputError("the model expands its queries, as multi-vector models do", where=name)
    if "message" in (lengths.get("modality_config") or {}):
        raise InputError(
            "the model puts texts into a chat template, which is not supported",
            where=name,
            cure="Give a model that reads plain text; instructions can be set as query_prompt",
        )
    kind = "dense"
    if task == "sequence-classification":
        kind = "cross-encoder"
    elif task == "fill-mask":
        kind = "lexical"
    elif task != "feature-extraction":
        raise InputError(
            f"the model's transformer does the task {task!r}",
            where=name,
            cure="Give a dense or lexical model, or a cross-encoder with a classification head",
        )
    text_options = (lengths.get("processing_kwargs") or {}).get("text") or {}
    tail = _read_lexical_tail(kinds[1:], name) if kind == "lexical" else _read_tail(kinds[1:], name)
    return replace(
        tail,
        folder=folder,
        max_length=lengths.get("max_seq_length") or text_options.get("max_length"),
        query_length=lengths.get("query_length"),
        passage_length=lengths.get("document_length"),
        lowercase=bool(lengths.get("do_lower_case")),
    ), kind


def read_lengths(folder: Path, name: str) -> dict[str, Any]:
    """The settings of a Transformer module: lengths by task, its task and more; empty where there are none."""
    return next((found for file in _LENGTH_FILES if (found := _read(folder / file, name))), {})


def _read_tail(kinds: list[tuple[str, Path]], name: str) -> TowerLayout:
    """The modules after the transformer; `folder` is filled in by the caller."""
    pooling, projections, normalize = None, [], False
    for kind, folder in kinds:
        config = _read(folder / "config.json", name)
        where = f"{name}, {folder.name}"
        if kind in ("Dense", "Pooling") and normalize:
            raise InputError(f"a {kind} module stands after the normalisation", where=where)
        if kind == "Pooling":
            pooling = _read_pooling(config, where)
        elif kind == "Normalize":
            if config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
                raise InputError("the model normalises token vectors, as multi-vector models do", where=where)
            normalize = True
        elif kind == "Dense":
            projections.append(read_dense(config, folder, where))
        elif kind != "Dropout":
            raise InputError(
                f"modules of type {kind} are not supported",
                where=where,
                cure="Supported are Transformer, Pooling, Dense, Normalize, Dropout and Router",
            )
    return TowerLayout(Path(), pooling, tuple(projections), normalize)


def _read_lexical_tail(kinds: list[tuple[str, Path]], name: str) -> TowerLayout:
    """The modules after a masked-LM transformer: SpladePooling, and before it the mask of pooled tokens if any."""
    skipped: tuple[str, ...] = ()
    names = [kind for kind, _ in kinds]
    if names not in (["SpladePooling"], ["MultiVectorMask", "SpladePooling"]):
        raise InputError(
            f"after the masked-LM transformer come the modules {', '.join(names) or '(none)'}",
            where=f"{name}, modules.json",
            cure="Supported is SpladePooling, alone or after MultiVectorMask",
        )
    for kind, folder in kinds:
        config = _read(folder / "config.json", name)
        where = f"{name}, {folder.name}"
        if kind == "MultiVectorMask":
            skipped = tuple(config.get("skiplist_words") or ())
            if set(config.get("skiplist_tasks", ["document"])) != {"query", "document"} or config.get(
                "keep_only_token_ids"
            ):
                raise InputError("queries and passages pool different tokens", where=where)
        elif config.get("pooling_strategy", "max") != "max" or config.get("activation_function", "relu") != "relu":
            raise InputError(
                f"the model pools by {config.get('pooling_strategy')} after {config.get('activation_function')}",
                where=where,
                cure="Supported is SPLADE-max: the maximum of log(1 + relu(logit))",
            )
    return TowerLayout(Path(), skipped_tokens=skipped)


def _read_pooling(config: dict[str, Any], where: str) -> str:
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for mode, key in POOLING_KEYS.items() if config.get(key)]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise InputError(
            f"the model pools by {' + '.join(modes) or 'nothing'}",
            where=where,
            cure="Supported are cls, mean and last-token pooling",
        )
    if config.get("include_prompt", True) is False:
        raise InputError(
            "the model leaves the prompt out of its pooling, which is not supported",
            where=where,
            cure="Give a model whose prompt is part of the text (include_prompt: true)",
        )
    return _POOLINGS[modes[0]]


def read_dense(config: dict[str, Any], folder: Path, where: str) -> ProjectionLayout:
    """The linear layer that a Dense module's configuration describes."""
    if "in_features" not in config or "out_features" not in config:
        raise InputError("the Dense module has no configuration", where=where, cure="Copy or download the model again")
    if config.get("module_input_name", "sentence_embedding") != "sentence_embedding" or config.get("use_residual"):
        raise InputError("the Dense module works on token vectors or has a residual connection", where=where)
    activation = config.get("activation_function") or ACTIVATIONS["Tanh"]
    short = activation.rpartition(".")[2]
    if short not in ACTIVATIONS or not activation.startswith("torch.nn."):
        raise InputError(
            f"the activation {activation!r} is not supported", where=where, cure=f"Supported: {', '.join(ACTIVATIONS)}"
        )
    return ProjectionLayout(config["in_features"], config["out_features"], config.get("bias", True), short, folder)
