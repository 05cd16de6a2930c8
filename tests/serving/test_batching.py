"""Batches over requests: budget, turns, failures apart, nothing lost at the end."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import pytest

from modeling_llm2clip.serving.batching import BatchWorker, Lane


class Recorder:
    """Embeds a number as itself, and notes the batches; `hold` stops it before the next one."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.begun = threading.Event()
        self.go.set()

    def encode(self, inputs: list[Any]) -> Any:
        self.batches.append(list(inputs))
        self.begun.set()
        assert self.go.wait(10)
        if any(number < 0 for number in inputs):
            raise ValueError("negative")
        return np.array([[number] for number in inputs], dtype=np.float32)

    def hold(self) -> None:
        self.go.clear()
        self.begun.clear()


def open_worker(budget: int = 4, **options: Any) -> tuple[BatchWorker, Recorder]:
    recorder = Recorder()
    return BatchWorker([Lane("text", recorder.encode, budget)], **options), recorder


def submit(worker: BatchWorker, *numbers: int, costs: list[int] | None = None) -> Future[Any]:
    return worker.submit("text", list(numbers), costs or [1] * len(numbers))


def hold_first(worker: BatchWorker, recorder: Recorder) -> Future[Any]:
    """Occupy the worker with a batch of its own, so that what follows has to wait."""
    recorder.hold()
    first = submit(worker, 0)
    assert recorder.begun.wait(10)
    return first


def test_requests_that_wait_share_a_batch_and_each_gets_its_own_rows() -> None:
    worker, recorder = open_worker()
    hold_first(worker, recorder)
    futures = [submit(worker, 1, 2), submit(worker, 3), submit(worker, 4)]
    recorder.go.set()
    assert [f.result(10)[:, 0].tolist() for f in futures] == [[1, 2], [3], [4]]
    assert recorder.batches == [[0], [1, 3, 4, 2]]
    worker.close()


def test_a_batch_has_no_more_than_its_budget_but_for_one_large_input() -> None:
    worker, recorder = open_worker(budget=4)
    hold_first(worker, recorder)
    futures = [submit(worker, n, costs=[cost]) for n, cost in ((1, 3), (2, 2), (3, 9), (4, 4))]
    recorder.go.set()
    wait(futures, 10)
    assert recorder.batches[1:] == [[1], [2], [3], [4]]
    worker.close()


def test_a_small_request_does_not_wait_for_a_large_one() -> None:
    worker, recorder = open_worker(budget=2)
    hold_first(worker, recorder)
    large, small = submit(worker, *range(10, 30)), submit(worker, 1)
    recorder.go.set()
    wait([large, small], 10)
    assert 1 in recorder.batches[1]
    assert large.result()[:, 0].tolist() == list(range(10, 30))
    worker.close()


def test_a_request_that_fails_does_not_take_others_with_it() -> None:
    worker, recorder = open_worker(budget=8)
    hold_first(worker, recorder)
    good, bad, other = submit(worker, 1, 2), submit(worker, 3, -1), submit(worker, 4)
    recorder.go.set()
    assert good.result(10)[:, 0].tolist() == [1, 2]
    assert other.result(10)[:, 0].tolist() == [4]
    with pytest.raises(ValueError, match="negative"):
        bad.result(10)
    assert submit(worker, 5).result(10)[:, 0].tolist() == [5]
    worker.close()


def test_nothing_more_of_a_failed_or_cancelled_request_is_computed() -> None:
    worker, recorder = open_worker(budget=1)
    hold_first(worker, recorder)
    left, fails, stays = submit(worker, 1, 2), submit(worker, -1, 3), submit(worker, 4)
    assert left.cancel()
    recorder.go.set()
    assert stays.result(10)[:, 0].tolist() == [4]
    with pytest.raises(ValueError, match="negative"):
        fails.result(10)
    worker.close()
    assert recorder.batches == [[0], [-1], [4]]


def test_a_model_that_returns_too_few_rows_is_an_error() -> None:
    worker = BatchWorker([Lane("text", lambda _: np.ones((1, 1), np.float32), 4)])
    with pytest.raises(RuntimeError, match="Got 1 embeddings for a batch of 2"):
        submit(worker, 1, 2).result(10)
    worker.close()


def test_closing_finishes_what_waits_and_takes_no_more() -> None:
    worker, recorder = open_worker()
    hold_first(worker, recorder)
    futures = [submit(worker, number) for number in range(1, 20)]
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(worker.close)
        recorder.go.set()
        closing.result(10)
    assert [f.result(0)[0, 0] for f in futures] == list(range(1, 20))
    assert not worker.is_alive
    with pytest.raises(RuntimeError, match="stopping"):
        submit(worker, 1)


def test_lanes_take_turns_and_never_share_a_batch() -> None:
    seen: list[tuple[str, list[int]]] = []
    recorder = Recorder()

    def encode_as(name: str) -> Any:
        def encode(inputs: list[Any]) -> Any:
            seen.append((name, list(inputs)))
            return recorder.encode(inputs)

        return encode

    worker = BatchWorker([Lane(name, encode_as(name), 2) for name in ("text", "image")])
    hold_first(worker, recorder)
    futures = [worker.submit("text", [1, 2, 3, 4], [1] * 4), worker.submit("image", [5, 6], [1, 1])]
    recorder.go.set()
    wait(futures, 10)
    worker.close()
    assert seen[1:] == [("image", [5, 6]), ("text", [1, 2]), ("text", [3, 4])]


def test_after_a_batch_the_next_one_waits_for_as_many_inputs() -> None:
    worker, recorder = open_worker(budget=100)
    lane = worker.lanes["text"]
    lane.note_batch(4, 1000.0)  # of which a twentieth is long enough for any machine
    futures = [submit(worker, number) for number in range(1, 5)]
    wait(futures, 10)  # the fourth ends the wait
    worker.close()
    assert recorder.batches == [[1, 2, 3, 4]]


def test_a_request_after_a_pause_does_not_wait_for_company() -> None:
    worker, recorder = open_worker(budget=100)
    wait([submit(worker, *range(50))], 10)
    lane = worker.lanes["text"]
    lane.last_wait_until = time.monotonic() - 1  # the pause
    submit(worker, 1).result(5)
    assert recorder.batches[-1] == [1]
    worker.close()
