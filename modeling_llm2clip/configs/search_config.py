"""Options of indexing and tagging a folder of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from .encoding_config import EncodingConfig


@dataclass(frozen=True, kw_only=True)
class IndexConfig(EncodingConfig):
    """Options of `index`: the encoding, and the approximate index."""

    ann: Literal["auto", "always", "never"] = "auto"
    """Approximate index: auto builds one from 20,000 images on, and keeps it if it is faster than
    comparing with every image and reaches the required recall."""
    min_recall: Annotated[float, Interval(gt=0, le=1)] = 0.97
    """Required recall@10 of the approximate index, compared with an exact search."""


@dataclass(frozen=True, kw_only=True)
class TagConfig(EncodingConfig):
    """Options of `tag`: encoding a folder of images."""

    index: str | None = None
    """Database of the images' embeddings, updated as by `llm2clip index`, so that the next call
    encodes only new images. Default: none, and all images are encoded."""
    skip_invalid: bool = False
    """Skip images that cannot be read and report their number, instead of stopping."""
