"""Pushing folders: all files in one commit, tried again where that helps, and never over somebody else's run."""

from __future__ import annotations

import fnmatch
import inspect
import shlex
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..console import get_logger
from ..errors import HubError, InputError
from ..files import fingerprint, read_json
from .client import attempt, check_repo_id, explain, is_worth_another_try, status_of, with_namespace


logger = get_logger(__name__)

MANIFEST = "run_manifest.json"
RUN_KEY = "run_key.json"

# What lies in an output folder and is no part of the result: checkpoints, the comparison without a teacher, locks,
# half-written and hidden files.
LEFT_OUT = ("checkpoint-*", "no_teacher", "_*", ".*", "*.tmp", "*.lock")
# Weights that would be read although they belong to an earlier push.
_STALE = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
# What somebody may have put into a new repository by hand.
_HARMLESS = ("README.md", ".gitattributes", "LICENSE*", ".gitignore")
_LARGEST_TEXT = 5 * 2**20
# Names of data and models, which are other ones on another machine; their fingerprints stand in the settings too.
_PLACES = frozenset(
    "data data_revision rows rows_revision model model_revision teacher teacher_revision student "
    "student_revision filter_teacher filter_teacher_revision".split()
)
_MAKING_OF_ROWS = "made_by collection split threshold mining queries_fingerprint corpus_fingerprint".split()


@dataclass(frozen=True)
class Pushed:
    """A successful push.

    Attributes:
        repo_id: The repository, with its owner.
        kind: `"model"`, `"dataset"` or `"space"`.
        commit: The commit that the repository is at now.
        changed: False if the repository held the same files already; there is no new commit then.
    """

    repo_id: str
    kind: str
    commit: str
    changed: bool

    @property
    def url(self) -> str:
        """The repository's page."""
        from huggingface_hub import constants

        prefix = "" if self.kind == "model" else f"{self.kind}s/"
        return f"{constants.ENDPOINT}/{prefix}{self.repo_id}"


@dataclass(frozen=True)
class Target:
    """Where a push goes.

    Args:
        repo_id: `you/name`; a bare name belongs to whoever is logged in.
        kind: `"model"`, `"dataset"` or `"space"`.
        private: Whether a new repository is private; None for the account's default.
        revision: The branch; it is made if there is none.
        token: Instead of the login's.
        overwrite: Whether the files of another run may be replaced.
        create: Whether to make the repository if there is none.
        mirror: Whether everything else that lies in the repository is removed, but for a licence and the like.
    """

    repo_id: str
    kind: str = "model"
    private: bool | None = None
    revision: str | None = None
    token: str | None = None
    overwrite: bool = False
    create: bool = True
    mirror: bool = False


def files_of(folder: Path, left_out: tuple[str, ...] = LEFT_OUT) -> dict[str, Path]:
    """The files of a folder by their path in the repository, without those that are no part of the result."""
    found = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in left_out):
            found["/".join(parts)] = path
    return found


def identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make a run what it is on any machine: without paths where fingerprints say the same."""
    known = any(name.endswith(("_fingerprint", "_weights")) for name in settings)
    return {name: value for name, value in settings.items() if not (known and name in _PLACES)}


def differing_settings(theirs: Mapping[str, Any], ours: Mapping[str, Any], most: int = 5) -> list[str]:
    """In words, what differs between two runs."""
    theirs, ours = identity(theirs), identity(ours)
    names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    return [f"{name}: {theirs.get(name)!r}, here {ours.get(name)!r}" for name in names[:most]]


def run_of(read: Callable[[str], Any]) -> str | None:
    """What identifies the run that a folder or repository holds; None if it holds no run.

    Args:
        read: Gives the content of a JSON file by its name, None if there is no such file.
    """
    manifest = read(MANIFEST) or {}
    settings = read(RUN_KEY) or manifest.get("settings")
    if settings:
        return fingerprint(identity(settings))
    # Rows are what was mined, whoever has scored them since.
    rows = manifest.get("data", {}).get("rows", {}).get("provenance")
    return fingerprint({name: rows.get(name) for name in _MAKING_OF_ROWS}) if rows else None


def push_later(folder: str | Path, repo_id: str, *more: str) -> str:
    """The command that pushes `folder` later."""
    return shlex.join(["hf-distill", "push", str(folder), "--repo_id", repo_id, *more])


def push_files(files: Mapping[str, Path], target: Target, message: str) -> Pushed:
    """Makes one commit of `files`, tried again where that can help; without any change there is no commit.

    Files of an earlier push in the folders that are pushed to, and weights of an earlier push, are removed in the same
    commit, so that nothing stale is read beside the new files.

    Args:
        files: Local files by their path in the repository.
        target: Where they go.
        message: Of the commit.

    Raises:
        InputError: If the repository holds another run, or a file holds the token.
        Exception: What the client library raised last; [`push_folder`] makes a sentence of it.
    """
    repo_id = with_namespace(target.repo_id, target.token)
    _check_for_token(files, target.token)

    def read_local(name: str) -> Any:
        return read_json(files[name]) if name in files else None

    run, heads = run_of(read_local), []

    def once() -> str:
        return _push_once(files, target, repo_id, message, run, heads)

    commit = attempt(once, f"pushing to {repo_id}")
    # Compared with what the first try found: a commit whose answer was lost is found done by the next try.
    return Pushed(repo_id, target.kind, commit, commit != heads[0])


def check_target(target: Target, where: str, settings: Mapping[str, Any]) -> Target:
    """Opens the repository that a run will push to: makes it if it is missing, looks whether it may be written to.

    Args:
        target: Where the run will push.
        where: The option that names it, for messages.
        settings: Of the run.

    Returns:
        The target with the repository's owner, which is there now: if somebody deletes it meanwhile, it is not made
        again behind his back. A Hub that does not answer now may do so later: that is a warning.

    Raises:
        InputError: If this account may not push there, or another run has.
    """
    check_repo_id(target.repo_id, where)
    try:
        return replace(target, repo_id=_open_repo(target, settings), create=False)
    except InputError:
        raise
    except Exception as error:
        if not is_worth_another_try(error):
            raise InputError(
                f"nothing can be pushed to {target.repo_id}: {explain(error)}",
                where=where,
                cure="Log in with `hf auth login`, or leave it out and push later with hf-distill push",
            ) from error
        logger.warning("%s cannot be opened now (%s); pushing is tried again later.", target.repo_id, explain(error))
        return target


def _open_repo(target: Target, settings: Mapping[str, Any]) -> str:
    from huggingface_hub import HfApi

    repo_id = with_namespace(target.repo_id, target.token)
    run = fingerprint(identity(settings))

    def once() -> None:
        api = HfApi(token=target.token)
        _look(api, repo_id, target, run)
        if "write" in inspect.signature(api.auth_check).parameters:  # not in the oldest versions
            api.auth_check(repo_id, repo_type=target.kind, write=True)

    attempt(once, f"opening {repo_id}")
    return repo_id


def _push_once(
    files: Mapping[str, Path], target: Target, repo_id: str, message: str, run: str | None, heads: list[str]
) -> str:
    """One try; returns the commit that holds the files, and notes in `heads` where the branch was before."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    # Per-query figures belong to a model's results.
    warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
    api = HfApi(token=target.token)
    head, known = _look(api, repo_id, target, run)
    heads.append(head)
    stale = [path for path in sorted(known - set(files)) if _is_stale(path, files, target.mirror)]
    operations: list[Any] = [CommitOperationDelete(path_in_repo=path) for path in stale]
    operations += [CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(file)) for path, file in files.items()]
    return api.create_commit(
        repo_id,
        operations,
        commit_message=message,
        repo_type=target.kind,
        revision=target.revision,
        parent_commit=head,
    ).oid


