"""Where collections lie: a local folder or a Hub repository, both seen as configs with splits of blocks."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any

from ..console import get_logger
from ..errors import InputError
from ..files import cache_folder, file_fingerprint, fingerprint, read_json, write_json
from ..hub.client import attempt, explain
from ..hub.download import check_content, check_file
from .arrow import BLOCK_ROWS
from .cards import read_card
from .readers import Block, file_kind, read_blocks


logger = get_logger(__name__)

# Below this size a file is hashed again at every start; above it size and time of change are trusted.
_ALWAYS_HASHED = 64 * 2**20

# Bytes that a request for a part of a file on the Hub asks for beyond that part.
_HUB_READ_AHEAD = 2**20

# Text files with data, plain or compressed; never scripts, never pickles.
DATA_FILES = tuple(f"*{suffix}{gz}" for suffix in (".jsonl", ".json", ".tsv", ".txt", ".csv") for gz in ("", ".gz"))

# Beside the files of a row set: where it came from.
_NOT_ROWS = ("metadata.json", "run_manifest.json")

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?$")


@dataclass(frozen=True)
class SourceFile:
    """A file of a config, to be read in parts.

    Attributes:
        name: For messages; its end says what it is.
        open: Opens it for reading bytes.
        key: JSON-like value that identifies its content.
    """

    name: str
    open: Callable[[], IO[bytes]]
    key: Any


class LoadingScriptError(InputError):
    """A repository that is a program; its data files can still be read."""


class LocalSource:
    """A folder whose README names its configs, or whose files and subfolders are named after them."""

    revision = None

    def __init__(self, folder: str | os.PathLike, cache_dir: str | os.PathLike | None = None, only: str | None = None):
        self.folder = Path(folder)
        self.where = str(self.folder)
        readme = self.folder / "README.md"
        self._card = read_card(readme)[0] if readme.exists() else {}
        self.name = str(self._card.get("collection_name") or self.folder.resolve().name)
        self._cache_dir = cache_dir
        self._files = self._from_names(only) if only else self._from_readme() or self._from_names()

    def configs(self) -> list[str]:
        return list(self._files)

    def splits(self, config: str) -> list[str]:
        return list(self._files[config])

    def place(self, config: str, split: str | None = None) -> str:
        """The file, or the folder when there are several."""
        files = [file for name, group in self._files[config].items() if split in (None, name) for file in group]
        return str(files[0] if len(files) == 1 else Path(os.path.commonpath(files)))

    def key(self, config: str, split: str) -> Any:
        """Identifies the content of the split's files, not their names."""
        return [[file_kind(file), content_hash(file, self._cache_dir)] for file in self._files[config][split]]

    def blocks(self, config: str, split: str) -> Iterator[Block]:
        for file in self._files[config][split]:
            yield from read_blocks(file)

    def files(self, config: str) -> list[SourceFile]:
        """The files of all splits."""
        files = chain.from_iterable(self._files[config].values())
        return [
            SourceFile(str(file), partial(open, file, "rb"), content_hash(file, self._cache_dir)) for file in files
        ]

    def columns(self, config: str) -> list[str]:
        """The columns of the first file."""
        file = next(iter(self._files[config].values()))[0]
        return list(next(iter(read_blocks(file)), Block({}, str(file), 1, "row")).columns)

    def metadata(self, config: str) -> dict[str, Any]:
        """What `metadata.json` beside the config's files says."""
        path = next(iter(self._files[config].values()))[0].parent / "metadata.json"
        return read_json(path) if path.exists() else {}

    def looked_for(self) -> str:
        entries = sorted(entry.name for entry in self.folder.iterdir() if not entry.name.startswith("."))
        return f"found: {', '.join(entries[:12]) or 'nothing'}" + (", …" if len(entries) > 12 else "")

    def _from_readme(self) -> dict[str, dict[str, list[Path]]]:
        readme = self.folder / "README.md"
        result: dict[str, dict[str, list[Path]]] = {}
        for entry in self._card.get("configs") or []:
            data_files = entry.get("data_files") or []
            if isinstance(data_files, str) or all(isinstance(item, str) for item in data_files):
                data_files = [{"split": "train", "path": data_files}]
            splits = result.setdefault(str(entry.get("config_name", "default")), {})
            for item in data_files:
                patterns = [item["path"]] if isinstance(item["path"], str) else item["path"]
                for pattern in patterns:
                    found = sorted(self.folder.glob(pattern))
                    if not found:
                        raise InputError(
                            f"no file fits {pattern!r} of the config {entry.get('config_name')!r}",
                            where=str(readme),
                            cure="Put the files there or mend 'configs' in the README's YAML header",
                        )
                    splits.setdefault(str(item.get("split", "train")), []).extend(found)
        return result

    def _from_names(self, only: str | None = None) -> dict[str, dict[str, list[Path]]]:
        result: dict[str, dict[str, list[Path]]] = {}
        for entry in sorted(self.folder.iterdir()) if only is None else [self.folder / only]:
            if entry.name.startswith(".") and only is None:
                continue
            if entry.is_dir():
                splits: dict[str, list[Path]] = {}
                for file in sorted(entry.iterdir()):
                    if file.is_file() and file_kind(file) and file.name not in _NOT_ROWS:
                        splits.setdefault(re.sub(r"-\d{5}-of-\d{5}$", "", _stem(file)), []).append(file)
                if splits:
                    result[entry.name] = splits
            elif file_kind(entry):
                result.setdefault(_stem(entry), {}).setdefault("train", []).append(entry)
        return result


