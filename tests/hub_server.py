"""A Hub on loopback: it speaks the Hub's HTTP API to the real clients, keeps all in memory, and fails on demand.

Models, datasets and Spaces with branches, tags and commits; uploads as regular files and through LFS (one part or
several); downloads with `Range`; private and gated repositories; users with tokens. Standard library only.

    with HubServer() as hub:
        hub.add_user("alice", token="hf_alice")
        hub.add_repo("alice/student", {"config.json": b"{}"}, kind="model", private=True)
        hub.fail("commit", 503, times=2)              # the next two commits
        hub.fail("put", "cut", nth=2)                 # the second upload of a file, in the middle
        ...
        assert hub.repo("alice/student").files()["config.json"] == b"{}"
        assert [request.phase for request in hub.requests] == [...]

Client libraries read `HF_ENDPOINT` when they are imported, so whoever talks to the server runs in another process:
`hub.environment(home)` is what that process needs. Tests take the fixture `hub` (a running server with the users
`alice` and `bob`, emptied for every test) and `hub_client` (one such process for the whole session that imports the
libraries once): see `tests/hub_client.py`.

Phases, for `fail` and `requests`: whoami, create, delete, validate, preupload, batch, put, complete, verify, commit,
info, auth, tree, paths, refs, commits, branch, tag, resolve, other.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .hub_store import LFS_SUFFIXES, Commit, Fault, File, Refusal, Repo, Request


CREATED = "2026-01-01T00:00:00.000Z"


class HubServer:
    """See the module's text. Use it as a context manager, or call `start` and `stop`."""

    def __init__(self, part_size: int = 5_000_000):
        self.part_size = part_size  # larger LFS files are sent in parts
        self._lock = threading.RLock()
        self._server: ThreadingHTTPServer | None = None
        self._connections: set[socket.socket] = set()
        self.port = 0
        self.reset()

    # ---- for tests ----
    def reset(self) -> None:
        """Forgets everything but the port."""
        with self._lock:
            self.users: dict[str, str] = {}
            self.repos: dict[tuple[str, str], Repo] = {}
            self.blobs: dict[str, bytes] = {}
            self.uploads: dict[str, bytes] = {}  # not verified yet
            self.parts: dict[tuple[str, int], bytes] = {}
            self.faults: list[Fault] = []
            self.requests: list[Request] = []

    def add_user(self, name: str, token: str) -> None:
        self.users[token] = name

    def add_repo(
        self, name: str, files: Mapping[str, bytes] | None = None, kind: str = "model", **options: bool
    ) -> Repo:
        """A new repository, with one commit of `files`; `options` are `private` and `gated`."""
        repo = self.repos[kind, name] = Repo(kind, name, **options)
        if files:
            made = {path: File(content, path.endswith(LFS_SUFFIXES)) for path, content in files.items()}
            self.blobs.update({file.sha256: file.content for file in made.values() if file.lfs})
            repo.commit("main", made, "files", repo.owner)
        return repo

    def repo(self, name: str, kind: str = "model") -> Repo:
        return self.repos[kind, name]

    def fail(self, where: str, kind: int | str, **options: Any) -> Fault:
        """Injects a [`Fault`]; `where` is a phase, or a pattern of `"METHOD /path"`."""
        self.faults.append(Fault(where, kind, **options))
        return self.faults[-1]

    def phases(self) -> list[str]:
        """The phases of all requests so far."""
        return [request.phase for request in self.requests]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, home: Any, token: str | None = None) -> dict[str, str]:
        """The environment variables of a client process whose caches lie in `home`."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return variables | ({"HF_TOKEN": token} if token else {})

    def start(self) -> HubServer:
        server = self

        class Handler(_Handler):
            hub = server

        self._server = _Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
            for connection in list(self._connections):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def down(self) -> Iterator[None]:
        """Nobody listens at the port meanwhile."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def __enter__(self) -> HubServer:
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    disable_nagle_algorithm = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""


_API = re.compile(
    r"/api/(models|datasets|spaces)/([^/]+(?:/[^/]+)?)"
    r"(?:/(revision|tree|preupload|commit|commits|refs|branch|tag|paths-info|auth-check)(?:/(.*))?)?"
)
_RESOLVE = re.compile(r"/(?:(datasets|spaces)/)?([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)")
_BATCH = re.compile(r"/(?:(datasets|spaces)/)?([^/]+(?:/[^/]+)?)\.git/info/lfs/objects/batch")
_PHASES = {"revision": "info", "paths-info": "paths", "auth-check": "auth", None: "info"}


