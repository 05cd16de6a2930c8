"""A server on the loopback address that speaks the Hugging Face Hub's HTTP API, for tests.

It keeps model repositories in memory: commits, branches and tags, large files (LFS), private
repositories behind a bearer token. Datasets, spaces, pull requests and Xet are left out.

    with HubServer() as hub:
        subprocess.run([sys.executable, "-c", code], env=hub.environment(tmp_path), check=True)

`huggingface_hub` reads its endpoint when it is imported, hence the separate process.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".onnx", ".npy", ".npz", ".parquet", ".zip")
_LICENSES = ("apache-2.0", "mit", "other")  # a few of those that the Hub knows
LFS_MINIMUM_BYTES = 10 * 2**20  # from here on the Hub wants LFS whatever the file is called


@dataclass(frozen=True)
class HubFile:
    """One version of one file."""

    content: bytes
    is_lfs: bool = False

    @cached_property
    def oid(self) -> str:
        """The Hub's id of the content: SHA-256 for LFS, else git's blob SHA-1."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """Commits are full snapshots (path to file) by SHA; branches and tags point to them."""

    name: str
    private: bool = False
    commits: dict[str, dict[str, HubFile]] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str = "main") -> str:
        """Return the SHA of a branch, a tag or a full SHA; RefusalError (404) if there is none."""
        sha = self.references.get(revision, revision)
        if sha not in self.commits:
            raise RefusalError(404, f"No revision {revision!r} in {self.name}.", "RevisionNotFound")
        return sha

    def add_commit(self, branch: str, summary: str, files: dict[str, HubFile]) -> str:
        """Put a snapshot on top of a branch; return its SHA (of parent, summary and files)."""
        parts = [self.references.get(branch, ""), self.name, summary]
        parts += [f"{path}={file.oid}" for path, file in sorted(files.items())]
        sha = hashlib.sha1("\0".join(parts).encode()).hexdigest()
        self.commits[sha] = files
        self.references[branch] = sha
        return sha


class Reply(NamedTuple):
    """A reply to the client; any content but bytes is sent as JSON."""

    body: Any = b""
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})


class RefusalError(Exception):
    """A rejected request, with the error code by which `huggingface_hub` selects its exception."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "") -> None:
        """Prepare the reply that reports this error to the client."""
        super().__init__(message)
        plain = message.encode("ascii", "backslashreplace").decode()  # headers allow no more
        headers = {"X-Error-Code": code, "X-Error-Message": plain, "X-Repo-Commit": commit}
        self.reply = Reply({"error": message}, status, {k: v for k, v in headers.items() if v})


@dataclass(frozen=True)
class Request:
    """A request that was read completely; `parts` are the named segments of its path."""

    body: bytes
    byte_range: str
    signed_in: bool
    query: dict[str, list[str]]
    parts: dict[str, str]


