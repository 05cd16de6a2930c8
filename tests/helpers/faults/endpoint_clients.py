"""The clients of one server: right ones, and wrong, endless, slow and very many ones."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import resource
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from faults.counts import Counts
from faults.endpoint_process import (
    PATIENCE_S,
    TIMEOUT_S,
    Answer,
    Part,
    Server,
    connect,
    exchange,
    read_answer,
    write_request,
)
from faults.endpoint_requests import (
    CONTENT_TYPES,
    JUNK,
    PATHS,
    RAW,
    URLS,
    Oracle,
    draw_request,
    mutate,
)

ENDLESS_MB = 32
REFUSED = (429, 503, 504)  # of a right request, by a busy server
NUM_LONG, LONG_TEXTS = 12, 150


@dataclass
class Campaign:
    """Clients of one server, and what became of their requests."""

    server: Server
    oracle: Oracle
    counts: Counts
    seed: int
    most_connections: int
    num_right: int = 0
    is_stopping: bool = False

    async def run(self, seconds: float, phase: str) -> None:
        """Let all clients ask for so many seconds, or until the server is to stop."""
        until = time.monotonic() + seconds
        clients: list[tuple[Callable[[Random, str], Awaitable[None]], int]] = [
            (self.ask_rightly, 4), (self.ask_wrongly, 5), (self.drip, 30), (self.stop_halfway, 3),
            (self.send_endlessly, 2), (self.hold_connections, 1),
        ]  # fmt: skip
        repeated = [
            self._repeat(ask, f"seed {self.seed}, {phase}, {ask.__name__} {n}", until)
            for ask, count in clients
            for n in range(count)
        ]
        trap = await asyncio.start_server(self._spring, "127.0.0.1", 0)
        self.trap_port = trap.sockets[0].getsockname()[1]
        async with trap:
            await asyncio.gather(*repeated)

    async def _repeat(
        self, ask: Callable[[Random, str], Awaitable[None]], name: str, until: float
    ) -> None:
        for number in itertools.count():
            if time.monotonic() >= until or self.is_stopping:
                return
            case = f"{name}, case {number}"
            try:
                await asyncio.wait_for(ask(Random(case), case), 5 * PATIENCE_S)
            except (TimeoutError, asyncio.TimeoutError):
                self.add("hung", case)
            except OSError as error:
                self.add("lost", case, f"no connection: {error!r}")

    def add(self, outcome: Any, case: str, details: str = "") -> None:
        """Count a case; a server that stops may close the connections of this campaign."""
        self.counts.add("harmless" if self.is_stopping else outcome, case, details)

    async def _spring(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.add("silently_wrong", "a URL of loopback", "the server fetched it")
        writer.close()

    async def ask_rightly(self, random: Random, case: str) -> None:
        """Ask over one connection once or several times, and sometimes all at once."""
        requests = [draw_request(random) for _ in range(random.choice((1, 1, 4)))]
        written = [write_request(path, json.dumps(body).encode()) for path, body in requests]
        is_at_once = random.random() < 0.3
        async with connect(self.server.port) as (reader, writer):
            for number, (path, body) in enumerate(requests):
                if not is_at_once or number == 0:
                    writer.write(b"".join(written) if is_at_once else written[number])
                answer = await asyncio.wait_for(read_answer(reader), PATIENCE_S)
                self.judge_right(f"{case}.{number}", path, body, answer)
                if answer.status != 200:
                    return

    def judge_right(self, case: str, path: str, body: Any, answer: Answer) -> None:
        """Judge the answer to a request that must be answered, or refused by a busy server."""
        if answer.status == 200:
            self.num_right += 1
            problem = self.oracle.find_problem(path, json.dumps(body).encode(), answer.content)
            self.add("silently_wrong" if problem else "harmless", case, f"{path} {body}: {problem}")
        elif answer.status in REFUSED and answer.error:
            self.add("refused_by_name", case)
        else:
            self.add("unnamed" if answer.status else "lost", case, f"{path} {body}: {answer}")

    async def ask_wrongly(self, random: Random, case: str) -> None:
        """Ask what is wrong or odd by itself, in one whole request."""
        path, body = draw_request(random)
        content, kind, method = json.dumps(body).encode(), "application/json", "POST"
        change = random.random()
        if change < 0.6:
            content = mutate(random, body)
        elif change < 0.7:
            content = random.choice(RAW)
        elif change < 0.75:
            kind = random.choice(CONTENT_TYPES)
        elif change < 0.8:
            path = random.choice((*PATHS, "/v1/models", "/health", "/v1/", "/%ff%00", "/" * 5000))
            method = random.choice(("GET", "PUT", "DELETE", "OPTIONS", "PATCH", "POST"))
        elif change < 0.9:
            port = random.choice((self.trap_port, self.server.port))
            url = random.choice(URLS).format(port=port)
            content = json.dumps({"images": [url]}).encode()
        else:
            junk = random.choice(JUNK)
            self.judge_wrong(case, junk, await exchange(self.server.port, [junk]))
            return
        request = write_request(path, content, kind=kind, method=method)
        answer = await exchange(self.server.port, [request])
        if answer.status == 200 and method == "POST" and path in PATHS:
            problem = self.oracle.find_problem(path, content, answer.content)
            details = f"{path} {content[:3000]!r}: {problem}"
            self.add("silently_wrong" if problem else "harmless", case, details)
        elif not answer.status and len(content) < 1e6:
            self.add("unnamed", case, f"no answer to {request[:2000]!r}")
        else:
            self.judge_wrong(case, request, answer)

    def judge_wrong(self, case: str, request: bytes, answer: Answer) -> None:
        """Judge an answer other than numbers: a refusal, a page, or the end of a connection."""
        if answer.error and (answer.status < 500 or answer.status in REFUSED):
            self.add("refused_by_name", case)
        elif answer.status < 400 or answer.status == 403:  # 403 refuses web sockets
            self.add("harmless", case)
        else:
            self.add("unnamed", case, f"{answer}: {request[:2000]!r}")

    async def drip(self, random: Random, case: str) -> None:
        """Send a body byte by byte, without end."""
        whole = write_request("/v1/embeddings", b" " * 900_000)
        start = len(whole) - 900_000 + random.randrange(10)
        pause_s = random.choice((0.05, 0.3, 1.0, 4.0))

        def drip() -> Iterator[Part]:
            yield whole[:start]
            for place in itertools.count(start):
                yield pause_s
                yield whole[place : place + 1]

        self.judge_wrong(case, whole[:start], await exchange(self.server.port, drip()))

    async def stop_halfway(self, random: Random, case: str) -> None:
        """Leave before a request is whole, before its answer or before the answer's end."""
        path, body = draw_request(random)
        request = write_request(path, json.dumps(body).encode())
        async with connect(self.server.port) as (reader, writer):
            writer.write(request[: random.choice((0, 1, 20, 120, len(request) - 1, len(request)))])
            if random.random() < 0.2:
                writer.write_eof()
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(reader.read(1), random.random())
        self.add("harmless", case)

    async def send_endlessly(self, random: Random, case: str) -> None:
        """Send much more than any limit, as fast as it is read."""
        host, piece = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n", b"a" * 2**16
        start, part = random.choice(
            (
                (host + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + piece + b"\r\n"),
                (host + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n" * 1000),
                (host + b"Transfer-Encoding: chunked\r\n\r\n1;", piece),
                (host + b"Content-Length: 900000000000\r\n\r\n", piece),
                (host + b"X-Header: ", piece),
                (host, b"X-Header: a\r\n" * 5000),
                (b"GET /", piece),
                (b"\r\n", b"\r\n" * 2**15),
            )
        )
        num_sent = 0

        def send() -> Iterator[Part]:
            nonlocal num_sent
            yield start
            for _ in range(ENDLESS_MB * 10**6 // len(part)):
                yield part
                num_sent += len(part)

        answer = await exchange(self.server.port, send())
        if num_sent > ENDLESS_MB * 0.9e6:
            self.add("unnamed", case, f"{num_sent:,} bytes were read: {start + part[:50]!r}")
        else:
            self.judge_wrong(case, start + part[:50], answer)

    async def hold_connections(self, _: Random, case: str) -> None:
        """Open very many connections, and wait until the server ends them."""
        start = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"
        most = int(resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 0.6)
        waiting = []
        for number in range(min(most, self.most_connections)):
            waiting.append(asyncio.ensure_future(exchange(self.server.port, [start])))
            if number % 100 == 0:
                await asyncio.sleep(0.02)
        for answer in await asyncio.gather(*waiting, return_exceptions=True):
            if isinstance(answer, Answer):
                self.judge_wrong(case, b"one of many connections", answer)
            else:
                self.add("hung", case, f"one of many connections: {answer!r}")

    async def stop(self) -> None:
        """End the server by SIGTERM while long requests are in work."""
        texts = [f"the sea at night {n} " * 8 for n in range(LONG_TEXTS)]
        path, body = PATHS[0], {"input": texts}
        request = write_request(path, json.dumps(body).encode())
        port = self.server.port
        tasks = [asyncio.ensure_future(exchange(port, [request])) for _ in range(NUM_LONG)]
        await asyncio.sleep(0.5)
        await exchange(port, [write_request("/health", b"", method="GET")])  # all before are read
        self.is_stopping = True
        self.server.process.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*tasks)
        ended = await asyncio.to_thread(self.server.wait, TIMEOUT_S + PATIENCE_S)
        self.is_stopping = False  # from here on nothing is excused
        for number, answer in enumerate(answers):
            self.judge_right(f"seed {self.seed}, SIGTERM, request {number}", path, body, answer)
        if ended != -signal.SIGTERM:
            self.add(
                "hung" if ended is None else "unnamed", f"seed {self.seed}, SIGTERM: code {ended}"
            )
