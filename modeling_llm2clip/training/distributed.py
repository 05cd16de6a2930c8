"""Processes of a training run, and the arguments of their Trainers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

Arguments = TypeVar("Arguments", bound=TrainingArguments)
Result = TypeVar("Result")


def run_once_per_machine(function: Callable[[], Result]) -> Result:
    """Call a function on one process of each machine; all get its result, or raise its error."""
    state = PartialState()
    if state.num_processes == 1:
        return function()
    result: tuple[Any, Exception | None] = (None, None)
    if state.is_local_main_process:
        try:
            result = (function(), None)
        except Exception as error:
            result = (None, error)
    results: list[Any] = [None] * state.num_processes
    dist.all_gather_object(results, result)
    for _, raised in results:
        if raised is not None:
            raise raised
    return results[state.process_index - state.local_process_index][0]  # type: ignore[no-any-return]


def keep_to_one_gpu(arguments: TrainingArguments) -> None:
    """Make a Trainer use one GPU per process, and never torch's DataParallel.

    DataParallel would multiply the batch by the number of GPUs and compute in float32, whatever
    the precision of the run.
    """
    arguments._n_gpu = min(1, arguments.n_gpu)


def is_sharded() -> bool:
    """Return whether `accelerate launch` was given a configuration for FSDP."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")  # type: ignore[no-any-return]


def refuse_fsdp_for_lora() -> None:
    """Refuse to train a LoRA under FSDP, where no process has whole matrices to merge it into."""
    if is_sharded():
        raise ValueError("A LoRA is not trained under FSDP. Use the configuration for DDP.")


def training_arguments_on(
    device: torch.device, arguments_class: type[Arguments], **options: Any
) -> Arguments:
    """Make a Trainer's arguments for a run on one device; by default it takes the first GPU."""
    arguments = arguments_class(use_cpu=device.type == "cpu", **options)
    state = PartialState()
    if state.num_processes == 1:
        state.device = device
        arguments.__dict__["_setup_devices"] = device  # a cached property, computed before
        arguments._n_gpu = int(device.type != "cpu")
    keep_to_one_gpu(arguments)
    return arguments
