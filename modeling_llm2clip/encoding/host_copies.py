"""Copies from a GPU, for which no batch waits.

A GPU computes while the program goes on, until the program reads a result. So the embeddings of
many batches come back in one copy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .devices import runs_ahead


def start_copy(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the CPU; call the result, in any thread, to wait for the copy."""
    if not runs_ahead(tensor.device):
        return tensor.cpu
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    copy.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)
    # Without a stream, it would be one of the program's current GPU, which need not be this one.
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait
