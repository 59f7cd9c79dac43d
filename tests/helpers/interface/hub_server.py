"""A hub for tests (`HubServer`): the endpoints that huggingface_hub calls to read and to write models, in a thread."""

from __future__ import annotations

import base64
import hashlib
import importlib
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
    """A model's repository: the files of each commit, and the commit of each branch and tag."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, ref: str = "main") -> str:
        """Add a commit with exactly these files."""
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.refs[ref] = dict(files), sha
        return sha


class HubServer:
    """The hub.

    Attributes:
        repositories: by name.
        readers: tokens that may read private repositories.
        writers: tokens that may write.
        requests: method and path of every request, and the token that was sent with it.
        messages: the message of each commit that was sent.
        uploads: the oids of the large files that were sent by themselves.
        large: the size in bytes from which files are sent by themselves.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.readers: set[str] = set()
        self.writers: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []
        self.messages: list[str] = []
        self.uploads: dict[str, bytes] = {}
        self.large = 1 << 30
        self.address = ""

    def add(self, name: str, folder: Path | Files, ref: str = "main", *, private: bool = False) -> str:
        """Add a commit with the files of a folder; returns it."""
        files = folder if isinstance(folder, dict) else {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }  # fmt: skip
        repository = self.repositories.setdefault(name, Repository(private))
        return repository.commit(files, ref)

    def files(self, name: str, ref: str = "main") -> Files:
        """The files of a branch."""
        repository = self.repositories[name]
        return repository.commits[repository.refs[ref]]

    def tokens(self) -> set[str]:
        """Those that were sent."""
        return {token for _, _, token in self.requests if token is not None}


@contextmanager
def hub_server(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[HubServer]:
    """Serve an empty hub, and let huggingface_hub and transformers use it with an empty cache, without a token."""
    constants = pytest.importorskip("huggingface_hub.constants")
    hub = HubServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": hub.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "no-token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)  # read from the environment at import only
    # Both libraries keep one object, which has the endpoint of its first use.
    monkeypatch.setattr(importlib.import_module("huggingface_hub.hf_api").api, "endpoint", hub.address)
    monkeypatch.setattr(importlib.import_module("transformers.utils.hub"), "_hf_api", None, raising=False)
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _RefusedError(Exception):
    def __init__(self, status: int, code: str, message: str, place: str = "") -> None:
        self.status, self.code, self.place = status, code, place
        super().__init__(message)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_HEAD(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_PUT(self) -> None:
        self._answer(self._put)

    @property
    def _token(self) -> str | None:
        given = self.headers.get("Authorization", "")
        return given.removeprefix("Bearer ") or None

    def _answer(self, work: Any) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self._token))
        self.content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            work(path)
        except _RefusedError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            self._send({"error": str(error), "url": self.hub.address + error.place}, error.status, headers)

    def _send(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _repository(self, name: str) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self._token not in self.hub.readers | self.hub.writers):
            raise _RefusedError(
                401, "RepoNotFound", f"Repository not found, token {self._token}"
            )  # echoes, as proxies do
        return found

    def _commit(self, repository: Repository, revision: str) -> tuple[str, Files]:
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    def _get(self, path: str) -> None:
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
            repository = self._repository(name)
            inside = "/".join(rest[2:]) if rest[:1] == ["tree"] else ""
            revision = "/".join(rest[1:]).removesuffix(f"/{inside}" if inside else "") if rest else "main"
            if not rest and not repository.refs:
                self._send({"id": name, "sha": None, "private": repository.private, "siblings": []})
                return
            sha, files = self._commit(repository, revision)
            if inside and not any(file.startswith(f"{inside}/") for file in files):
                raise _RefusedError(404, "EntryNotFound", f"{inside} does not exist")
            if rest[:1] == ["tree"]:
                self._send([{"type": "file", "path": p, "size": len(c), "oid": _oid(c)} for p, c in files.items()])
            else:
                siblings = [{"rfilename": file} for file in files]
                self._send({"id": name, "sha": sha, "private": repository.private, "siblings": siblings})
            return
        if len(parts) < 4:
            raise _RefusedError(404, "", "Not found")
        name, (revision, *file) = "/".join(parts[:2]), parts[3:]
        sha, files = self._commit(self._repository(name), revision)
        content = files.get("/".join(file))
        if content is None:
            raise _RefusedError(404, "EntryNotFound", "Entry not found")
        self._send(content, headers={"X-Repo-Commit": sha, "ETag": f'"{_oid(content)}"'})

    def _post(self, path: str) -> None:
        if path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
            return
        if self._token not in self.hub.writers:
            raise _RefusedError(403, "", f"You don't have the rights to write with {self._token}")
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            wanted = json.loads(self.content)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in self.hub.repositories:
                raise _RefusedError(409, "", "You already created this model repo", f"/{name}")
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.hub.repositories[name] = Repository(private)
            self.hub.repositories[name].commit({".gitattributes": b""})
            self._send({"url": f"{self.hub.address}/{name}"})
        elif path.endswith(".git/info/lfs/objects/batch"):
            rows = json.loads(self.content)["objects"]
            actions = [
                {**row, "actions": {"upload": {"href": f"{self.hub.address}/upload/{row['oid']}"}}} for row in rows
            ]
            self._send({"objects": actions, "transfer": "basic"})
        else:
            self._change("/".join(parts[2:4]), parts[4], "/".join(parts[5:]))

    def _change(self, name: str, what: str, revision: str) -> None:
        repository = self._repository(name)
        if what == "branch":
            if revision in repository.refs:
                raise _RefusedError(409, "", "Reference already exists")
            repository.refs[revision] = repository.refs["main"]
            self._send({})
            return
        _, files = self._commit(repository, revision)
        if what == "preupload":
            rows = json.loads(self.content)["files"]
            self._send(
                {
                    "files": [
                        {
                            "path": row["path"],
                            "uploadMode": "lfs" if row["size"] >= self.hub.large else "regular",
                            "shouldIgnore": False,
                        }
                        for row in rows
                    ]
                }
            )
            return
        added = {}
        for line in map(json.loads, self.content.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                added[value["path"]] = self.hub.uploads[value["oid"]]
        sha = repository.commit({**files, **added}, revision)
        url = f"{self.hub.address}/{name}/commit/{sha}"
        self._send({"commitUrl": url, "commitOid": sha, "pullRequestUrl": None})

    def _put(self, path: str) -> None:
        self.hub.uploads[path.rpartition("/")[2]] = self.content
        self._send({})


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
