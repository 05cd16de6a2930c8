"""The processes of a run: one, or those that a launcher started."""

from __future__ import annotations

import torch
from accelerate import PartialState


def join_processes(*, cpu: bool | None = None) -> PartialState:
    """Join this process to the others of `accelerate launch` or `torchrun`, or be alone.

    accelerate takes processes of `torchrun` on a machine without a GPU for as many runs of one
    process, unless it is told to stay on the processor.

    Args:
        cpu: whether to stay on the processor; None does where there is no GPU.
    """
    if cpu is None:
        devices = (torch.cuda, torch.xpu, torch.backends.mps)
        cpu = not any(device.is_available() for device in devices)
    return PartialState(cpu=cpu)
