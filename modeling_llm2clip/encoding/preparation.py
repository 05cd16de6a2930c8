"""Threads that prepare batches for a model: decode images, pad token ids.

A GPU computes while they work. A CPU does not: forward passes and decoding would want the same
cores, and a forward pass waits for the slowest of its own. There they take turns.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

Batch = TypeVar("Batch")
Prepared = TypeVar("Prepared")

_MOST_WORKERS = 8


def default_num_workers() -> int:
    """Return the number of threads or processes that decode images, where none is given.

    It is one per core, at most 8; the processes of a launch share the cores of their machine.
    """
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_WORKERS, (os.cpu_count() or 1) // num_processes))


def use_one_core() -> None:
    """Compute on one core in this thread.

    Otherwise each thread would have torch start a team of one thread per core, and with more of
    these than cores OpenMP lets them all sleep between two operations: a forward pass of a vision
    tower then takes a third longer.
    """
    torch.get_num_threads()  # sets what the next line lowers, once in a thread
    threadpool_limits(limits=1, user_api="openmp")


def prepare_batches(
    batches: Iterable[Batch],
    prepare: Callable[[Batch], Prepared],
    *,
    device: torch.device,
    num_workers: int | None,
) -> Generator[Prepared]:
    """Prepare batches in threads, a few of them ahead and no more: all would fill the memory.

    `num_workers` threads, for None `default_num_workers`, prepare one batch each, and this thread a
    batch that is alone. Close the generator to end the threads before its end.
    """
    remaining = iter(batches)
    first = list(islice(remaining, 2))
    if len(first) < 2:
        yield from map(prepare, first)
        return
    batches = chain(first, remaining)
    num_workers = default_num_workers() if num_workers is None else num_workers
    schedule = _take_turns if device.type == "cpu" else _prepare_ahead
    with ThreadPoolExecutor(num_workers, initializer=use_one_core) as pool:
        yield from schedule(pool, batches, prepare, num_workers)


def _prepare_ahead(
    pool: ThreadPoolExecutor,
    batches: Iterable[Batch],
    prepare: Callable[[Batch], Prepared],
    num_workers: int,
) -> Iterator[Prepared]:
    running: deque[Future[Prepared]] = deque()
    for batch in batches:
        running.append(pool.submit(prepare, batch))
        if len(running) > num_workers + 1:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _take_turns(
    pool: ThreadPoolExecutor,
    batches: Iterable[Batch],
    prepare: Callable[[Batch], Prepared],
    num_workers: int,
) -> Iterator[Prepared]:
    remaining = iter(batches)
    while together := list(islice(remaining, num_workers)):
        yield from list(pool.map(prepare, together))
