"""
A small server that speaks the Hub's API, for the real `huggingface_hub` client: repositories, commits, branches, files
in git and in LFS. It holds everything in memory, and listens on loopback.

Writing needs a token, as on the Hub. Files that are large there (`*.safetensors`) take the way of LFS: uploaded apart,
checked against their hash, and downloaded by a redirect to another host.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import unquote

TOKEN = "hf_test"
USER = "someone"
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"


class File(NamedTuple):
    """A file of a commit."""

    content: bytes
    is_lfs: bool

    @property
    def etag(self) -> str:
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


class HubServer(ThreadingHTTPServer):
    """
    The repositories, by `user/name`: their branches, which are names of commits, and the files of each commit.

    `requests` are the methods and paths asked for.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.branches: dict[str, dict[str, str]] = {}
        self.commits: dict[str, dict[str, File]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repo: str, branch: str, files: dict[str, File]) -> str:
        """Add or replace files on a branch; returns the commit."""
        parent = self.branches[repo].get(branch, "")
        files = {**self.commits.get(parent, {}), **files}
        description = [parent, *(f"{name}{file.etag}" for name, file in sorted(files.items()))]
        sha = hashlib.sha1(" ".join([repo, *description]).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[repo][branch] = sha
        return sha

    def find(self, repo: str, revision: str) -> str | None:
        """The commit that a branch, or a commit's own name, means."""
        sha = self.branches[repo].get(revision, revision)
        return sha if sha in self.commits else None


@contextmanager
def serve_hub() -> Iterator[HubServer]:
    """A server that answers until the end of the context."""
    server = HubServer()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """Answers a request by the method that `ROUTES` has for its path."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        path = unquote(self.path.split("?")[0])
        body = self._read_body()
        is_read = self.command in ("GET", "HEAD")
        if not is_read and "/lfs/" not in path and self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
            return
        for methods, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if self.command in methods and match:
                groups = {name: value for name, value in match.groupdict().items() if value is not None}
                if "repo" in groups and groups["repo"] not in self.server.branches:
                    self._refuse("RepoNotFound")
                else:
                    answer(self, body, **groups)
                return
        self._refuse("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815 (the names of http.server)

    def log_message(self, *args) -> None:
        pass

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, code: str) -> None:
        self._answer(404, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def who_am_i(self, body: bytes) -> None:
        self._answer(200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_card(self, body: bytes) -> None:
        has_header = json.loads(body)["content"].startswith("---\n")
        self._answer(200, {"errors": [], "warnings": [] if has_header else [{"message": "empty metadata"}]})

    def create_repo(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        exists = repo in self.server.branches
        if not exists:
            self.server.branches[repo] = {}
            self.server.commit(repo, "main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
        self._answer(409 if exists else 200, {"url": f"{self.server.endpoint}/{repo}"})

    def create_branch(self, body: bytes, repo: str, revision: str) -> None:
        exists = revision in self.server.branches[repo]
        if not exists:
            start = (json.loads(body) if body else {}).get("startingPoint", "main")
            self.server.branches[repo][revision] = self.server.find(repo, start)
        self._answer(409 if exists else 200, {})

    def upload_modes(self, body: bytes, repo: str, revision: str) -> None:
        files = [
            {
                "path": file["path"],
                "shouldIgnore": False,
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        objects = json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.server.objects:
                entry["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs/{entry['oid']}"}}
        self._answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer(422, {"error": "the content has another hash"})
            return
        self.server.objects[oid] = body
        self._answer(200)

    def lfs_download(self, body: bytes, oid: str) -> None:
        self._answer(200, self.server.objects[oid], ETag=f'"{oid}"')

    def make_commit(self, body: bytes, repo: str, revision: str) -> None:
        files = {}
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                files[value["path"]] = File(self.server.objects[value["oid"]], True)
        sha = self.server.commit(repo, revision, files)
        url = f"{self.server.endpoint}/{repo}/commit/{sha}"
        self._answer(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def model_info(self, body: bytes, repo: str, revision: str = "main") -> None:
        sha = self.server.find(repo, revision)
        if sha is None:
            self._refuse("RevisionNotFound")
            return
        siblings = [{"rfilename": name} for name in self.server.commits[sha]]
        self._answer(200, {"_id": sha, "id": repo, "modelId": repo, "sha": sha, "siblings": siblings, "tags": []})

    def tree(self, body: bytes, repo: str, revision: str, folder: str = "") -> None:
        sha = self.server.find(repo, revision)
        if sha is None:
            self._refuse("RevisionNotFound")
            return
        files = self.server.commits[sha].items()
        entries = [
            {"type": "file", "path": name, "size": len(file.content), "oid": file.etag}
            for name, file in files
            if name.startswith(folder.lstrip("/"))
        ]
        self._answer(200, entries) if entries else self._refuse("EntryNotFound")

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        sha = self.server.find(repo, revision)
        if sha is None:
            self._refuse("RevisionNotFound")
            return
        file = self.server.commits[sha].get(path)
        if file is None:
            self._answer(404, X_Error_Code="EntryNotFound", X_Error_Message="EntryNotFound", X_Repo_Commit=sha)
        elif file.is_lfs:
            location = f"http://localhost:{self.server.server_port}/lfs/{file.etag}"
            linked = {"X_Linked_ETag": f'"{file.etag}"', "X_Linked_Size": str(len(file.content))}
            self._answer(302, X_Repo_Commit=sha, Location=location, **linked)
        else:
            self._answer(200, file.content, X_Repo_Commit=sha, ETag=f'"{file.etag}"')


ROUTES = [
    (("GET",), "/api/whoami-v2", Handler.who_am_i),
    (("POST",), "/api/validate-yaml", Handler.validate_card),
    (("POST",), "/api/repos/create", Handler.create_repo),
    (("POST",), f"/api/models/{REPO}/branch/{REVISION}", Handler.create_branch),
    (("POST",), f"/api/models/{REPO}/preupload/{REVISION}", Handler.upload_modes),
    (("POST",), f"/api/models/{REPO}/commit/{REVISION}", Handler.make_commit),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_upload),
    (("GET",), "/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_download),
    (("GET", "HEAD"), f"/api/models/{REPO}", Handler.model_info),
    (("GET", "HEAD"), f"/api/models/{REPO}/revision/{REVISION}", Handler.model_info),
    (("GET",), rf"/api/models/{REPO}/tree/{REVISION}(?P<folder>/.*)?", Handler.tree),
    (("GET", "HEAD"), f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]
