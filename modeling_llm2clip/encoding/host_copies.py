"""Copies tensors from a GPU without blocking the next batch.

A GPU runs asynchronously until the program reads a result, so the embeddings of many batches are
copied back together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .devices import runs_ahead


def start_copy(tensor: Tensor) -> Callable[[], Tensor]:
    """Start copying a tensor to the CPU; call the result, from any thread, to wait for the copy."""
    if not runs_ahead(tensor.device):
        return tensor.cpu
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    copy.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)
    # By default, record would use the stream of the current GPU, which may be another one.
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait
