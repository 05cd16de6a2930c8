"""How a model encodes texts and images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .config_fields import DeviceConfig, Range


@dataclass(frozen=True, kw_only=True)
class EncodingConfig(DeviceConfig):
    """How a model encodes; in float32 nothing of it changes an embedding."""

    batch_size: Annotated[int, Range(min=1)] | None = None
    """Texts or images per batch. Default: by device."""
    num_workers: Annotated[int, Range(min=1)] = 1
    """Threads that decode images."""
    show_progress: bool = True
    """Show progress bars."""