class HubSource:
    """A data-set repository on the Hub, read through `datasets` at one commit."""

    def __init__(self, repo: str, revision: str | None = None):
        self.repo, self.where = repo, repo
        self.name = repo.split("/")[-1]
        self.revision = resolve_revision(repo, revision)
        self._configs = fetch_configs(repo, self.revision)
        self._loaded: dict[str, Any] = {}

    def configs(self) -> list[str]:
        return list(self._configs)

    def splits(self, config: str) -> list[str]:
        return list(self._load(config))

    def place(self, config: str, split: str | None = None) -> str:
        return f"{self.repo}, config {config!r}" + (f", split {split!r}" if split else "")

    def key(self, config: str, split: str) -> Any:
        # Names of cached files hold the hash of the configuration; the commit alone would not tell two configs apart.
        files = [
            [file["filename"], os.path.getsize(file["filename"])] for file in self._load(config)[split].cache_files
        ]
        content = files or self._load(config)[split]._fingerprint
        return [self.repo, self.revision, config, split, content]

    def blocks(self, config: str, split: str) -> Iterator[Block]:
        first = 1
        for table in self._load(config)[split].with_format("arrow").iter(batch_size=BLOCK_ROWS):
            columns = {name: table.column(name) for name in table.column_names}
            yield Block(columns, self.place(config, split), first, "row")
            first += table.num_rows

    def files(self, config: str) -> list[SourceFile]:
        """The files of all splits, none of them downloaded."""
        return fetch_files(self.repo, config, self.revision)

    def columns(self, config: str) -> list[str]:
        return list(next(iter(self._load(config).values())).column_names)

    def metadata(self, config: str) -> dict[str, Any]:
        """What `<config>/metadata.json` in the repository says."""
        path = fetch_file(self.repo, f"{config}/metadata.json", self.revision)
        return read_json(path) if path else {}

    def looked_for(self) -> str:
        return f"found the configs {', '.join(map(repr, self._configs))}"

    def _load(self, config: str) -> Any:
        if config not in self._loaded:
            self._loaded[config] = fetch(self.repo, config, self.revision)
        return self._loaded[config]


def is_hub_id(text: str) -> bool:
    """Whether `text` could name a repository on the Hub."""
    return bool(_HUB_ID.match(text))


