"""Makes the CPU take the branches of a device that computes while Python goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modeling_llm2clip.encoding import devices


class CompletedEvent:
    """An event in place of CUDA's: a copy on the CPU is complete before it is recorded."""

    def __init__(self, *, blocking: bool) -> None:
        self.blocking = blocking

    def record(self, stream: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


def run_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the CPU for such a device, in training and in encoding."""
    monkeypatch.setattr(devices, "_RUN_AHEAD", {"cpu"})
    monkeypatch.setattr(torch.cuda, "Event", CompletedEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
