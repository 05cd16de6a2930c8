"""Loads weights to the device that they run on, in the dtype that they run in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def load_on_device(
    model_class: Any,
    folder: str | Path,
    device: torch.device,
    *,
    dtype: torch.dtype | str | dict[str, torch.dtype] = "auto",
    **options: Any,
) -> Any:
    """Load a model folder straight to a device, in evaluation mode.

    Each weight is read, cast and copied alone, so that the memory of the host never holds a model
    that runs elsewhere. `dtype` is as in `from_pretrained`, to which further options go; by default
    it is the stored one.
    """
    model = model_class.from_pretrained(
        folder, local_files_only=True, dtype=dtype, device_map={"": device}, **options
    )
    return model.eval()
