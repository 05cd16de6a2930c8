"""Copies between the CPU and a GPU, for which no batch waits.

A GPU computes while the program goes on, until the program reads a result. So inputs leave from
pinned memory, and the embeddings of many batches come back in one copy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def computes_beside(device: torch.device) -> bool:
    """Tell whether a device computes while the program goes on, so that each read is a wait."""
    return device.type == "cuda"


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; a GPU copies it while the program goes on."""
    if not computes_beside(device):
        return tensor.to(device)
    return (tensor if tensor.is_cuda else tensor.pin_memory()).to(device, non_blocking=True)


def start_copy(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the CPU; call the result, in any thread, to wait for the copy."""
    if not computes_beside(tensor.device):
        return tensor.cpu
    copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait
