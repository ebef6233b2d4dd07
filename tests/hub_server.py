"""A Hub on loopback: what `huggingface_hub` asks for when repositories are made, pushed to and loaded from.

Repositories live in memory as commits (path -> content). Every file is "regular", so nothing asks for large-file or
Xet servers. A private repository answers only to requests with `TOKEN`, a gated one gives no files. Requests that
match the regex `broken` are dropped without an answer; a child process sets it by `POST /break`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_only_for_tests"
USER = "tester"


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Commits of one repository; a revision is a branch, a tag or a commit's 40 hexadecimal digits."""

    is_private: bool = False
    is_gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        seed = f"{branch}{len(self.commits)}{sorted((path, blob_id(content)) for path, content in files.items())}"
        sha = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[sha], self.refs[branch] = files, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs.get(revision, revision)]


class HubServer:
    """Start with `with HubServer() as hub`; `hub.environment(home)` is what a child process needs to talk to it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.broken = ""  # regex of "METHOD path"; empty: none
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query, keep_blank_values=True)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = url.path
        request = f"{self.command} {unquote(path)}"
        with self.hub.lock:
            if self.hub.broken and path != "/break" and re.search(self.hub.broken, request):
                self.close_connection = True
                self.connection.close()
                return
            for method, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, path)
                if method == self.command.replace("HEAD", "GET") and match:
                    return answer(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
        self._send_json({"error": "not found"}, 404)

    # ---- answers

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _refuse(self, code: str, status: int = 404, headers: dict[str, str] | None = None) -> None:
        self._send_json({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _repository(self, repo: str) -> Repository | None:
        """The repository if it exists and the request may see it; otherwise the refusal is sent."""
        found = self.hub.repositories.get(repo)
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if found is None or (found.is_private and not has_token):
            self._refuse("RepoNotFound")
            return None
        return found

    def break_requests(self) -> None:
        self.hub.broken = self.body.decode()
        self._send_json({})

    def whoami(self) -> None:
        self._send_json({"name": USER, "type": "user", "orgs": [], "auth": {}})

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        is_known = repo in self.hub.repositories
        if not is_known:
            is_private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.repositories[repo] = Repository(is_private=is_private)
        self._send_json({"url": f"{self.hub.endpoint}/{repo}"}, 409 if is_known else 200)

    def validate_yaml(self) -> None:
        self._send_json({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        if found := self._repository(repo):
            files = found.files(revision)
            answers = [
                {
                    "path": item["path"],
                    "uploadMode": "regular",
                    "shouldIgnore": False,
                    "oid": blob_id(files[item["path"]]) if item["path"] in files else None,
                }
                for item in json.loads(self.body)["files"]
            ]
            self._send_json({"files": answers})

    def commit(self, repo: str, revision: str) -> None:
        if found := self._repository(repo):
            files = dict(found.files(revision))
            for line in self.body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "deletedFile":
                    files.pop(entry["value"]["path"], None)
            sha = found.commit(revision, files)
            self._send_json({"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}", "commitOid": sha})

    def make_ref(self, repo: str, kind: str, name: str) -> None:
        if found := self._repository(repo):
            asked = json.loads(self.body or b"{}")
            start = asked.get("startingPoint", "main") if kind == "branch" else name
            found.refs[name if kind == "branch" else asked["tag"]] = found.refs.get(start, start)
            self._send_json({})

    def info(self, repo: str, revision: str) -> None:
        if found := self._repository(repo):
            sha = found.resolve(revision or "main")
            if sha is None:
                return self._refuse("RevisionNotFound")
            names = [{"rfilename": path} for path in sorted(found.commits[sha])]
            self._send_json({"id": repo, "sha": sha, "private": found.is_private, "tags": [], "siblings": names})

    def tree(self, repo: str, revision: str, folder: str) -> None:
        if found := self._repository(repo):
            sha = found.resolve(revision)
            if sha is None:
                return self._refuse("RevisionNotFound")
            prefix = f"{folder.strip('/')}/" if folder else ""
            files = {path: content for path, content in found.commits[sha].items() if path.startswith(prefix)}
            if prefix and not files:
                return self._refuse("EntryNotFound", headers={"X-Repo-Commit": sha})
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
                for path, content in sorted(files.items())
            ]
            self._send_json(entries)

    def resolve(self, repo: str, revision: str, name: str) -> None:
        if found := self._repository(repo):
            if found.is_gated:
                return self._refuse("GatedRepo", 403)
            sha = found.resolve(revision)
            if sha is None:
                return self._refuse("RevisionNotFound")
            content = found.commits[sha].get(name)
            if content is None:
                return self._refuse("EntryNotFound", headers={"X-Repo-Commit": sha})
            headers = {"X-Repo-Commit": sha, "ETag": f'"{blob_id(content)}"', "Accept-Ranges": "bytes"}
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            if asked and int(asked[1]):
                headers["Content-Range"] = f"bytes {asked[1]}-{len(content) - 1}/{len(content)}"
                return self._send(content[int(asked[1]) :], 206, headers)
            self._send(content, headers=headers)


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", r"/break", _Handler.break_requests),
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", rf"/api/models/{_REPO}/(?P<kind>branch|tag)/(?P<name>[^/]+)", _Handler.make_ref),
    ("GET", rf"/api/models/{_REPO}(/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", _Handler.tree),
    ("GET", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
]