class HubServer(ThreadingHTTPServer):
    """The Hub; a context manager that serves on a free loopback port while it is open.

    `fail_next_uploads` so many of the coming large-file uploads are broken off in the middle;
    newer clients repeat them by themselves (five times, after 1, 2, 4, 8, 8 seconds). With an
    `upload_failure_status` they get that status instead; after a 403 the client gives up at once.
    `requests` lists "METHOD /path" of all that was asked; `objects` holds large files by SHA-256.
    """

    daemon_threads = False  # so that closing waits for pending replies

    def __init__(self, token: str = "hf_test") -> None:
        """Start empty; `token` opens private repositories and is needed for every change."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.fail_next_uploads = 0
        self.upload_failure_status: int | None = None
        self.lock = threading.Lock()
        # The default poll interval would delay every close by half a second.
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))

    def __enter__(self) -> HubServer:
        """Serve in a thread."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop and wait for every thread."""
        self.shutdown()
        self._thread.join()
        self.server_close()

    def environment(
        self, cache_dir: Path, *, signed_in: bool = True, offline: bool = False
    ) -> dict[str, str]:
        """Return the environment of a client process: a copy of this one that uses the server."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
        settings = {k: v for k, v in os.environ.items() if not k.upper().startswith(foreign)}
        for switch in ("XET", "TELEMETRY", "PROGRESS_BARS", "UPDATE_CHECK"):
            settings[f"HF_HUB_DISABLE_{switch}"] = "1"
        settings |= {"HF_ENDPOINT": self.url, "HF_HOME": str(cache_dir)}
        settings |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        settings |= {"HF_TOKEN": self.token} if signed_in else {}
        return settings | ({"HF_HUB_OFFLINE": "1"} if offline else {})

    def create_repository(self, name: str, *, private: bool = False) -> Repository:
        """Create `owner/name` with a first commit, as the Hub does."""
        repository = self.repositories[name] = Repository(name, private)
        attributes = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in LFS_SUFFIXES)
        repository.add_commit("main", "initial", {".gitattributes": HubFile(attributes.encode())})
        return repository

    def answer(
        self, method: str, target: str, body: bytes, *, credentials: str, byte_range: str
    ) -> Reply:
        """Answer one request: check the token, find the route, and convert errors to replies."""
        # Datasets have the same routes as models, under prefixes of their own.
        target = re.sub(r"^/(api/)?datasets/", lambda m: "/api/models/" if m[1] else "/", target)
        url = urlsplit(target)
        self.requests.append(f"{method} {url.path}")
        try:
            if credentials not in ("", f"Bearer {self.token}"):
                raise RefusalError(401, "Invalid credentials in Authorization header")
            for wanted, pattern, function in ROUTES:
                pattern = pattern.replace("{repo}", "(?P<repo>[^/]+/[^/]+)")
                pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", pattern)
                match = re.fullmatch(pattern, url.path)
                if match and wanted == ("GET" if method == "HEAD" else method):
                    parts = {k: unquote(v or "") for k, v in match.groupdict().items()}
                    query, signed_in = parse_qs(url.query), credentials != ""
                    return function(self, Request(body, byte_range, signed_in, query, parts))
            raise RefusalError(404, f"This test server has no route for {method} {url.path}.")
        except RefusalError as refusal:
            return refusal.reply

    def _find(self, request: Request, *, write: bool = False) -> Repository:
        """Return the request's repository if the client may see (and change) it."""
        name = request.parts["repo"]
        repository = self.repositories.get(name)
        if repository is None or (repository.private and not request.signed_in):
            # As on the Hub, a private repository looks like a missing one to others.
            status = 404 if request.signed_in else 401
            raise RefusalError(status, f"Repository {name} not found", "RepoNotFound")
        if write and not request.signed_in:
            raise RefusalError(401, f"Changing {name} needs a token.")
        return repository

    def _create(self, request: Request) -> Reply:
        wanted = json.loads(request.body)
        if not request.signed_in or wanted.get("type", "model") != "model":
            raise RefusalError(400 if request.signed_in else 401, "Want a token and type 'model'.")
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        reply = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repositories:
            return Reply({"error": f"{name} exists already", **reply}, 409)
        # Older and newer clients spell it differently.
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.create_repository(name, private=private)
        return Reply(reply)

    def _model_info(self, request: Request) -> Reply:
        repository = self._find(request)
        sha = repository.find(request.parts["revision"] or "main")
        siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
        flags = {"private": repository.private, "gated": False, "tags": []}
        return Reply({"id": repository.name, "sha": sha, "siblings": siblings, **flags})

    def _commits(self, request: Request) -> Reply:
        """List the newest commit only, because the server does not store parents."""
        repository = self._find(request)
        sha = repository.find(request.parts["revision"])
        date = "2025-01-01T00:00:00.000Z"
        return Reply([{"id": sha, "title": "", "message": "", "date": date, "authors": []}])

    def _tree(self, request: Request) -> Reply:
        repository = self._find(request)
        sha = repository.find(request.parts["revision"])
        start = f"{request.parts['folder']}/".removeprefix("/")
        everything = request.query.get("recursive", [""])[0].lower() in ("true", "1")
        entries: list[dict[str, Any]] = []
        below = [p.removeprefix(start) for p in repository.commits[sha] if p.startswith(start)]
        folders = set() if everything else {p.partition("/")[0] for p in below if "/" in p}
        for folder in sorted(folders):
            entries.append({"type": "directory", "path": f"{start}{folder}", "oid": "0" * 40})
        for path, file in sorted(repository.commits[sha].items()):
            if path.startswith(start) and (everything or "/" not in path.removeprefix(start)):
                size, oid = len(file.content), file.oid
                lfs = {"oid": oid, "size": size, "pointerSize": 134} if file.is_lfs else None
                entry = {"type": "file", "path": path, "oid": oid[:40], "size": size, "lfs": lfs}
                entries.append(entry)
        if not entries:
            raise RefusalError(404, f"No files in {start} at {sha}", "EntryNotFound", sha)
        return Reply(entries)

    def _paths_info(self, request: Request) -> Reply:
        repository = self._find(request)
        files = repository.commits[repository.find(request.parts["revision"])]
        form = parse_qs(request.body.decode())
        wanted = form["paths"] if form else json.loads(request.body)["paths"]
        entries: list[dict[str, Any]] = []
        for path in wanted:
            if path in files:
                file = files[path]
                entries.append({"type": "file", "path": path, "oid": file.oid[:40],
                                "size": len(file.content), "lfs": None})  # fmt: skip
            elif any(name.startswith(f"{path}/") for name in files):
                entries.append({"type": "directory", "path": path, "oid": "0" * 40})
        return Reply(entries)

    def _create_reference(self, request: Request) -> Reply:
        repository, wanted = self._find(request, write=True), json.loads(request.body)
        # For a tag, the URL has the revision and the body the name; for a branch, vice versa.
        name = wanted.get("tag", request.parts["name"])
        start = request.parts["name"] if "tag" in wanted else wanted.get("startingPoint", "main")
        if name in repository.references:
            raise RefusalError(409, f"Reference {name} exists already")
        repository.references[name] = repository.find(start)
        return Reply()

    def _preupload(self, request: Request) -> Reply:
        repository, answers = self._find(request, write=True), []
        present = repository.commits[repository.find(request.parts["revision"])]
        for file in json.loads(request.body)["files"]:
            path, size = file["path"], file["size"]
            large = path.endswith(LFS_SUFFIXES) or size >= LFS_MINIMUM_BYTES
            answer = {"path": path, "uploadMode": "lfs" if large else "regular"}
            oid = present[path].oid if path in present else None
            answers.append({**answer, "shouldIgnore": False, "oid": oid})
        return Reply({"files": answers})

    def _lfs_batch(self, request: Request) -> Reply:
        self._find(request, write=True)
        answers = []
        for wanted in json.loads(request.body)["objects"]:
            upload = {"upload": {"href": f"{self.url}/lfs-objects/{wanted['oid']}"}}
            missing = {} if wanted["oid"] in self.objects else {"actions": upload}
            answers.append({"oid": wanted["oid"], "size": wanted["size"], **missing})
        return Reply({"transfer": "basic", "objects": answers})

    def _store_object(self, request: Request) -> Reply:
        # The client sends no token here, because on the Hub the URL itself grants permission.
        oid = request.parts["oid"]
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise RefusalError(400, f"The content of object {oid} has another SHA-256.")
        self.objects[oid] = request.body
        return Reply()

    def _commit(self, request: Request) -> Reply:
        repository, branch = self._find(request, write=True), request.parts["branch"]
        if branch not in repository.references or "create_pr" in request.query:
            raise RefusalError(400, f"Commits go on a branch that exists, not on {branch}.")
        head = repository.find(branch)
        header, *steps = [json.loads(line) for line in request.body.splitlines()]
        if header["value"].get("parentCommit") not in (None, head):
            raise RefusalError(412, f"{branch} has moved on to {head}.")
        files = dict(repository.commits[head])
        for step in steps:
            self._apply(step["key"], step["value"], files)
        sha = repository.add_commit(branch, header["value"]["summary"], files)
        url = f"{self.url}/{repository.name}/commit/{sha}"
        return Reply({"success": True, "commitOid": sha, "commitUrl": url})

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, HubFile]) -> None:
        """Apply one operation of a commit to `files`."""
        path = value["path"]
        if key == "file":
            files[path] = HubFile(base64.b64decode(value["content"]))
        elif key == "lfsFile" and value["oid"] in self.objects:
            files[path] = HubFile(self.objects[value["oid"]], is_lfs=True)
        elif key == "deletedFile" and path in files:
            del files[path]
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
                del files[name]
        else:
            raise RefusalError(400, f"Cannot do {key} for {path}: unknown step or missing content.")

    def _validate_card(self, request: Request) -> Reply:
        _, metadata, _ = json.loads(request.body)["content"].split("---\n", 2)
        license = yaml.safe_load(metadata).get("license")
        if license in (None, *_LICENSES):
            return Reply({"errors": [], "warnings": []})
        error = {"message": f'"license" must be one of {list(_LICENSES)}'}
        return Reply({"errors": [error], "warnings": []}, 400)

    def _resolve(self, request: Request) -> Reply:
        repository, path = self._find(request), request.parts["path"]
        sha = repository.find(request.parts["revision"])
        file = repository.commits[sha].get(path)
        if file is None:
            raise RefusalError(404, f"No file {path} at {sha}", "EntryNotFound", sha)
        size, etag = len(file.content), f'"{file.oid}"'
        headers = {"X-Repo-Commit": sha, "ETag": etag, "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(size)}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.byte_range)
        if wanted is None:
            return Reply(file.content, 200, headers)
        begin, end = int(wanted[1]), min(size, int(wanted[2] or size) + 1)
        if begin >= end:
            return Reply(b"", 416, {**headers, "Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        return Reply(file.content[begin:end], 206, headers)


# Method, path and handler; `{name}` matches one segment of the path, `{repo}` two.
ROUTES: list[tuple[str, str, Callable[[HubServer, Request], Reply]]] = [
    ("POST", "/api/repos/create", HubServer._create),
    ("GET", "/api/models/{repo}(?:/revision/{revision})?", HubServer._model_info),
    ("GET", "/api/models/{repo}/commits/{revision}", HubServer._commits),
    ("GET", "/api/models/{repo}/tree/{revision}(?:/(?P<folder>.+))?", HubServer._tree),
    ("POST", "/api/models/{repo}/paths-info/{revision}", HubServer._paths_info),
    ("POST", "/api/models/{repo}/(?:branch|tag)/{name}", HubServer._create_reference),
    ("POST", "/api/models/{repo}/preupload/{revision}", HubServer._preupload),
    ("POST", r"/{repo}\.git/info/lfs/objects/batch", HubServer._lfs_batch),
    ("PUT", "/lfs-objects/{oid}", HubServer._store_object),
    ("POST", "/api/models/{repo}/commit/{branch}", HubServer._commit),
    ("GET", "/{repo}/resolve/{revision}/(?P<path>.+)", HubServer._resolve),
    ("POST", "/api/validate-yaml", HubServer._validate_card),
]


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, asks the hub, writes the reply, closes the connection (HTTP/1.0)."""

    server: HubServer
    timeout = 10  # seconds; a stalled client must not block the closing of the server

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.command == "PUT" and self._fail_upload(length):
            return
        body = self.rfile.read(length)
        if len(body) < length:
            return  # the client disconnected
        credentials = self.headers.get("Authorization") or ""
        byte_range = self.headers.get("Range") or ""
        with self.server.lock:
            reply = self.server.answer(
                self.command, self.path, body, credentials=credentials, byte_range=byte_range
            )
        self._send(reply)

    def _fail_upload(self, length: int) -> bool:
        """Read half of the file and close the connection, if the test requested a failure."""
        with self.server.lock:
            failing = self.server.fail_next_uploads > 0
            self.server.fail_next_uploads -= failing
        status = self.server.upload_failure_status
        if failing and status is not None:
            self.rfile.read(length)
            self._send(RefusalError(status, "This upload was made to fail.").reply)
        elif failing:
            self.rfile.read(length // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
        return failing

    def _send(self, reply: Reply) -> None:
        is_bytes = isinstance(reply.body, bytes)
        body: bytes = reply.body if is_bytes else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        self.send_header("Content-Type", "application/" + ("octet-stream" if is_bytes else "json"))
        self.send_header("Content-Length", str(len(body)))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815 (names set by the base class)

    def log_message(self, *_: object) -> None:
        """Log nothing, because `HubServer.requests` is the log."""