class _Handler(BaseHTTPRequestHandler):
    """Routes a request, applies the faults, answers."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        """The log is `hub.requests`."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # ---- frame ----
    def setup(self) -> None:
        super().setup()
        self.hub._connections.add(self.connection)

    def finish(self) -> None:
        self.hub._connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def _serve(self) -> None:
        self.path_only = urlsplit(self.path).path
        self.query = parse_qs(urlsplit(self.path).query)
        phase, action = self._route()
        line = f"{self.command} {self.path}"
        with self.hub._lock:
            fault = next((fault for fault in self.hub.faults if fault.strikes(phase, line)), None)
        kind = fault.kind if fault else None
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip() or None
        self.user = self.hub.users.get(token)
        self.close_after = self.cut = self.corrupt = False
        status: int | str = "lost"
        try:
            if kind == "refuse":
                return self._reset()
            body = self._read_body(half=kind == "cut" and self.command in ("PUT", "POST"))
            if body is None:
                return self._reset()
            if kind == "slow":
                time.sleep(fault.seconds)
            if kind == "delete":
                with self.hub._lock:
                    self.hub.repos.clear()
            self.cut, self.corrupt = kind == "cut", kind == "corrupt"
            try:
                if isinstance(kind, int):
                    raise Refusal(kind, f"injected: {self.responses.get(kind, ('error',))[0]}")
                if token is not None and self.user is None:
                    raise Refusal(401, "Invalid credentials in Authorization header")
                with self.hub._lock:
                    answer = action(body)
                if kind == "lose":
                    return self._reset()
                status = self._send(*answer)
            except Refusal as refusal:
                headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
                if fault and fault.retry_after is not None:
                    headers["Retry-After"] = str(fault.retry_after)
                status = self._send({"error": str(refusal)}, headers, refusal.status)
        finally:
            with self.hub._lock:
                self.hub.requests.append(Request(self.command, self.path, phase, status, self.user))

    def _read_body(self, half: bool) -> bytes | None:
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
                if half:
                    return None
            self.rfile.readline()
            return b"".join(parts)
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size // 2 if half else size)
        return None if half else body

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _send(self, content: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> int | str:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": "application/json", **(headers or {})}
        if self.corrupt and data:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.cut else data)
        self.wfile.flush()
        if self.cut:
            self.close_connection = True
            return "cut"
        return status

    def _route(self) -> tuple[str, Any]:
        path = self.path_only
        fixed = {
            "/api/whoami-v2": ("whoami", self._whoami),
            "/api/repos/create": ("create", self._create),
            "/api/repos/delete": ("delete", self._delete),
            "/api/validate-yaml": ("validate", self._validate),
        }
        if path in fixed:
            return fixed[path]
        if match := re.fullmatch(r"/lfs/(put|complete|verify)/([0-9a-f]{64})(?:/(\d+))?", path):
            phase, oid, part = match.groups()
            return phase, lambda body: getattr(self, f"_{phase}")(body, oid, part)
        if match := _BATCH.fullmatch(path):
            kind, name = match.groups()
            return "batch", lambda body: self._batch(body, self._writable(kind, name))
        if match := _RESOLVE.fullmatch(path):
            kind, name, revision, file = match.groups()
            return "resolve", lambda _: self._resolve(self._readable(kind, name), unquote(revision), unquote(file))
        if match := _API.fullmatch(path):
            kind, name, verb, rest = match.groups()
            phase = _PHASES.get(verb, verb)
            rest = rest if verb == "tree" else unquote(rest or "")
            return phase, lambda body: getattr(self, f"_{phase}")(body, kind, name, rest)
        return "other", self._nothing

    def _nothing(self, _: bytes) -> Any:
        raise Refusal(404, "Sorry, there is no such endpoint here")

    # ---- who may do what ----
    def _readable(self, kind: str | None, name: str) -> Repo:
        repo = self.hub.repos.get(((kind or "models")[:-1], unquote(name)))
        if repo is None or (repo.private and self.user not in repo.readers):
            raise Refusal(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def _writable(self, kind: str | None, name: str) -> Repo:
        repo = self._readable(kind, name)
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if self.user != repo.owner:
            raise Refusal(403, "You don't have the rights to write in this repository")
        return repo

    @staticmethod
    def _commit_at(repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision or "main")
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _described(self, repo: Repo, commit: Commit) -> dict[str, Any]:
        siblings = []
        for path, file in sorted(commit.files.items()):
            lfs = {"sha256": file.sha256, "size": len(file.content), "pointerSize": 128} if file.lfs else None
            details = {"size": len(file.content), "blobId": file.git_oid} | ({"lfs": lfs} if lfs else {})
            siblings.append({"rfilename": path} | (details if "blobs" in self.query else {}))
        return {
            "_id": hashlib.md5(repo.name.encode()).hexdigest()[:24],
            "id": repo.name,
            "modelId": repo.name,
            "author": repo.owner,
            "sha": commit.oid,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "createdAt": CREATED,
            "lastModified": CREATED,
            "siblings": siblings,
        }

    # ---- users and repositories ----
    def _whoami(self, _: bytes) -> Any:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        role = {"accessToken": {"role": "write", "displayName": "test", "createdAt": CREATED}}
        return ({"type": "user", "id": "0", "name": self.user, "fullname": self.user, "orgs": [], "auth": role},)

    def _create(self, body: bytes) -> Any:
        wish = json.loads(body)
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        kind, owner = wish.get("type") or "model", wish.get("organization") or self.user
        name = f"{owner}/{wish['name']}"
        prefix = "" if kind == "model" else f"{kind}s/"
        answer = {"url": f"{self.hub.url}/{prefix}{name}", "name": name, "id": name}
        if owner != self.user:
            raise Refusal(403, f"You don't have the rights to create a {kind} under the namespace {owner!r}")
        if (kind, name) in self.hub.repos:
            return {"error": "You already created this repo", **answer}, None, 409
        private = wish.get("visibility") == "private" or bool(wish.get("private"))
        self.hub.repos[kind, name] = Repo(kind, name, private=private)
        return (answer,)

    def _delete(self, body: bytes) -> Any:
        wish = json.loads(body)
        repo = self._writable(
            f"{wish.get('type') or 'model'}s", f"{wish.get('organization') or self.user}/{wish['name']}"
        )
        del self.hub.repos[repo.kind, repo.name]
        return ({},)

    def _validate(self, body: bytes) -> Any:
        import yaml

        header = re.match(r"\A---\s*\n(.*?)^---\s*$", json.loads(body)["content"], re.DOTALL | re.MULTILINE)
        try:
            metadata = yaml.safe_load(header.group(1)) if header else {}
        except yaml.YAMLError as error:
            return {"errors": [{"message": f"bad YAML: {error}"}], "warnings": []}, None, 400
        wrong = metadata is not None and not isinstance(metadata, dict)
        return ({"errors": [{"message": "metadata is no mapping"}] if wrong else [], "warnings": []},)

    def _auth(self, _: bytes, kind: str, name: str, wish: str) -> Any:
        self._writable(kind, name) if wish == "write" else self._readable(kind, name)
        return ({},)

    # ---- reading ----
    def _info(self, _: bytes, kind: str, name: str, revision: str) -> Any:
        repo = self._readable(kind, name)
        return (self._described(repo, self._commit_at(repo, revision)),)

    def _refs(self, _: bytes, kind: str, name: str, rest: str) -> Any:
        repo = self._readable(kind, name)
        branches = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": oid} for b, oid in repo.branches.items()]
        tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": oid} for t, oid in repo.tags.items()]
        return ({"branches": branches, "tags": tags, "converts": []},)

    def _commits(self, _: bytes, kind: str, name: str, revision: str) -> Any:
        repo = self._readable(kind, name)
        commit, found = self._commit_at(repo, revision), []
        while commit is not None:
            authors = [{"user": commit.author}]
            found.append({"id": commit.oid, "title": commit.title, "message": "", "authors": authors, "date": CREATED})
            commit = repo.commits.get(commit.parent)
        return (found,)

    @staticmethod
    def _entry(path: str, file: File) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.git_oid}
        if file.lfs:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 128}
        return entry

    @staticmethod
    def _folder(path: str) -> dict[str, Any]:
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}

    def _tree(self, _: bytes, kind: str, name: str, rest: str) -> Any:
        repo = self._readable(kind, name)
        revision, _, folder = rest.partition("/")
        commit, folder = self._commit_at(repo, unquote(revision)), unquote(folder).strip("/")
        prefix = f"{folder}/" if folder else ""
        inside = {path: file for path, file in commit.files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries, folders = [], set()
        for path, file in sorted(inside.items()):
            parents = path[len(prefix) :].split("/")[:-1]
            for depth in range(1, len(parents) + 1 if recursive else min(len(parents), 1) + 1):
                folders.add(prefix + "/".join(parents[:depth]))
            if recursive or not parents:
                entries.append(self._entry(path, file))
        return ([*map(self._folder, sorted(folders)), *entries],)

    def _paths(self, body: bytes, kind: str, name: str, revision: str) -> Any:
        commit = self._commit_at(self._readable(kind, name), revision)
        form = self.headers.get("Content-Type", "").startswith("application/x-www-form")
        wanted = parse_qs(body.decode())["paths"] if form else json.loads(body)["paths"]
        entries = []
        for path in [wanted] if isinstance(wanted, str) else wanted:
            if path in commit.files:
                entries.append(self._entry(path, commit.files[path]))
            elif any(known.startswith(f"{path}/") for known in commit.files):
                entries.append(self._folder(path))
        return (entries,)

    def _resolve(self, repo: Repo, revision: str, path: str) -> Any:
        if repo.gated and self.user not in repo.readers:
            status = 401 if self.user is None else 403
            raise Refusal(status, f"Access to {repo.kind} {repo.name} is restricted", "GatedRepo")
        commit = self._commit_at(repo, revision)
        file = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if file is None:
            return {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"}, 404
        headers["ETag"] = f'"{file.oid}"'
        if file.lfs:
            headers |= {"X-Linked-Size": str(len(file.content)), "X-Linked-ETag": f'"{file.sha256}"'}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return file.content, headers
        size = len(file.content)
        first = int(wanted.group(1)) if wanted.group(1) else size - int(wanted.group(2))
        last = min(int(wanted.group(2)) if wanted.group(1) and wanted.group(2) else size - 1, size - 1)
        if first >= size:
            return b"", {**headers, "Content-Range": f"bytes */{size}"}, 416
        return file.content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{size}"}, 206

    # ---- writing ----
    def _preupload(self, body: bytes, kind: str, name: str, revision: str) -> Any:
        known = self._commit_at(self._writable(kind, name), revision).files
        answers = []
        for file in json.loads(body)["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > 10_000_000
            oid = known[file["path"]].oid if file["path"] in known else None
            mode = "lfs" if lfs else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return ({"files": answers},)

    def _batch(self, body: bytes, repo: Repo) -> Any:
        wish, objects = json.loads(body), []
        for item in wish["objects"]:
            oid, size = item["oid"], item["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.blobs:
                upload: dict[str, Any] = {"href": f"{self.hub.url}/lfs/put/{oid}"}
                if size > self.hub.part_size and "multipart" in wish.get("transfers", []):
                    count = -(-size // self.hub.part_size)
                    parts = {str(part): f"{self.hub.url}/lfs/put/{oid}/{part}" for part in range(1, count + 1)}
                    header = {"chunk_size": str(self.hub.part_size), **parts}
                    upload = {"href": f"{self.hub.url}/lfs/complete/{oid}", "header": header}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/verify/{oid}"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def _put(self, body: bytes, oid: str, part: str | None) -> Any:
        if part is None:
            self._store(oid, body)
        else:
            self.hub.parts[oid, int(part)] = body
        return b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}

    def _complete(self, body: bytes, oid: str, part: None) -> Any:
        numbers = sorted(part["partNumber"] for part in json.loads(body)["parts"])
        self._store(oid, b"".join(self.hub.parts[oid, number] for number in numbers))
        return ({},)

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, f"what came is not {oid}")
        self.hub.uploads[oid] = content

    def _verify(self, body: bytes, oid: str, part: None) -> Any:
        if len(self.hub.uploads.get(oid, b"")) != json.loads(body)["size"]:
            raise Refusal(404, f"{oid} was not uploaded")
        self.hub.blobs[oid] = self.hub.uploads[oid]
        return ({},)

    def _commit(self, body: bytes, kind: str, name: str, revision: str) -> Any:
        repo = self._writable(kind, name)
        head = self._commit_at(repo, revision)
        changes: dict[str, File | None] = {}
        title = ""
        for line in filter(None, body.split(b"\n")):
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title, parent = value["summary"], value.get("parentCommit")
                if parent and not head.oid.startswith(parent):
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                changes[value["path"]] = File(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refusal(400, f"the LFS file {value['oid']} of {value['path']} was not uploaded")
                changes[value["path"]] = File(self.hub.blobs[value["oid"]], lfs=True)
            elif item["key"] == "deletedFile":
                changes[value["path"]] = None
            elif item["key"] == "deletedFolder":
                changes |= {path: None for path in head.files if path.startswith(value["path"].rstrip("/") + "/")}
        made = repo.commit(revision, changes, title, self.user or "")
        return ({"success": True, "commitOid": made.oid, "commitUrl": f"{self.hub.url}/{name}/commit/{made.oid}"},)

    def _branch(self, body: bytes, kind: str, name: str, branch: str) -> Any:
        repo = self._writable(kind, name)
        if self.command == "DELETE":
            repo.branches.pop(branch, None)
        elif branch in repo.branches:
            raise Refusal(409, f"Reference already exists: {branch}")
        else:
            wish = json.loads(body) if body else {}
            repo.branches[branch] = self._commit_at(repo, wish.get("startingPoint") or "main").oid
        return ({},)

    def _tag(self, body: bytes, kind: str, name: str, rest: str) -> Any:
        repo = self._writable(kind, name)
        if self.command == "DELETE":
            repo.tags.pop(rest, None)
        else:
            repo.tags[json.loads(body)["tag"]] = self._commit_at(repo, rest).oid
        return ({},)
