"""How captioned images are streamed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .config_fields import Config, Range


@dataclass(frozen=True, kw_only=True)
class StreamConfig(Config):
    """How `align` streams shards, which it does for every URL."""

    stream: bool = False
    """Read local shards, too, one after the other through a shuffle buffer, and not at random."""
    buffer_size: Annotated[int, Range(min=1)] = 1000
    """Samples that each worker shuffles."""
    max_lost_share: Annotated[float, Range(min=0, max=1)] = 0.01
    """Share of the samples, or of the shards, that may be broken or missing."""
