"""The device of a command: found before anything costly, and printed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def use_device(name: str) -> torch.device:
    """Find the device, and print it unless there was nothing to choose.

    Args:
        name: As `--device` takes it.

    Raises:
        ValueError: This machine has no such device.
    """
    import torch

    from ..encoding.devices import describe_device, find_device, list_devices

    device = find_device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # else kernels of libraries would run on the first GPU
    had_choice = name == "auto" and len(list_devices()) > 1
    if device.type != "cpu" or had_choice:
        print(f"Device: {describe_device(device)} (--device {name}).", file=sys.stderr)
    return device
