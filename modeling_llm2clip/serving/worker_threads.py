"""Threads that prepare inputs, and that nothing waits for at the end of a process.

Python joins the threads of a `ThreadPoolExecutor` before it exits, however long what they do takes:
one image that is slow to decode would keep a server from stopping. These are daemon threads, so
that closing gives up what is still running after a moment.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

from ..encoding.batches import use_one_core

T = TypeVar("T")


class WorkerThreads:
    """Threads that call functions, in the order in which they came.

    Args:
        num_threads: How many.
        name: Name of the threads.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._waiting: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._waiting = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Queue a function; once it runs, its future cannot be cancelled."""
        future: Future[T] = Future()
        with self._lock:
            if self._is_closed:
                raise RuntimeError("The server is stopping.")
            self._waiting.put((future, function))
        return future

    def close(self, *, wait_s: float) -> None:
        """Cancel what waits, and give running functions `wait_s` to finish; may be called again."""
        with self._lock:
            self._is_closed = True
            while not self._waiting.empty():
                if (job := self._waiting.get()) is not None:
                    job[0].cancel()
            for _ in self._threads:
                self._waiting.put(None)
        deadline = time.monotonic() + wait_s
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))

    def _work(self) -> None:
        use_one_core()
        while (job := self._waiting.get()) is not None:
            _call(*job)
            del job  # while the thread waits, it holds no image


def _call(future: Future[Any], function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


async def await_all_or_none(awaitables: Iterable[Awaitable[Any]]) -> list[Any]:
    """Await all; the first error cancels the others, whose results nobody wants."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
