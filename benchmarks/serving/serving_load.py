"""Clients of a server: so many connections, each of which sends its next request after an answer.

Requests are written once, before the clock starts, and answers are parsed no further than needed,
since clients and server share the cores of the machine.
"""

from __future__ import annotations

import asyncio
import base64
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

_HEADER_END = b"\r\n\r\n"


@dataclass
class Load:
    """What a number of clients measured.

    Attributes:
        seconds: From the first request to the last answer.
        latencies: Seconds of each request.
        embeds: Embedding of each text, in the order of the texts.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list, repr=False)
    embeds: dict[int, Any] = field(default_factory=dict, repr=False)

    def summarize(self) -> dict[str, float]:
        """Return texts per second, and percentiles of the latency in milliseconds."""
        cuts = statistics.quantiles(self.latencies, n=100, method="inclusive")
        return {
            "texts_per_second": round(len(self.latencies) / self.seconds, 2),
            **{f"p{p}_ms": round(cuts[p - 1] * 1000, 1) for p in (50, 95, 99)},
        }


def write_request(address: str, body: Any, *, path: str = "/v1/embeddings") -> bytes:
    """Write a POST request.

    Args:
        address: URL of the server.
        body: What JSON can hold, or bytes as they are.
        path: Its path.
    """
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {urlsplit(address).netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def write_text_requests(address: str, texts: Sequence[str]) -> list[bytes]:
    """Write a request for each text, as the client of OpenAI sends it.

    Args:
        address: URL of the server.
        texts: Texts.
    """
    return [write_request(address, {"input": text, "encoding_format": "base64"}) for text in texts]


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection.

    Args:
        address: URL of the server.
    """
    parts = urlsplit(address)
    return await asyncio.open_connection(parts.hostname, parts.port, limit=2**24)


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Read status and body of an answer.

    Args:
        reader: The connection.
    """
    head = (await reader.readuntil(_HEADER_END)).lower()
    _, _, rest = head.partition(b"content-length:")
    size = int(rest.partition(b"\r\n")[0])
    return int(head.split(b" ", 2)[1]), await reader.readexactly(size)


async def send_all(
    address: str, requests: Sequence[bytes], *, num_clients: int, keep_embeds: bool = True
) -> Load:
    """Send every request once, over so many connections.

    Args:
        address: URL of the server.
        requests: Requests of one text each.
        num_clients: Connections.
        keep_embeds: Keep the embeddings; else they are not even parsed.

    Raises:
        RuntimeError: An answer is an error.
    """
    load = Load()
    turns = iter(range(len(requests)))

    async def run_client() -> None:
        reader, writer = await connect(address)
        for number in turns:
            started = time.perf_counter()
            writer.write(requests[number])
            status, body = await read_answer(reader)
            load.latencies.append(time.perf_counter() - started)
            if status != 200:
                raise RuntimeError(f"Request {number} got {status}: {body[:300]!r}")
            if keep_embeds:
                row = json.loads(body)["data"][0]["embedding"]
                load.embeds[number] = np.frombuffer(base64.b64decode(row), dtype="<f4")
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(run_client() for _ in range(num_clients)))
    load.seconds = time.perf_counter() - started
    return load
