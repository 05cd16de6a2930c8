"""Dynamic batching: the thread that runs the model of a service.

One thread runs the model, on batches of many requests, texts and images apart. Requests take
turns, one input at a time, so that a request of one text does not wait for one of two thousand.

Clients that wait for their answers send their next requests together, right after a batch. So the
next one waits a little for as many inputs: small batches take longer per input.
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
"""Called after each batch with its lane's name, inputs, cost and seconds."""

# Longest wait for the next batch, as a share of the time that the last one took.
_WAITED_SHARE = 0.05


@dataclass(eq=False)
class _Job:
    """The inputs of one request: those up to `taken` were put into batches."""

    inputs: Sequence[Any]
    costs: Sequence[int]
    future: Future[Rows] = field(default_factory=Future)
    rows: list[Rows] = field(default_factory=list)
    taken: int = 0


_Taken: TypeAlias = tuple[_Job, int]


@dataclass
class Lane:
    """Inputs of one modality, which share batches.

    Attributes:
        name: Name of the modality.
        encode: Embeds a batch, (B, P) float32; row i belongs to input i.
        budget: Maximum cost of a batch; a single input may cost more.
        last_count: Inputs of the last batch.
        last_wait_until: Time up to which the next batch waits for as many.
    """

    name: str
    encode: Callable[[list[Any]], Rows]
    budget: int
    last_count: int = 0
    last_wait_until: float = 0.0
    jobs: deque[_Job] = field(default_factory=deque, repr=False)

    def take_batch(self) -> list[_Taken]:
        """Take the next input of each waiting request in turn, up to the budget."""
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
        """Time up to which the next batch waits; past if it is full, or as long as the last one."""
        waiting = sum(len(job.inputs) - job.taken for job in self.jobs)
        cost = sum(sum(job.costs[job.taken :]) for job in self.jobs)
        return 0 if cost >= self.budget or waiting >= self.last_count else self.last_wait_until

    def note_batch(self, count: int, seconds: float) -> None:
        self.last_count = count
        self.last_wait_until = time.monotonic() + _WAITED_SHARE * seconds


class BatchWorker:
    """The thread that runs the model, one batch at a time, lane after lane.

    Args:
        lanes: Modalities.
        on_batch: Called after each batch.

    Attributes:
        lanes: Modalities by name.
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
        """Queue the inputs of one request, which cost so much each, such as their tokens.

        The future gets (N, P) float32. If it is cancelled, inputs that are in no batch yet are
        dropped; it fails if a batch of this request alone fails too.
        """
        job = _Job(inputs, costs)
        with self._changed:
            if self._closed:
                raise RuntimeError("The server is stopping.")
            self.lanes[name].jobs.append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Finish the queued batches, and end the thread."""
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
        """Wait for a batch of the lane whose turn it is; None once all is done and closed."""
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
        """Embed a batch; one that fails is repeated by request, so that others do not suffer."""
        try:
            embeds = lane.encode([job.inputs[row] for job, row in batch])
            if len(embeds) != len(batch):
                raise RuntimeError(f"{len(embeds)} embeddings came of {len(batch)} inputs.")
        except Exception as error:
            of_job: dict[_Job, list[_Taken]] = {}
            for taken in batch:
                of_job.setdefault(taken[0], []).append(taken)
            if len(of_job) > 1:
                for part in of_job.values():
                    self._run(lane, part)
                return
            [job] = of_job
            with self._changed:
                if job in lane.jobs:
                    lane.jobs.remove(job)
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)
            return
        for (job, _), embed in zip(batch, embeds, strict=True):
            job.rows.append(embed)
            is_done = len(job.rows) == len(job.inputs)
            if is_done and job.future.set_running_or_notify_cancel():
                job.future.set_result(np.stack(job.rows))


async def await_all_or_none(awaitables: Iterable[Awaitable[Any]]) -> list[Any]:
    """Await all; the first error cancels the others."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
