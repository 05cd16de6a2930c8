"""The processes of a run: one, or those that a launcher started; and the device of each."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from ..encoding.devices import find_device

Arguments = TypeVar("Arguments", bound=TrainingArguments)

# One process may work alone for a while, on hard negatives or on a folder that is written. NCCL
# gives up after ten minutes.
LONGEST_WAIT = timedelta(hours=3)


def join_processes(*, cpu: bool | None = None) -> PartialState:
    """Join this process to the others of `accelerate launch` or `torchrun`, or be alone.

    accelerate takes processes of a launcher on a machine without a GPU for as many runs of one
    process, unless it is told to stay on the CPU.

    Args:
        cpu: whether to stay on the CPU; None where `find_device` finds nothing better.
    Raises: RuntimeError when the launcher started several processes and this one is alone.
    """
    stays_on_cpu = find_device().type == "cpu" if cpu is None else cpu
    state = PartialState(cpu=stays_on_cpu, timeout=LONGEST_WAIT)
    require_all_processes(state.num_processes)
    warn_of_idle_gpus(state.device, state.num_processes)
    return state


def warn_of_idle_gpus(device: torch.device, num_processes: int) -> None:
    """Warn where a machine has more GPUs than processes: each process uses one."""
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if num_processes < count:
        warnings.warn(
            f"{count} GPUs are seen, and {num_processes} used: one a process. Start as many "
            "processes (accelerate launch --config_file examples/accelerate/ddp.yaml "
            f"--num_processes {count} -m modeling_llm2clip …) to use all.",
            stacklevel=3,
        )


def require_all_processes(num_processes: int) -> None:
    """Raise RuntimeError when a launcher started other processes than this run works with.

    Each would compute the whole run by itself, and they would write the same files.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if num_processes != started:
        raise RuntimeError(
            f"The launcher started {started} processes (WORLD_SIZE), and this one works with "
            f"{num_processes}. Give every process a GPU, or all the CPU (--device cpu), or start "
            "one process without a launcher."
        )


def keep_to_one_gpu(arguments: TrainingArguments) -> None:
    """Make a Trainer use one GPU in one process, and never torch's DataParallel.

    That would multiply the batch by the number of GPUs and compute in float32, whatever the
    precision of the run.
    """
    arguments._n_gpu = min(1, arguments.n_gpu)


def is_sharded() -> bool:
    """Whether `accelerate launch` was given a configuration for FSDP."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")  # type: ignore[no-any-return]


def refuse_fsdp_for_lora() -> None:
    """Raise ValueError under FSDP, where no process has the whole matrices that a LoRA needs."""
    if is_sharded():
        raise ValueError("A LoRA is not trained under FSDP. Use the configuration for DDP.")


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
        arguments._n_gpu = int(device.type != "cpu")
    keep_to_one_gpu(arguments)
    return arguments
