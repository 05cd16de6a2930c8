"""The processes of a run, one or several that a launcher started, and the device of each."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor
from transformers import TrainingArguments

from ..encoding.devices import find_device

Arguments = TypeVar("Arguments", bound=TrainingArguments)
Result = TypeVar("Result")

_LAUNCHED = "ACCELERATE_DYNAMO_USE_FULLGRAPH"  # which `accelerate launch` always sets

# One process may work alone for a while, on hard negatives or on a folder that is written. NCCL
# gives up after ten minutes.
LONGEST_WAIT = timedelta(hours=3)


def choose_device(name: str) -> torch.device:
    """Return the device that an option names, and join this process to the others of a launcher.

    Args:
        name: As `find_device` takes it; of several processes each gets its own GPU.

    Raises:
        ValueError: The device is not there.
        RuntimeError: As `join_processes`.
    """
    device = find_device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # otherwise kernels of other libraries run on the first
    join_processes(cpu=device.type == "cpu")
    return device


def join_processes(*, cpu: bool | None = None) -> PartialState:
    """Join this process to the others of `accelerate launch` or `torchrun`, if there are any.

    On a machine without a GPU, accelerate treats the processes of a launcher as separate runs of
    one process, unless the CPU is asked for.

    Args:
        cpu: Whether to stay on the CPU; None for what `find_device` chooses.

    Returns:
        accelerate's state of the processes.

    Raises:
        RuntimeError: The launcher started several processes, and this one is alone.
    """
    stays_on_cpu = find_device().type == "cpu" if cpu is None else cpu
    state = PartialState(cpu=stays_on_cpu, timeout=LONGEST_WAIT)
    require_all_processes(state.num_processes)
    refuse_lone_launch(state.num_processes)
    warn_of_idle_gpus(state.device, state.num_processes)
    return state


def run_once_per_machine(function: Callable[[], Result]) -> Result:
    """Call a function on one process of each machine; the others wait for what it returns.

    Args:
        function: Returns what can be pickled.

    Returns:
        What the function returned on this machine.

    Raises:
        Exception: What the function raised on any machine, on all processes.
    """
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


def warn_of_idle_gpus(device: torch.device, num_processes: int) -> None:
    """Warn if a machine has more GPUs than processes: each process uses one.

    Args:
        device: Device of this process.
        num_processes: Number of processes of the run.
    """
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if num_processes < count:
        warnings.warn(
            f"{num_processes} of {count} GPUs are used: one per process. Start as many "
            "processes (accelerate launch --config_file examples/accelerate/ddp.yaml "
            f"--num_processes {count} -m modeling_llm2clip …) to use all.",
            stacklevel=3,
        )


def require_all_processes(num_processes: int) -> None:
    """Require that a run works with all processes of its launcher.

    Args:
        num_processes: Number of processes that this one works with.

    Raises:
        RuntimeError: The launcher started another number. Each process would compute the whole
            run by itself, and all would write the same files.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if num_processes != started:
        raise RuntimeError(
            f"The launcher started {started} processes (WORLD_SIZE), and this one works with "
            f"{num_processes}. Give every process a GPU, or all of them the CPU (--device cpu), or "
            "start one process without a launcher."
        )


def refuse_lone_launch(num_processes: int) -> None:
    """Refuse a run of one process where `accelerate launch` was asked for several.

    Without `--multi_gpu`, or a configuration that says so, accelerate starts one process on a
    machine without several GPUs, whatever `--num_processes` says. It then sets the address of a
    main process, which it does for several processes alone, but neither rank nor world size.

    Args:
        num_processes: Number of processes that this one works with.

    Raises:
        RuntimeError: The launcher was asked for several processes and started one.
    """
    if num_processes > 1 or "WORLD_SIZE" in os.environ or _LAUNCHED not in os.environ:
        return
    if "MASTER_ADDR" in os.environ:
        raise RuntimeError(
            "accelerate launch was asked for several processes or machines, and started one "
            "process. Add --multi_gpu, which also starts processes on CPUs, or --config_file "
            "examples/accelerate/ddp.yaml. For one process on one machine, ask for "
            "--num_processes 1 --num_machines 1, and unset MASTER_ADDR."
        )


def keep_to_one_gpu(arguments: TrainingArguments) -> None:
    """Make a Trainer use one GPU per process, and never torch's DataParallel.

    DataParallel would multiply the batch by the number of GPUs and compute in float32, whatever
    the precision of the run.

    Args:
        arguments: Of the Trainer; changed in place.
    """
    arguments._n_gpu = min(1, arguments.n_gpu)


def is_sharded() -> bool:
    """Whether `accelerate launch` was given a configuration for FSDP."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")  # type: ignore[no-any-return]


def refuse_fsdp_for_lora() -> None:
    """Refuse to train a LoRA under FSDP, where no process has whole matrices to merge it into.

    Raises:
        ValueError: The launcher was given a configuration for FSDP.
    """
    if is_sharded():
        raise ValueError("A LoRA is not trained under FSDP. Use the configuration for DDP.")


def training_arguments_on(
    device: torch.device, arguments_class: type[Arguments], **options: Any
) -> Arguments:
    """Make a Trainer's arguments for a run on one device; by default it takes the first GPU.

    Args:
        device: Device of the run; of several processes each has its own already.
        arguments_class: `TrainingArguments` or a class derived from it.
        **options: Further arguments of that class.
    """
    arguments = arguments_class(use_cpu=device.type == "cpu", **options)
    state = PartialState()
    if state.num_processes == 1:
        state.device = device
        arguments.__dict__["_setup_devices"] = device  # a cached property, computed before
        arguments._n_gpu = int(device.type != "cpu")
    keep_to_one_gpu(arguments)
    return arguments


def gather_group_ids(group_ids: Tensor) -> Tensor:
    """Concatenate the group ids of all processes in the order of their ranks.

    Args:
        group_ids: (B,) int64, of this process; equally many on every process.

    Returns:
        (A,) int64.
    """
    gathered = [torch.empty_like(group_ids) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, group_ids.contiguous())
    return torch.cat(gathered)
