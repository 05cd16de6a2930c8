"""The processes of a run: one, or those that a launcher started."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from ..encoding.devices import find_device

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def join_processes(*, cpu: bool | None = None) -> PartialState:
    """Join this process to the others of `accelerate launch` or `torchrun`, or be alone.

    accelerate takes processes of `torchrun` on a machine without a GPU for as many runs of one
    process, unless it is told to stay on the processor.

    Args:
        cpu: whether to stay on the processor; None does where `find_device` finds nothing better.
    """
    return PartialState(cpu=find_device().type == "cpu" if cpu is None else cpu)


def training_arguments_on(
    device: torch.device, arguments_class: type[Arguments], **settings: Any
) -> Arguments:
    """Make transformers' arguments of a run on this device; by themselves they take the first GPU.

    Of several processes each has its own already.
    """
    arguments = arguments_class(use_cpu=device.type == "cpu", **settings)
    state = PartialState()
    if state.num_processes == 1:
        state.device = device
        arguments.__dict__["_setup_devices"] = device  # a cached property, asked for before
        arguments._n_gpu = int(device.type != "cpu")  # never torch's DataParallel
    return arguments
