"""The server of the campaign as a process, and its connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_S = 10
# The server shares the machine.
PATIENCE_S = 2 * TIMEOUT_S + 30
FLAGS = (
    "--no-page", "--port", "0", "--device", "cpu", "--image-urls", "--timeout-s", str(TIMEOUT_S),
    "--max-request-mb", "1", "--max-image-mb", "0.5", "--max-megapixels", "1",
    "--max-queue", "3000",
)  # fmt: skip
Part = bytes | float
"""Bytes to send, or seconds to wait."""


@dataclass(frozen=True)
class Answer:
    """An answer; status 0 where the connection ended without one."""

    status: int = 0
    content: bytes = b""

    @property
    def error(self) -> str:
        """The message of an error, in the form that is promised or by the parser of HTTP."""
        if self.status == 400 and (refusal := b"Invalid HTTP request received.") in self.content:
            return refusal.decode()
        try:
            return str(json.loads(self.content)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return ""


def write_request(
    path: str, body: bytes, *, method: str = "POST", kind: str = "application/json"
) -> bytes:
    """Write a request, whose connection is kept."""
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """Read an answer, or until the connection ends before one is whole."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            if (status := int(head.split()[1])) >= 200:
                break
        if length := re.search(r"(?i)\r\ncontent-length: (\d+)", head):
            return Answer(status, await reader.readexactly(int(length[1])))
        ends = "connection: close" in head.lower()
        return Answer(status, await reader.read() if ends else b"")
    except (OSError, asyncio.IncompleteReadError):
        return Answer()


@contextlib.asynccontextmanager
async def connect(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Connect, and end with a reset, after which no port waits."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def exchange(port: int, parts: Iterable[Part]) -> Answer:
    """Send parts up to the last, or to an answer or the end of the connection.

    Raises:
        TimeoutError: The server neither answered nor ended the connection within its limits.
    """
    return await asyncio.wait_for(_exchange(port, parts), PATIENCE_S)


async def _exchange(port: int, parts: Iterable[Part]) -> Answer:
    async with connect(port) as (reader, writer):
        answer = asyncio.ensure_future(read_answer(reader))
        try:
            for part in parts:
                if isinstance(part, bytes):
                    writer.write(part)
                    await writer.drain()
                await asyncio.wait([answer], timeout=part if isinstance(part, float) else 0)
                if answer.done():
                    break
        except OSError:  # closed for more; an answer may have come before
            pass
        return await answer


class Server:
    """A running `llm2clip serve`, of `model` and `index` in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        words = ["serve", str(folder / "model"), "--index", str(folder / "index"), *FLAGS]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "modeling_llm2clip", *words],
                stdout=subprocess.PIPE, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        match = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert match, self.log.read_text()
        self.port = int(match[1])

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()

    def measure(self) -> tuple[float, int]:
        """Return MB of resident memory, and the number of open files."""
        place = Path(f"/proc/{self.process.pid}")
        pages = int((place / "statm").read_text().split()[1])
        return pages * resource.getpagesize() / 1e6, len(list((place / "fd").iterdir()))

    def wait(self, seconds: float) -> int | None:
        """Return the exit code; None where it runs on."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None