def content_hash(file: Path, cache_dir: str | os.PathLike | None = None) -> str:
    """The fingerprint of a file's bytes; that of a large file is found again by size and time of change."""
    try:
        status = file.stat()
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=str(file), cure="Check the path") from None
    if status.st_size < _ALWAYS_HASHED:
        return file_fingerprint(file)
    stamp = [status.st_size, status.st_mtime_ns]
    memo = cache_folder(cache_dir) / "data" / "hashes" / f"{fingerprint(str(file.resolve()))}.json"
    known = read_json(memo) if memo.exists() else {}
    if known.get("stamp") != stamp:
        known = {"stamp": stamp, "hash": file_fingerprint(file), "file": str(file)}
        write_json(memo, known)
    return known["hash"]


def folder_hashes(folder: Path) -> dict[str, str]:
    """[`content_hash`] of every file in a folder that is not hidden, by its path there."""
    paths = ((path, path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        name.as_posix(): content_hash(path)
        for path, name in paths
        if not any(part.startswith(".") for part in name.parts)
    }


def open_source(
    source: str | os.PathLike, revision: str | None = None, cache_dir: str | os.PathLike | None = None
) -> LocalSource | HubSource:
    """A folder if there is one of that name, else a Hub repository."""
    text = os.fspath(source)
    if Path(text).is_dir():
        return LocalSource(text, cache_dir)
    if Path(text).exists():
        raise InputError(
            "a file where a folder is expected", where=text, cure="Name the folder that holds the collection"
        )
    if not is_hub_id(text):
        raise InputError("no such folder", where=text, cure="Check the path, or give a Hub id such as mteb/scifact")
    return HubSource(text, revision)


# Only the functions below speak to the Hub.


def resolve_revision(repo: str, revision: str | None) -> str | None:
    """The commit that `revision` names now, so that all configs are read from one; as given when the Hub is silent."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return revision
    try:
        return HfApi().dataset_info(repo, revision=revision, timeout=30).sha
    except Exception as error:
        logger.debug("no commit for %s: %s", repo, error)
        return revision


def commit_of(repo: str, revision: str | None) -> str:
    """The commit that `revision` names now.

    Raises:
        InputError: If the Hub does not say: no such repository or revision, no right to see it, no network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    with _HubErrors(repo, revision):
        try:
            return attempt(lambda: HfApi().dataset_info(repo, revision=revision, timeout=30).sha, f"asking for {repo}")
        except HfHubHTTPError as error:
            cure = "Check the name, the revision and your login (`hf auth login`)"
            raise InputError(explain(error), where=repo, cure=cure) from error


def fetch_configs(repo: str, revision: str | None) -> list[str]:
    """The names of a repository's configs."""
    from datasets import get_dataset_config_names

    with _HubErrors(repo, revision):
        return attempt(lambda: get_dataset_config_names(repo, revision=revision), f"asking for {repo}")


def fetch(repo: str, config: str, revision: str | None) -> Any:
    """A config as a `datasets.DatasetDict`; its files are compared with the hashes that the Hub keeps."""
    from datasets import load_dataset_builder

    def prepared() -> Any:
        builder = load_dataset_builder(repo, config, revision=revision)
        # Before anything is made of them: what `datasets` makes is kept, and would be taken for good later.
        _check_files(chain.from_iterable((builder.config.data_files or {}).values()))
        builder.download_and_prepare()
        return builder.as_dataset()

    with _HubErrors(repo, revision):
        return attempt(prepared, f"reading {repo}")


def _check_files(paths: Iterable[str]) -> None:
    from huggingface_hub import HfFileSystem, hf_hub_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return
    hub = HfFileSystem()
    for path in paths:
        expected = (hub.info(path).get("lfs") or {}).get("sha256")
        if expected is not None:
            at = hub.resolve_path(path)
            local = hf_hub_download(at.repo_id, at.path_in_repo, repo_type=at.repo_type, revision=at.revision)
            check_file(Path(local), expected)


def fetch_files(repo: str, config: str, revision: str | None) -> list[SourceFile]:
    """The files of a config, which are read on the Hub part by part."""
    from datasets import load_dataset_builder
    from huggingface_hub import HfFileSystem

    with _HubErrors(repo, revision):
        paths = chain.from_iterable(load_dataset_builder(repo, config, revision=revision).config.data_files.values())
        hub = HfFileSystem()
        files = []
        for path in paths:
            known = hub.info(path)
            content = (known.get("lfs") or {}).get("sha256") or known.get("blob_id")
            # Readers of parquet know which bytes they want; lines come one after the other.
            cache = {"cache_type": "none"} if file_kind(path) == ".parquet" else {"block_size": _HUB_READ_AHEAD}
            opened = partial(hub.open, path, "rb", **cache)
            files.append(SourceFile(path, opened, content or [path, known["size"]]))
        return files


def fetch_file(repo: str, path: str, revision: str | None) -> Path | None:
    """One file of a repository, `None` if it has no such file or cannot be asked."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, path, repo_type="dataset", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, FileNotFoundError):
        return None


def fetch_data_files(repo: str, revision: str | None, patterns: Sequence[str] = DATA_FILES) -> Path | None:
    """Downloads the data files of a repository that fit `patterns`; the folder of them, `None` if there are none."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    wanted = [*patterns, "README.md"]
    with _HubErrors(repo, revision):
        folder = Path(
            attempt(
                lambda: snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=wanted),
                f"downloading {repo}",
            )
        )
        if not HF_HUB_OFFLINE:
            check_content(folder, HfApi().dataset_info(repo, revision=revision, files_metadata=True).siblings or [])
    return folder if any(found.is_file() for pattern in patterns for found in folder.rglob(pattern)) else None