def _look(api: Any, repo_id: str, target: Target, run: str | None) -> tuple[str, set[str]]:
    """The commit that a push will follow and the paths in it; the repository and its branch are made if missing."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    def info() -> Any:
        try:
            return api.repo_info(repo_id, repo_type=target.kind, revision=target.revision)
        except RevisionNotFoundError:
            api.create_branch(repo_id, branch=target.revision, repo_type=target.kind, exist_ok=True)
            return api.repo_info(repo_id, repo_type=target.kind, revision=target.revision)

    try:
        found = info()
    except RepositoryNotFoundError:
        if not target.create:
            raise
        sdk = "gradio" if target.kind == "space" else None
        try:
            api.create_repo(repo_id, repo_type=target.kind, private=target.private, space_sdk=sdk)
        except HfHubHTTPError as error:
            if status_of(error) != 409:
                raise
            # Made by somebody else just now; or something that this account may not see has that name.
            try:
                found = info()
            except RepositoryNotFoundError:
                raise error from None
        else:
            found = info()
    known = {sibling.rfilename for sibling in found.siblings or []}
    if not target.overwrite:
        _check_run(api, repo_id, target, found.sha, known, run)
    return found.sha, known


def _check_run(api: Any, repo_id: str, target: Target, commit: str, known: set[str], run: str | None) -> None:
    """Raises [`InputError`] if a repository holds another run than `run`, or files of unknown origin."""

    def read_remote(name: str) -> Any:
        if name not in known:
            return None
        return read_json(api.hf_hub_download(repo_id, name, repo_type=target.kind, revision=commit))

    theirs = run_of(read_remote)
    if theirs == run:
        return
    if theirs is None and all(any(fnmatch.fnmatch(path, pattern) for pattern in _HARMLESS) for path in known):
        return
    raise InputError(
        "the repository holds another run" if theirs else "the repository holds files that no such run has made",
        where=repo_id,
        cure="Choose another repository, or replace its files with hf-distill push FOLDER --overwrite true",
    )


def _is_stale(path: str, files: Mapping[str, Path], mirror: bool) -> bool:
    folder, _, name = path.rpartition("/")
    if mirror:
        return not any(fnmatch.fnmatch(path, pattern) for pattern in _HARMLESS)
    if folder:
        return any(other.startswith(path.split("/")[0] + "/") for other in files)
    has_weights = any(fnmatch.fnmatch(other, pattern) for other in files for pattern in _STALE if "/" not in other)
    return has_weights and any(fnmatch.fnmatch(name, pattern) for pattern in _STALE)


def _check_for_token(files: Mapping[str, Path], token: str | None) -> None:
    from huggingface_hub import get_token

    secrets = {secret.encode() for secret in (token, get_token()) if secret}
    for path, file in files.items():
        if secrets and file.stat().st_size <= _LARGEST_TEXT and not path.endswith((".safetensors", ".parquet")):
            content = file.read_bytes()
            if any(secret in content for secret in secrets):
                raise InputError(
                    "the file holds your Hub token, which must not be published",
                    where=str(file),
                    cure="Remove it from the file, and make a new token if anybody has seen it",
                )


def push_folder(
    folder: str | Path,
    target: Target | str,
    *,
    message: str | None = None,
    files: Mapping[str, Path] | None = None,
    later: str | None = None,
) -> Pushed:
    """Pushes a folder as it is, in one commit.

    Args:
        folder: What lies in it stays as it is, whatever happens.
        target: Where it goes; an id means a model repository.
        message: Of the commit.
        files: Which files, by their path in the repository; by default all but checkpoints and hidden ones.
        later: The command that the message of a failure recommends.

    Raises:
        InputError: If there is nothing to push, the repository holds another run, or a file holds the token.
        HubError: If the Hub does not take it: why, and how to push the folder later.
    """
    folder = Path(folder)
    target = Target(target) if isinstance(target, str) else target
    check_repo_id(target.repo_id, "repo_id")
    files = files_of(folder) if files is None else files
    if not files:
        raise InputError("nothing to push", where=str(folder), cure="Name the folder of a model or of data")
    try:
        pushed = push_files(files, target, message or f"Push {folder.resolve().name}")
    except InputError:
        raise
    except Exception as error:
        raise hub_error(folder, target, error, later) from error
    if pushed.changed:
        logger.info("%s pushed to %s (commit %s)", folder, pushed.url, pushed.commit[:10])
    else:
        logger.info("%s holds the same files already: no new commit", pushed.url)
    return pushed


def hub_error(folder: str | Path, target: Target, error: BaseException, later: str | None = None) -> HubError:
    """The sentence about a push that failed for good."""
    kind = ["--repo_type", target.kind] if target.kind != "model" else []
    later = later or push_later(folder, target.repo_id, *kind)
    login = " after `hf auth login`" if status_of(error) in (401, 403) else ""
    return HubError(
        f"{folder} is complete on this machine but was not pushed to {target.repo_id}: {explain(error)}",
        f"Push it later{login} with: {later}",
    )
