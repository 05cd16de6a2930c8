"""The choice of a device, one for all commands, checked before anything costly.

Importing this costs nothing: torch is imported by the functions that need it.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Types of devices that compute while Python goes on: reading a number there waits for all of it.
_RUN_AHEAD = {"cuda"}


def find_device(name: str | None = "auto", *, precision: str = "auto") -> torch.device:
    """Return the device of a name; `"auto"` and None are the best there is.

    Under `torchrun` or `accelerate launch`, `"auto"` and `"cuda"` are the GPU of this process. A
    GPU that does not have the precision is refused.
    """
    import torch

    # accelerate reads the same variable.
    launched = int(os.environ.get("LOCAL_RANK", "-1")) >= 0
    # `accelerate launch` was given `--cpu`, or its configuration says so.
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if name is None or name == "auto":
        name = list_devices()[0]
        if on_cpu or (launched and name == "mps"):  # one device for several
            name = "cpu"
    if launched and name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    elif launched and (name == "mps" or re.fullmatch(r"(?!cpu).*:\d+", name)):
        raise ValueError(
            f"device={name!r} is one device, and a launcher started this process, as it may "
            "have others. Give 'auto' or 'cuda', with which each takes its own GPU, or 'cpu'."
        )
    require_device(name)
    device = torch.device(name)
    if precision == "bfloat16" and not has_bfloat16(device):
        raise ValueError(
            f"precision=bfloat16: {describe_device(device)} does not compute in bfloat16. Give "
            "auto or float32, or another device."
        )
    return device


def require_compiler(device: torch.device) -> None:
    """Raise ValueError where `torch.compile` finds no compiler for a device."""
    if device.type == "cuda":
        lacks = None if find_spec("triton") else "needs Triton: pip install triton"
    elif device.type == "cpu":
        name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        lacks = None if shutil.which(name) else f"needs a C++ compiler, and there is no {name}"
    else:
        lacks = f"is for GPUs of CUDA and for CPUs, not for {device}"
    if lacks:
        raise ValueError(f"compile=True {lacks}. Or leave it out.")


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes in bfloat16; a GPU may only emulate it, which is slow."""
    import torch

    if device.type != "cuda":
        return True
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def list_devices() -> list[str]:
    """List what `"auto"` chooses from on this machine, the best first."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [*(name for name, is_there in there.items() if is_there), "cpu"]


def require_device(name: str) -> None:
    """Raise an error for a device that this machine or this torch does not have."""
    import torch

    try:
        torch.empty(1, device=name).cpu()
    except (AssertionError, RuntimeError) as error:  # the first where torch has no CUDA at all
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device={name!r} is not there ({reason}). Name another one, such as cpu."
        ) from error


def describe_device(device: torch.device) -> str:
    """Return the name of a device, for a GPU with that of its model."""
    import torch

    if device.type != "cuda":
        return str(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    return f"cuda:{index} ({torch.cuda.get_device_name(index)})"


def has_float64(device: torch.device) -> bool:
    """Return whether a device computes in float64, as ranks and closed forms do; MPS does not."""
    return device.type != "mps"


def runs_ahead(device: torch.device) -> bool:
    """Return whether a device computes while Python goes on, so that reading a number waits."""
    return device.type in _RUN_AHEAD


def count_free_bytes(device: torch.device) -> int:
    """Count the free bytes of a GPU; 0 for other devices."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def has_room(device: torch.device, num_bytes: int) -> bool:
    """Return whether so many bytes fit into half of the free memory of a GPU; on a CPU they do."""
    if device.type != "cuda":
        return device.type == "cpu"
    return 2 * num_bytes <= count_free_bytes(device)


def to_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64, on the CPU if it was on MPS, which has no float64."""
    return tensor.double() if has_float64(tensor.device) else tensor.cpu().double()
