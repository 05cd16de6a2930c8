"""Whether a device is there, asked before anything costly."""

from __future__ import annotations

import torch


def require_device(name: str) -> None:
    """Raise ValueError for a device that this machine or this torch does not have."""
    try:
        torch.empty(1, device=name).cpu()
    except (AssertionError, RuntimeError) as error:  # the first where torch has no CUDA at all
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device={name!r} is not there ({reason}). Name another one, such as cpu."
        ) from error
