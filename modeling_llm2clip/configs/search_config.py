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
    comparing with every image and finds enough; always and never do as they say."""
    min_recall: Annotated[float, Interval(gt=0, le=1)] = 0.97
    """Recall@10 that the approximate index has to reach, against comparing with every image."""


@dataclass(frozen=True, kw_only=True)
class TagConfig(EncodingConfig):
    """Options of `tag`: encoding a folder of images."""

    index: str | None = None
    """Database of the images' embeddings, which is brought up to date as by `llm2clip index`, so
    that the next call encodes new images alone. Default: none, and all images are encoded."""
    skip_invalid: bool = False
    """Leave out images that cannot be read and report how many, instead of stopping at them."""
