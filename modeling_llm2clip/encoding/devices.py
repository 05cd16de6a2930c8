"""Chooses a device, the same way for all commands, and checks it before any costly work.

Importing this module is cheap: only functions that need torch import torch.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Types of devices that compute asynchronously: reading a number waits for all queued work.
_RUN_AHEAD = {"cuda"}


def find_device(name: str | None = "auto", *, precision: str = "auto") -> torch.device:
    """Return the device with a name; `"auto"` and None pick the best one available.

    Under `torchrun` or `accelerate launch`, `"auto"` and `"cuda"` are this process's GPU. Raises
    ValueError if the device does not support the precision.
    """
    import torch

    # accelerate reads the same variable.
    launched = int(os.environ.get("LOCAL_RANK", "-1")) >= 0
    # Set by `accelerate launch --cpu`, or by its configuration.
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if name is None or name == "auto":
        name = list_devices()[0]
        if on_cpu or (launched and name == "mps"):  # several processes cannot share one device
            name = "cpu"
    if launched and name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    elif launched and (name == "mps" or re.fullmatch(r"(?!cpu).*:\d+", name)):
        raise ValueError(
            f"device={name!r} is a single device, but a launcher such as torchrun started this "
            "process, possibly with others. Use 'auto' or 'cuda' to put each process on its own "
            "GPU, or 'cpu'."
        )
    require_device(name)
    device = torch.device(name)
    if precision == "bfloat16" and not has_bfloat16(device):
        raise ValueError(
            f"precision=bfloat16: {describe_device(device)} does not compute in bfloat16. Use "
            "auto or float32, or another device."
        )
    return device


def require_compiler(device: torch.device) -> None:
    """Raise ValueError if `torch.compile` has no compiler for a device."""
    if device.type == "cuda":
        problem = None if find_spec("triton") else "needs Triton: pip install triton"
    elif device.type == "cpu":
        name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        problem = None if shutil.which(name) else f"needs a C++ compiler, but {name} is missing"
    else:
        problem = f"supports only CUDA GPUs and CPUs, not {device}"
    if problem:
        raise ValueError(f"compile=True {problem}. Or leave compile out.")


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes in bfloat16 natively; emulation on a GPU is slow."""
    import torch

    if device.type != "cuda":
        return True
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 in hardware, faster than float32.

    A CPU needs AMX, or AVX-512 with bfloat16 from AMD: on an Intel CPU without AMX, bfloat16 is
    slower than float32. False if `ONEDNN_MAX_CPU_ISA` limits the instructions of matrix products,
    and for versions of torch that do not report a CPU's instructions.
    """
    import torch

    if device.type != "cpu":
        return device.type == "cuda" and has_bfloat16(device)
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    is_amd = has.get("sse4a", False)  # only AMD CPUs have this extension
    is_fast = has.get("amx_bf16", False) or (has.get("avx512_bf16", False) and is_amd)
    return is_fast and not os.environ.get("ONEDNN_MAX_CPU_ISA")


def list_devices() -> list[str]:
    """List the devices of this machine that `"auto"` chooses from, best first."""
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [*(name for name, is_available in available.items() if is_available), "cpu"]


def require_device(name: str) -> None:
    """Raise ValueError if this machine or this build of torch lacks a device."""
    import torch

    try:
        torch.empty(1, device=name).cpu()
    except (AssertionError, RuntimeError) as error:  # AssertionError: torch is built without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device={name!r} is not available ({reason}). Use another one, such as cpu."
        ) from error


def describe_device(device: torch.device) -> str:
    """Return the name of a device, including the model of a GPU."""
    import torch

    if device.type != "cuda":
        return str(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    return f"cuda:{index} ({torch.cuda.get_device_name(index)})"


def has_float64(device: torch.device) -> bool:
    """Return whether a device has float64, needed for ranks and closed-form fits; MPS does not."""
    return device.type != "mps"


def runs_ahead(device: torch.device) -> bool:
    """Return whether a device computes asynchronously, so reading a number has to wait."""
    return device.type in _RUN_AHEAD


def count_free_bytes(device: torch.device) -> int:
    """Count the free bytes of a GPU; 0 for other devices."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def has_room(device: torch.device, num_bytes: int) -> bool:
    """Return whether the bytes fit in half of a GPU's free memory; always True on a CPU."""
    if device.type != "cuda":
        return device.type == "cpu"
    return 2 * num_bytes <= count_free_bytes(device)


def to_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Convert a tensor to float64; one on MPS, which lacks float64, moves to the CPU."""
    return tensor.double() if has_float64(tensor.device) else tensor.cpu().double()
