"""Copies from a GPU, for which no batch waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from running_ahead import run_ahead

from modeling_llm2clip.encoding.batches import start_copy
from modeling_llm2clip.encoding.devices import runs_ahead


def test_a_copy_is_waited_for_on_the_gpu_of_its_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the program's current GPU, whose stream knows nothing of the copy.

    The tensor is on the CPU, and takes the way of one on a GPU.
    """
    tensor = torch.arange(3.0)
    streams: list[Any] = []

    class Event:
        def __init__(self, *, blocking: bool) -> None:
            assert blocking

        def record(self, stream: Any = "of the current GPU") -> None:
            streams.append(stream)

        def synchronize(self) -> None:
            streams.append("waited")

    run_ahead(monkeypatch)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of", device))
    assert torch.equal(start_copy(tensor)(), tensor)
    assert streams == [("stream of", tensor.device), "waited"]


def test_a_gpu_of_cuda_alone_runs_ahead() -> None:
    """The copies of others have no events of CUDA to wait for."""
    kinds = ("cpu", "mps", "cuda")
    assert [kind for kind in kinds if runs_ahead(torch.device(kind))] == ["cuda"]
