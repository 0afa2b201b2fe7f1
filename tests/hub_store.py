"""What the Hub on loopback (`tests/hub_server.py`) keeps, and what it is told to do wrong."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field


KINDS = ("model", "dataset", "space")
LFS_SUFFIXES = (".safetensors", ".parquet", ".arrow", ".bin", ".pt", ".pth", ".gz", ".npy", ".npz", ".png")


@dataclass(frozen=True)
class File:
    """One file of a commit; `oid` is git's for regular files and the SHA-256 for LFS ones."""

    content: bytes = field(repr=False)
    lfs: bool = False

    @property
    def git_oid(self) -> str:
        content = self.content
        if self.lfs:
            content = f"version 1\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    author: str
    files: Mapping[str, File]


class Repo:
    """A repository: branches and tags that name commits."""

    def __init__(self, kind: str, name: str, private: bool = False, gated: bool = False):
        self.kind, self.name, self.private, self.gated = kind, name, private, gated
        self.owner = name.split("/")[0]
        self.readers = {self.owner}  # of a private repository, and those who were granted access to a gated one
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.commit("main", {".gitattributes": File(attributes.encode())}, "initial commit", self.owner)

    def commit(self, branch: str, changes: Mapping[str, File | None], title: str, author: str) -> Commit:
        """Adds a commit; a change to None takes the file away."""
        parent = self.branches.get(branch)
        files = dict(self.commits[parent].files) if parent else {}
        for path, file in changes.items():
            if file is None:
                files.pop(path, None)
            else:
                files[path] = file
        content = [(path, file.oid) for path, file in sorted(files.items())]
        text = json.dumps([self.name, parent, len(self.commits), title, content])
        made = Commit(hashlib.sha1(text.encode()).hexdigest(), parent, title, author, files)
        self.commits[made.oid] = made
        self.branches[branch] = made.oid
        return made

    def at(self, revision: str = "main") -> Commit | None:
        """The commit that a branch, tag or hash names."""
        revision = revision.removeprefix("refs/heads/")
        oid = self.branches.get(revision) or self.tags.get(revision)
        if oid is None and len(revision) >= 7:
            oid = next((known for known in self.commits if known.startswith(revision)), None)
        return self.commits.get(oid)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Contents by path, without `.gitattributes`."""
        found = self.at(revision).files.items()
        return {path: file.content for path, file in found if path != ".gitattributes"}

    def history(self, revision: str = "main") -> list[str]:
        """Titles of the commits, the newest first."""
        commit, titles = self.at(revision), []
        while commit is not None:
            titles.append(commit.title)
            commit = self.commits.get(commit.parent)
        return titles


@dataclass
class Fault:
    """A fault of the `nth` request (from 1, counted from now) that fits, and of the `times - 1` that follow.

    `kind` is a status (401, 403, 404, 409, 412, 429, 500, 503, ...), or `"refuse"` (the connection is reset before
    anything is answered), `"cut"` (reset in the middle of an upload or of an answer), `"lose"` (the request is
    carried out, and its answer lost), `"slow"` (answered after `seconds`), `"delete"` (all repositories are gone
    from then on), `"corrupt"` (one byte of the answer is another one).
    """

    where: str
    kind: int | str
    nth: int = 1
    times: float = 1
    seconds: float = 1.0
    retry_after: int | None = None
    seen: int = 0

    def strikes(self, phase: str, line: str) -> bool:
        if self.where != phase and not re.search(self.where, line):
            return False
        self.seen += 1
        return self.nth <= self.seen < self.nth + self.times


class Refusal(Exception):
    """What an endpoint raises to answer with an error."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Request:
    """One line of the server's log."""

    method: str
    path: str
    phase: str
    status: int | str
    user: str | None
