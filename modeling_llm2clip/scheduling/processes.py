"""The processes of a run, one or several that a launcher started, and the device of each."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import torch
from accelerate import PartialState

from ..encoding.devices import find_device

_LAUNCHED = "ACCELERATE_DYNAMO_USE_FULLGRAPH"  # always set by `accelerate launch`

# One process may work alone for a while, on hard negatives or on a folder that is written. NCCL
# gives up after ten minutes.
LONGEST_WAIT = timedelta(hours=3)


def choose_device(name: str) -> torch.device:
    """Return the device that an option names, and join this process to the others of a launcher."""
    device = find_device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # otherwise kernels of other libraries run on the first GPU
    join_processes(cpu=device.type == "cpu")
    return device


def join_processes(*, cpu: bool) -> PartialState:
    """Join this process to the others of `accelerate launch` or `torchrun`, if there are any.

    On a machine without a GPU, accelerate treats the processes of a launcher as separate runs of
    one process, unless the CPU is asked for.
    """
    state = PartialState(cpu=cpu, timeout=LONGEST_WAIT)
    require_all_processes(state.num_processes)
    refuse_lone_launch(state.num_processes)
    warn_of_idle_gpus(state.device, state.num_processes)
    return state


def warn_of_idle_gpus(device: torch.device, num_processes: int) -> None:
    """Warn if a machine has more GPUs than processes: each process uses one."""
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if num_processes < count:
        warnings.warn(
            f"{num_processes} of {count} GPUs are used: one per process. Start as many "
            "processes (accelerate launch --config_file examples/accelerate/ddp.yaml "
            f"--num_processes {count} -m modeling_llm2clip …) to use all.",
            stacklevel=3,
        )


def require_all_processes(num_processes: int) -> None:
    """Require that a run works with all processes of its launcher."""
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
