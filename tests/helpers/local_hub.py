"""A hub on loopback that answers huggingface_hub as the Hugging Face hub does, from memory.

GET   /api/models/{repo}[/revision/{revision}]       commit and files
HEAD, GET /{repo}/resolve/{revision}/{path}          a file, with ETag and X-Repo-Commit
POST  /api/repos/create                              a repository
POST  /api/validate-yaml                             the head of a model card
POST  /api/models/{repo}/preupload/{revision}        which files are large (LFS)
POST  /{repo}.git/info/lfs/objects/batch, PUT /lfs/{sha256}, POST /lfs/verify
POST  /api/models/{repo}/commit/{revision}           a commit
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

Files = dict[str, bytes]


@dataclass
class Repository:
    """A repository: its commits, oldest first, and the branches and tags that name them."""

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: Files, branch: str = "main") -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


@dataclass
class Hub:
    """The server's state, which tests read and change.

    Args:
        token: with which gated and private repositories can be read, and any written.
        status: an answer to every request, such as 503; 0 for the right ones.
        requests: method and path of every request.
        extra_names: further files that listings claim to have.
        sent: headers and body of every request.
        lfs_from: size in bytes from which a file is large.
        html: whether every answer is a page for people.
    """

    repos: dict[str, Repository] = field(default_factory=dict)
    token: str = "right"
    status: int = 0
    requests: list[str] = field(default_factory=list)
    extra_names: list[str] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)
    lfs_from: int = 1 << 60
    html: bool = False
    objects: dict[str, bytes] = field(default_factory=dict)
    url: str = ""

    def put(self, repo: str, folder: Path, branch: str = "main") -> str:
        """Commits the files below a folder, and nothing else, to a repository."""
        files = (file for file in folder.rglob("*") if file.is_file())
        content = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
        return self.repos.setdefault(repo, Repository()).commit(content, branch)

    def downloads(self) -> list[str]:
        """The files that were sent, by their paths in their repositories."""
        sent = (r.partition("/resolve/")[2] for r in self.requests if r.startswith("GET"))
        return [place.partition("/")[2] for place in sent if place]


@contextmanager
def serve() -> Iterator[Hub]:
    """Runs a hub in a thread of this process."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serve_to_this_process(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Runs a hub to which huggingface_hub speaks in this process."""
    with serve() as hub:
        use(hub.url, cache, monkeypatch)
        yield hub


def use(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes huggingface_hub speak to this hub, with a cache and without a token."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def forbid_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Does what HF_HUB_OFFLINE=1 does to a new process."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    # ---- answers --------------------------------------------------------------------------------

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append(f"{self.command} {self.state.url}{path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.chunks()
        self.state.sent += [str(self.headers).encode(), body]
        if self.state.status:
            self.reply(self.state.status, {"error": "out of order"})
        elif self.state.html:
            self.reply(
                200, b"<html>Please sign in to this network</html>", {"Content-Type": "text/html"}
            )
        elif path.startswith("/lfs/"):
            self.large_file(path, body)
        elif self.command == "POST":
            self.write(path, json.loads(body) if body[:1] == b"{" and b"\n" not in body else body)
        elif path.startswith("/api/models/"):
            repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            self.info(repo, revision or "main")
        elif "/resolve/" in path:
            repo, _, rest = path[1:].partition("/resolve/")
            revision, _, name = rest.partition("/")
            self.file(repo, revision, name)
        else:
            self.error(404, "EntryNotFound")

    def chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status: int, code: str) -> None:
        self.reply(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    @property
    def has_access(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.state.token}"

    def readable(self, name: str) -> Repository | None:
        """The repository; answers with an error, and returns None, where it can't be read."""
        repo = self.state.repos.get(name)
        if repo is None or (repo.private and not self.has_access):
            self.error(404 if self.has_access else 401, "RepoNotFound")
            return None
        return repo

    def info(self, name: str, revision: str) -> None:
        repo = self.readable(name)
        if repo is None:
            return
        sha = repo.resolve(revision)
        if sha is None:
            self.error(404, "RevisionNotFound")
            return
        names = [*repo.commits[sha], *self.state.extra_names]
        info = {"id": name, "modelId": name, "sha": sha, "private": repo.private}
        self.reply(200, info | {"siblings": [{"rfilename": one} for one in names]})

    def file(self, name: str, revision: str, path: str) -> None:
        repo = self.readable(name)
        if repo is None:
            return
        if repo.gated and not self.has_access:
            self.error(403 if self.headers.get("Authorization") else 401, "GatedRepo")
            return
        sha = repo.resolve(revision)
        if sha is None:
            self.error(404, "RevisionNotFound")
        elif path not in repo.commits[sha]:
            self.error(404, "EntryNotFound")
        else:
            content = repo.commits[sha][path]
            etag = hashlib.sha256(content).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha}
            self.reply(200, content, headers | {"Content-Type": "application/octet-stream"})

    # ---- writing --------------------------------------------------------------------------------

    def write(self, path: str, body: Any) -> None:
        if path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif not self.has_access:
            self.error(401, "")
        elif path == "/api/repos/create":
            name = f"{body['organization']}/{body['name']}"
            if name in self.state.repos:
                self.reply(409, {"url": f"{self.state.url}/{name}", "error": "exists"})
                return
            private = body.get("visibility") == "private" or bool(body.get("private"))
            self.state.repos[name] = Repository(private=private)
            self.state.repos[name].commit({".gitattributes": b""})
            self.reply(200, {"url": f"{self.state.url}/{name}", "name": name, "id": "1"})
        elif "/preupload/" in path:
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["size"] >= self.state.lfs_from else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for one in body["files"]
            ]
            self.reply(200, {"files": modes, "isDefaultBranch": True})
        elif path.endswith("/info/lfs/objects/batch"):
            self.batch(body)
        elif "/commit/" in path:
            repo, _, branch = path.removeprefix("/api/models/").partition("/commit/")
            self.commit(repo, branch, body)
        else:
            self.error(404, "EntryNotFound")

    def batch(self, body: Any) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.state.url}/lfs/{one['oid']}"}}}
            for one in body["objects"]
        ]
        self.reply(200, {"transfer": "basic", "objects": objects})

    def large_file(self, path: str, body: bytes) -> None:
        oid = path.removeprefix("/lfs/")
        assert hashlib.sha256(body).hexdigest() == oid
        self.state.objects[oid] = body
        self.reply(200, {})

    def commit(self, name: str, branch: str, body: Any) -> None:
        repo = self.state.repos[name]
        files = dict(repo.commits[repo.refs[branch]])
        lines = body.splitlines() if isinstance(body, bytes) else [json.dumps(body)]
        for line in map(json.loads, lines):
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.state.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files, branch)
        url = f"{self.state.url}/{name}/commit/{sha}"
        self.reply(200, {"success": True, "commitUrl": url, "commitOid": sha, "hookOutput": ""})
