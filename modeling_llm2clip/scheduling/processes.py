"""Processes of a run, one or several from a launcher, and the device of each process."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import torch
from accelerate import PartialState

from ..encoding.devices import find_device

_LAUNCHED = "ACCELERATE_DYNAMO_USE_FULLGRAPH"  # always set by `accelerate launch`

# One process may keep the others waiting, while it mines hard negatives or writes a folder. By
# default, NCCL gives up after ten minutes.
LONGEST_WAIT = timedelta(hours=3)


def choose_device(name: str) -> torch.device:
    """Return the device for an option's value, and initialize the process group."""
    device = find_device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # or other libraries would run kernels on the first GPU
    join_processes(cpu=device.type == "cpu")
    return device


def join_processes(*, cpu: bool) -> PartialState:
    """Join the process group of `accelerate launch` or `torchrun`, if there is one.

    On a machine without a GPU, accelerate treats the processes of a launcher as separate
    single-process runs, unless the CPU is requested.
    """
    state = PartialState(cpu=cpu, timeout=LONGEST_WAIT)
    require_all_processes(state.num_processes)
    refuse_lone_launch(state.num_processes)
    warn_of_idle_gpus(state.device, state.num_processes)
    return state


def warn_of_idle_gpus(device: torch.device, num_processes: int) -> None:
    """Warn if a machine has more GPUs than processes, because each process uses only one GPU."""
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if num_processes < count:
        warnings.warn(
            f"Only {num_processes} of {count} GPUs are used, one per process. To use all, start "
            f"{count} processes: accelerate launch --config_file examples/accelerate/ddp.yaml "
            f"--num_processes {count} -m modeling_llm2clip …",
            stacklevel=3,
        )


def require_all_processes(num_processes: int) -> None:
    """Require that all processes of the launcher joined the run."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if num_processes != started:
        raise RuntimeError(
            f"The launcher started {started} processes (WORLD_SIZE), but accelerate uses only "
            f"{num_processes}. Run every process on a GPU or all of them on the CPU (--device "
            "cpu), or start one process without a launcher."
        )


def refuse_lone_launch(num_processes: int) -> None:
    """Refuse a single-process run if `accelerate launch` was asked for several processes.

    Without `--multi_gpu` or a configuration that sets it, accelerate starts one process on a
    machine without several GPUs, whatever `--num_processes` says. In this case, accelerate sets the
    address of a main process, as it does only for several processes, but neither rank nor world
    size.
    """
    if num_processes > 1 or "WORLD_SIZE" in os.environ or _LAUNCHED not in os.environ:
        return
    if "MASTER_ADDR" in os.environ:
        raise RuntimeError(
            "accelerate launch was asked for several processes or machines, but started only one "
            "process. Add --multi_gpu, which also starts processes on CPUs, or --config_file "
            "examples/accelerate/ddp.yaml. For one process on one machine, use "
            "--num_processes 1 --num_machines 1 and unset MASTER_ADDR."
        )