class _HubErrors:
    """Turns the Hub's and `datasets`' exceptions into one sentence with a cure."""

    def __init__(self, repo: str, revision: str | None):
        self.where = repo + (f"@{revision}" if revision else "")
        self.repo = repo

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, traceback) -> bool:
        if error is None or isinstance(error, InputError) or not isinstance(error, Exception):
            return False
        import yaml
        from datasets.exceptions import DatasetNotFoundError

        if isinstance(error, yaml.YAMLError):
            line = getattr(getattr(error, "problem_mark", None), "line", 0) + 2
            raise InputError(
                f"the YAML header of its README.md is broken ({getattr(error, 'problem', None) or 'not readable'})",
                where=f"{self.where}, README.md, line {line}",
                cure="Mend the lines between the two '---', or name an earlier revision",
            ) from error
        text = str(error).strip().split("\n")[0]
        if "scripts are no longer supported" in text:
            raise LoadingScriptError(
                "the repository is a Python loading script, which is never run here",
                where=self.where,
                cure="Try revision='refs/convert/parquet', or download its data files and load the folder",
            ) from error
        if isinstance(error, DatasetNotFoundError):
            gated = "gated" in text
            raise InputError(
                f"no such folder here, and the Hub says: {text}",
                where=self.where,
                cure="Ask for access on its page and log in with `hf auth login`"
                if gated
                else "Check the name, the revision and your login (`hf auth login`)",
            ) from error
        if isinstance(error, (ConnectionError, OSError)):
            raise InputError(
                f"no such folder here, and the Hub cannot be reached ({type(error).__name__}: {text})",
                where=self.where,
                cure="Check the path; else connect to the network (or unset HF_HUB_OFFLINE) and try again",
            ) from error
        if isinstance(error, ValueError):
            raise InputError(text, where=self.where, cure="Check the repository's files and its README") from error
        return False


def _stem(file: Path) -> str:
    name = file.name.removesuffix(".gz")
    return name[: -len(Path(name).suffix)]
