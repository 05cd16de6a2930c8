"""How a folder of images is indexed for search and tagging."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .encoding_config import EncodingConfig


@dataclass(frozen=True, kw_only=True)
class IndexConfig(EncodingConfig):
    """How `search` and `tag` encode a folder of images, and where its embeddings are kept."""

    index: Path | None = None
    """File of the image embeddings (safetensors), so that the next call encodes new images alone.
    Default: a file in the cache, one per model and folder."""
    keep_index: bool = True
    """Keep the image embeddings."""
    skip_invalid: bool = False
    """Leave out images that cannot be read and report how many, instead of stopping at them."""

    def find_conflicts(self) -> Iterator[str]:
        """Yield a sentence for an index that is named and not to be kept."""
        if self.index is not None and not self.keep_index:
            yield f"index={self.index} excludes keep_index=False. Give one of them."
