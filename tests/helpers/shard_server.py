"""A web server on loopback for shards: with or without ranges, and with errors on request."""

from __future__ import annotations

import gzip
import re
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import unquote


class ShardServer(ThreadingHTTPServer):
    """Serves the files of a folder.

    `drop_every` closes the connection in the middle of every n-th reply with a body; `status` of a
    path answers it so; `requests` counts replies by path. `stall_every` sends half of every n-th
    reply and is silent for `stall_seconds` then. Without `tags` nothing shows that a file has
    changed; "weak" ones are not compared, and "varying" ones are of each reply. After `deny_after`
    requests all are denied. Parts begin `shift` bytes behind the place that is asked for. `packs`
    compresses replies: for clients that say they are "willing", or "always".
    """

    daemon_threads = False

    def __init__(
        self, folder: Path, *, ranges: bool = True, drop_every: int = 0, tags: bool | str = True
    ) -> None:
        """Start empty-handed; `with` serves."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.ranges = ranges
        self.drop_every = drop_every
        self.tags = tags
        self.replies = count()
        self.packs = ""
        self.shift = 0
        self.status: dict[str, int] = {}
        self.requests: Counter[str] = Counter()
        self.dropped = 0
        self.deny_after = sys.maxsize
        self.stall_every = 0
        self.stall_seconds = 1.0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))

    def __enter__(self) -> ShardServer:
        """Serve in a thread."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop and wait."""
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, *_: Any) -> None:
        """A client may go away."""


class _Handler(BaseHTTPRequestHandler):
    server: ShardServer
    timeout = 1

    def do_GET(self) -> None:
        """Send a file, a part of it, or an error."""
        name = unquote(self.path.partition("?")[0]).lstrip("/")
        file, server = self.server.folder / name, self.server
        if self.command == "GET":
            server.requests[name] += 1
        is_denied = sum(server.requests.values()) > server.deny_after
        if status := 403 if is_denied else server.status.get(name):
            self.send_error(status)
            return
        if not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        varying = next(server.replies) if server.tags in ("varying", "weak") else ""
        weak = "W/" if server.tags == "weak" else ""
        headers = {"ETag": f'{weak}"{file.stat().st_mtime_ns}{varying}"'} if server.tags else {}
        status = 200
        is_willing = server.packs and "gzip" in self.headers.get("Accept-Encoding", "")
        if (server.packs == "always" and self.command == "GET") or is_willing:
            content = gzip.compress(content)
            headers["Content-Encoding"] = "gzip"
        if wanted and server.ranges:
            begin = int(wanted[1]) + server.shift
            end = min(len(content), int(wanted[2] or len(content)) + server.shift + 1)
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
            content, status = content[begin:end], 206
        self.send_response(status)
        headers["Content-Length"] = str(len(content))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with server.lock:
            number = sum(server.requests.values())
            is_dropped = bool(server.drop_every) and number % server.drop_every == 0
            server.dropped += is_dropped
        is_stalled = bool(server.stall_every) and number % server.stall_every == 0
        self.wfile.write(content[: len(content) // 2] if is_dropped or is_stalled else content)
        if is_stalled:
            self.wfile.flush()
            time.sleep(server.stall_seconds)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Log nothing."""
