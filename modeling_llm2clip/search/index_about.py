"""Describe an image index: its model, columns and approximate index.

This module imports neither the database nor torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from ..data.sealed_manifest import read_sealed, write_sealed

FORMAT_VERSION = 1
HOW_TO_INDEX = "Create one with: llm2clip index MODEL IMAGES DB."
# Columns that a filter may use.
COLUMNS = {
    "path": pa.string(),
    "sha256": pa.string(),
    "bytes": pa.int64(),
    "modified": pa.timestamp("us", tz="UTC"),
    "width": pa.int64(),
    "height": pa.int64(),
    "taken": pa.timestamp("us"),
}
EVERY_IMAGE = "bytes >= 0"
"""A filter that every image passes. Counting with it reads values, so missing files are noticed."""
# Columns that come from an image's content: upright size in pixels, and capture time.
FACTS = ("width", "height", "taken")
# A search with a filter re-ranks this many times more candidates. In the worst measured case,
# images of 24 topics and queries about 36 other topics, this raises recall@10 from 0.945 to
# 0.992.
_REFINED_MORE = 4


class IndexUnavailableError(ValueError):
    """Raised if an index cannot be searched: it is missing, damaged or built with another model."""


@dataclass(frozen=True, kw_only=True)
class AnnIndex:
    """Settings of an approximate index, and measurements taken when it was built.

    Attributes:
        num_rows: Number of images when the partitions were trained.
        num_partitions: Number of partitions.
        nprobes: Partitions visited per query.
        refine_factor: Candidates per result that are re-ranked by exact cosine.
        recall_at_10: Share of the ten nearest images that the index finds, averaged over
            `num_queries` texts.
        num_queries: Number of texts used as queries for the measurements.
        query_ms: Median milliseconds per query with the index.
        exact_query_ms: Median milliseconds per query without the index.
        build_s: Seconds spent on training.
        is_used: True if searches use the index: either its recall is high enough and it is faster
            than exact search, or it was requested with `ann=always`.
    """

    num_rows: int
    num_partitions: int
    nprobes: int
    refine_factor: int
    recall_at_10: float
    num_queries: int
    query_ms: float
    exact_query_ms: float
    build_s: float
    is_used: bool

    def widen(self) -> AnnIndex:
        """Return the settings for a search with a filter: all partitions and more candidates.

        `nprobes` was tuned without a filter. Images that pass a filter are often similar, such as
        the images in one folder, and may all be outside the partitions nearest to the query. With
        one bit per dimension, similar images are also harder to tell apart.
        """
        return dataclasses.replace(
            self,
            nprobes=self.num_partitions,
            refine_factor=_REFINED_MORE * self.refine_factor,
        )


@dataclass(frozen=True, kw_only=True)
class About:
    """The model and the images of an index.

    Attributes:
        model: Folder or Hub id of the model.
        fingerprint: Short digests of what determines the embeddings: weights, tokenizer, prompt.
        model_files: Digest of the names, sizes and times of the model's files. While this digest is
            unchanged, the fingerprint is not recomputed.
        image_dir: Folder of the images.
        width: Dimension P of the embeddings.
        ann: The approximate index; None if no approximate index was built.
        tally: `num_images` and `total` of an `ImageTally` of all images encoded so far, including
            images removed since. None before any image is encoded.
        precision: Precision of the vision tower and mode of JPEG decoding; empty for a CPU with the
            stored dtype and full decoding.
    """

    model: str
    fingerprint: Mapping[str, str]
    model_files: str
    image_dir: str
    width: int
    ann: AnnIndex | None = None
    tally: Mapping[str, Any] | None = None
    precision: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def seal(self) -> str:
        return write_sealed({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)})

    @classmethod
    def unseal(cls, text: str, location: str) -> About:
        """Parse the output of `seal`; if it is damaged, raise IndexUnavailableError."""
        try:
            values = read_sealed(text)
            version = values.pop("format_version")
            if version == FORMAT_VERSION:
                ann = values.pop("ann")
                return cls(**values, ann=None if ann is None else AnnIndex(**ann))
        except (TypeError, ValueError, KeyError) as error:
            raise IndexUnavailableError(
                f"{location} is damaged: its table `about` cannot be read ({error}). Remove the "
                "database and index the images again."
            ) from error
        raise IndexUnavailableError(
            f"{location} has format_version {version}, but this package reads {FORMAT_VERSION}. "
            "Index the images into a new database, or use the package version that wrote this one."
        )
