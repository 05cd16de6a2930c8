"""Dynamic batching: the thread that runs a service's model.

One thread runs the model on batches that combine inputs from many requests, with texts and images
in separate batches. Requests take turns, one input at a time, so a request with one text does not
wait for a request with two thousand.

Clients that wait for a response all send their next request right after a batch finishes. The next
batch therefore waits briefly for as many inputs as the last batch had, because small batches take
longer per input.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Rows: TypeAlias = "NDArray[np.float32]"
OnBatch: TypeAlias = Callable[[str, int, int, float], object]
"""Called after each batch with the lane's name, number of inputs, total cost and seconds."""

# Longest wait for the next batch to fill up, as a share of the last batch's duration.
_WAITED_SHARE = 0.05


@dataclass(eq=False)
class _Job:
    """The inputs of one request; the first `taken` are already in a batch."""

    inputs: Sequence[Any]
    costs: Sequence[int]
    future: Future[Rows] = field(default_factory=Future)
    rows: list[Rows] = field(default_factory=list)
    taken: int = 0


_Taken: TypeAlias = tuple[_Job, int]


@dataclass
class Lane:
    """A queue of inputs of one modality that can be batched together.

    Attributes:
        name: Name of the modality.
        encode: Function that embeds a batch as (B, P) float32; row i belongs to input i.
        budget: Maximum cost of a batch; only a single input may exceed it.
        last_count: Number of inputs in the last batch.
        last_wait_until: Deadline until which the next batch waits to reach `last_count` inputs.
    """

    name: str
    encode: Callable[[list[Any]], Rows]
    budget: int
    last_count: int = 0
    last_wait_until: float = 0.0
    jobs: deque[_Job] = field(default_factory=deque, repr=False)

    def take_batch(self) -> list[_Taken]:
        """Take one input from each waiting request in turn until the budget is used up."""
        batch: list[_Taken] = []
        cost = 0
        while self.jobs:
            job = self.jobs[0]
            if job.future.cancelled():
                self.jobs.popleft()
                continue
            cost += job.costs[job.taken]
            if batch and cost > self.budget:
                break
            self.jobs.popleft()
            batch.append((job, job.taken))
            job.taken += 1
            if job.taken < len(job.inputs):
                self.jobs.append(job)
        return batch

    def find_wait(self) -> float:
        """Return the deadline for filling the next batch.

        The deadline has already passed if the batch is full or has as many inputs as the last
        batch.
        """
        waiting = sum(len(job.inputs) - job.taken for job in self.jobs)
        cost = sum(sum(job.costs[job.taken :]) for job in self.jobs)
        return 0 if cost >= self.budget or waiting >= self.last_count else self.last_wait_until

    def note_batch(self, count: int, seconds: float) -> None:
        self.last_count = count
        self.last_wait_until = time.monotonic() + _WAITED_SHARE * seconds


class BatchWorker:
    """Runs the model in a thread of its own, one batch at a time, alternating between lanes.

    Args:
        lanes: The queues to serve.
        on_batch: Called after each batch.

    Attributes:
        lanes: Lanes by name.
    """

    def __init__(self, lanes: Sequence[Lane], *, on_batch: OnBatch | None = None) -> None:
        self.lanes = {lane.name: lane for lane in lanes}
        self._turns = deque(lanes)
        self._on_batch = on_batch
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="llm2clip-model", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, name: str, inputs: Sequence[Any], costs: Sequence[int]) -> Future[Rows]:
        """Queue one request's inputs; `costs` has each input's cost, such as its number of tokens.

        The returned future resolves to the embeddings, (N, P) float32. If the future is cancelled,
        inputs not yet in a batch are dropped. The future fails only if a batch with only this
        request's inputs fails.
        """
        job = _Job(inputs, costs)
        with self._changed:
            if self._closed:
                raise RuntimeError("The server is stopping.")
            self.lanes[name].jobs.append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Finish the queued batches and stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while (turn := self._next_batch()) is not None:
            lane, batch = turn
            started = time.monotonic()
            self._run(lane, batch)
            seconds = time.monotonic() - started
            lane.note_batch(len(batch), seconds)
            if self._on_batch is not None:
                cost = sum(job.costs[row] for job, row in batch)
                self._on_batch(lane.name, len(batch), cost, seconds)

    def _next_batch(self) -> tuple[Lane, list[_Taken]] | None:
        """Wait for the next batch, taking lanes in turn; None if closed and all lanes are empty."""
        with self._changed:
            while True:
                for _ in range(len(self._turns)):
                    lane = self._turns[0]
                    self._turns.rotate(-1)
                    self._await_more(lane)
                    if batch := lane.take_batch():
                        return lane, batch
                if self._closed:
                    return None
                self._changed.wait()

    def _await_more(self, lane: Lane) -> None:
        while lane.jobs and not self._closed:
            left = lane.find_wait() - time.monotonic()
            if left <= 0 or any(other.jobs for other in self._turns if other is not lane):
                break
            self._changed.wait(left)

    def _run(self, lane: Lane, batch: list[_Taken]) -> None:
        """Embed a batch; on an error, retry each request alone, so only bad requests fail."""
        try:
            embeds = lane.encode([job.inputs[row] for job, row in batch])
            if len(embeds) != len(batch):
                raise RuntimeError(f"Got {len(embeds)} embeddings for a batch of {len(batch)}.")
        except Exception as error:
            parts: dict[_Job, list[_Taken]] = {}
            for taken in batch:
                parts.setdefault(taken[0], []).append(taken)
            if len(parts) > 1:
                for part in parts.values():
                    self._run(lane, part)
                return
            [job] = parts
            with self._changed:
                if job in lane.jobs:
                    lane.jobs.remove(job)
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)
            return
        for (job, _), embed in zip(batch, embeds, strict=True):
            job.rows.append(embed)
            if len(job.rows) == len(job.inputs) and job.future.set_running_or_notify_cancel():
                job.future.set_result(np.stack(job.rows))


async def await_all_or_none(awaitables: Iterable[Awaitable[Any]]) -> list[Any]:
    """Await all awaitables; the first error cancels the rest."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
