"""Threads that prepare batches: their number, their cores, and how far ahead they work."""

from __future__ import annotations

import os
import threading
from contextlib import closing
from typing import Any

import pytest
import torch

from modeling_llm2clip.encoding.batches import (
    PreparedImages,
    default_num_workers,
    join_images,
    prepare_batches,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SOON = 30  # seconds


def test_beside_a_gpu_the_next_batches_are_prepared_meanwhile_and_no_more() -> None:
    ahead = [threading.Event() for _ in range(9)]

    def prepare(number: int) -> int:
        ahead[number].set()
        return number

    with closing(prepare_batches(range(9), prepare, device=GPU, num_workers=2)) as batches:
        for number in range(9):
            assert next(batches) == number
            for later in ahead[number : number + 4]:
                assert later.wait(SOON)
            assert not any(later.is_set() for later in ahead[number + 4 :])


def test_beside_a_gpu_threads_share_a_batch_whose_parts_come_together_in_order() -> None:
    """The first one of a shard is not prepared by one thread, while the others are not needed."""
    all_begun = threading.Barrier(8)

    def prepare(numbers: range) -> list[int]:
        if numbers[0] < 8:
            all_begun.wait(SOON)  # the parts of the first batch are in eight threads
        return list(numbers)

    def join(parts: list[tuple[int, list[int]]]) -> list[int]:
        first = parts[0][1][0]
        assert all(start == part[0] - first for start, part in parts)
        return [number for _, part in parts for number in part]

    batches = [range(8), range(8, 24), range(24, 27)]
    prepared = prepare_batches(batches, prepare, device=GPU, num_workers=8, join=join)  # type: ignore[arg-type]
    assert list(prepared) == [list(batch) for batch in batches]


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_images_of_joined_parts_are_those_of_the_batch(workers: int) -> None:
    """Also where some cannot be read, and others are left out."""

    def prepare(images: list[int]) -> PreparedImages:
        places = [place for place, number in enumerate(images) if number % 3 == 0]
        inputs = {"pixel_values": torch.tensor([[images[place]] for place in places])}
        errors = {place: f"{n}" for place, n in enumerate(images) if n % 3 == 1}
        return PreparedImages(inputs if places else {}, places, errors)

    batches = [list(range(20)), [1, 2, 4], [5, 3, 1]]
    options: dict[str, Any] = {"device": GPU, "num_workers": workers}
    joined = list(prepare_batches(batches, prepare, **options, join=join_images))
    for batch, whole in zip(joined, map(prepare, batches), strict=True):
        assert (batch.places, batch.errors) == (whole.places, whole.errors)
        assert batch.inputs.keys() == whole.inputs.keys()
        assert all(torch.equal(batch.inputs[name], whole.inputs[name]) for name in whole.inputs)


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_batches_keep_their_order(device: torch.device) -> None:
    late = threading.Event()

    def prepare(number: int) -> int:
        if number == 0:
            assert late.wait(SOON)
        if number == 1:
            late.set()
        return number

    batches = prepare_batches(range(5), prepare, device=device, num_workers=2)
    assert list(batches) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_a_thread_that_prepares_computes_on_one_core_and_the_model_on_its_own(
    device: torch.device,
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        batches = prepare_batches(
            range(4), lambda _: torch.get_num_threads(), device=device, num_workers=2
        )
        assert list(batches) == [1, 1, 1, 1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_an_error_reaches_the_caller_and_no_thread_is_left(device: torch.device) -> None:
    before = set(threading.enumerate())

    def prepare(number: int) -> int:
        if number == 2:
            raise ValueError("broken")
        return number

    batches = prepare_batches(range(8), prepare, device=device, num_workers=2)
    with pytest.raises(ValueError, match="broken"):
        list(batches)
    with closing(prepare_batches(range(8), str, device=device, num_workers=2)) as closed:
        next(closed)
    assert set(threading.enumerate()) <= before


def test_the_processes_of_a_launch_share_the_threads_that_decode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_num_workers() == 6
    for processes, expected in (("2", 3), ("4", 1), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert default_num_workers() == expected
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    assert default_num_workers() == 8
    assert default_num_workers(most=32) == 32
