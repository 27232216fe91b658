"""A Hub for tests without a network: as much of its HTTP interface as uploads, downloads and `load_dataset` need."""

import base64
import hashlib
import json
import os
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN, USER = "hf_test", "someone"
LARGE = (".parquet", ".safetensors")  # stored by LFS, as on the Hub


@dataclass
class Repository:
    """What a repository holds: branch -> path -> content; each commit of a branch has another name, and stays."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def sha(self, branch: str) -> str:
        digest = hashlib.sha1()
        for path, content in sorted(self.branches[branch].items()):
            digest.update(f"{path}\0{hashlib.sha1(content).hexdigest()}\0".encode())
        return digest.hexdigest()

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a branch or commit."""
        for branch, files in self.branches.items():
            if revision in (branch, self.sha(branch)):
                return self.sha(branch), files
        return (revision, self.commits[revision]) if revision in self.commits else None

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Puts the files in the place of the branch's, all at once; returns the commit's name."""
        self.branches[branch] = files
        self.commits[self.sha(branch)] = dict(files)
        return self.sha(branch)


class HubServer:
    """Serves on a port of its own while entered.

    Attributes:
        repositories: (`models` or `datasets`, name) -> repository.
        requests: Method and path of everything that was asked, in order.
        faults: Name of a repository -> (pattern of requests, "drop" or "forbid"): while that repository is in use, the
            connection of such a request is cut before the answer, or it is refused whoever asks.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: dict[str, tuple[str, str]] = {}
        self.in_use = ""
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Environment of a process whose Hub this is; `home` holds its caches."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return kept | own | ({} if token is None else {"HF_TOKEN": token})


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    # (method, pattern of the path) -> method of this class, whose arguments are the groups.
    routes = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/branch/(.+)", "branch"),
        ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/preupload/(.+)", "preupload"),
        ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/commit/(.+)", "commit"),
        ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/(.+)", "paths_info"),
        ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", "tree"),
        ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/revision/(.+)", "info"),
        ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)()", "info"),
        ("POST", r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/([0-9a-f]{64})", "put"),
        ("HEAD|GET", r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        creates = path.endswith("/create")
        named = self.body.decode() if creates else path
        before = "" if creates else self.hub.in_use  # uploads of files name no repository
        self.hub.in_use = next((name for name in self.hub.faults if name.split("/")[1] in named), before)
        pattern, kind = self.hub.faults.get(self.hub.in_use, ("nothing", ""))
        if re.fullmatch(pattern, f"{self.command} {path}"):
            if kind == "forbid":
                return self.refuse(403, "You don't have the rights to do that.")
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        for methods, pattern, name in self.routes:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split("|"):
                writes = name in ("create", "branch", "preupload", "commit", "batch", "whoami")
                if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.refuse(401, "Invalid username or password.")
                return getattr(self, name)(*match.groups())
        return self.refuse(404, f"no route for {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: pytest shows what matters."""

    # ---- answers ----------------------------------------------------------------------------------------------------

    def answer(self, value: Any, status: int = 200) -> None:
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def refuse(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.send(json.dumps({"error": message}).encode(), status, headers | {"Content-Type": "application/json"})

    def send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def find(self, kind: str | None, name: str, revision: str) -> tuple[Repository, str, dict[str, bytes]] | None:
        """Repository, commit and files; None when it has been refused."""
        repository = self.hub.repositories.get(((kind or "models").rstrip("/"), name))
        if repository is None:
            self.refuse(404, "Repository not found", "RepoNotFound")
            return None
        found = repository.files(revision or "main")
        if found is None:
            self.refuse(404, "Invalid rev id", "RevisionNotFound")
            return None
        return repository, *found

    # ---- the routes -------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        self.answer({"type": "user", "name": USER, "orgs": []})

    def validate(self) -> None:
        """Of a card: its metadata are a mapping in YAML."""
        metadata = yaml.safe_load(json.loads(self.body)["content"].split("---\n")[1])
        self.answer({"errors": [] if isinstance(metadata, dict) else [{"message": "no mapping"}], "warnings": []})

    def create(self) -> None:
        wanted = json.loads(self.body)
        kind, name = f"{wanted.get('type', 'model')}s", f"{wanted.get('organization') or USER}/{wanted['name']}"
        prefix = "datasets/" if kind == "datasets" else ""
        known = (kind, name) in self.hub.repositories
        self.hub.repositories.setdefault((kind, name), Repository(wanted.get("visibility") == "private"))
        url = {"url": f"{self.hub.url}/{prefix}{name}"}
        self.answer(url | ({"error": "You already created this repo"} if known else {}), 409 if known else 200)

    def branch(self, kind: str, name: str, branch: str) -> None:
        found = self.find(kind, name, "main")
        if found:
            known = branch in found[0].branches
            found[0].branches.setdefault(branch, dict(found[2]))
            self.answer({}, 409 if known else 200)

    def preupload(self, kind: str, name: str, revision: str) -> None:
        if self.find(kind, name, revision):
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            modes = [{"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular"} for path in paths]
            self.answer({"files": [mode | {"shouldIgnore": False} for mode in modes]})

    def batch(self, kind: str | None, name: str) -> None:
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}", "header": {}}}
        self.answer({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        self.answer({})

    def commit(self, kind: str, name: str, revision: str) -> None:
        found = self.find(kind, name, revision)
        if not found:
            return
        files = dict(found[2])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        oid = found[0].commit(revision, files)
        self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def info(self, kind: str, name: str, revision: str) -> None:
        found = self.find(kind, name, revision)
        if found:
            repository, sha, files = found
            names = [{"rfilename": path} for path in files]
            self.answer({"id": name, "sha": sha, "private": repository.private, "siblings": names, "tags": []})

    def tree(self, kind: str, name: str, revision: str, folder: str | None) -> None:
        found = self.find(kind, name, revision)
        if found:
            start = f"{folder}/" if folder else ""
            self.answer([describe(path, content) for path, content in found[2].items() if path.startswith(start)])

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        found = self.find(kind, name, revision)
        if found:
            wanted = json.loads(self.body)["paths"]
            self.answer([describe(path, found[2][path]) for path in wanted if path in found[2]])

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        found = self.find(kind, name, revision)
        if not found:
            return
        _, sha, files = found
        if path not in files:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        content = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return self.send(content, 200, headers)
        first, last = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self.send(content[first : last + 1], 206, headers)


def describe(path: str, content: bytes) -> dict[str, Any]:
    """A file as the interface lists it."""
    entry: dict[str, Any] = {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }
    if path.endswith(LARGE):
        oid = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 128}
    return entry
