"""The description of an image index: its model, columns, approximate index and errors.

Imports neither the database nor torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from ..data.sealed_manifest import read_sealed, write_sealed

FORMAT_VERSION = 1
HOW_TO_INDEX = "Make one: llm2clip index MODEL IMAGES DB."
# The columns that a filter may use.
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
"""A filter that all images pass: to count by it reads values, so missing files are noticed."""
# Columns that are read from the content of an image: upright pixels, and when it was taken.
FACTS = ("width", "height", "taken")
# A search with a filter refines this many times more candidates. In the worst measured case, images
# of 24 topics and queries about 36 others, it raises recall@10 from 0.945 to 0.992.
_REFINED_MORE = 4


class IndexUnavailableError(ValueError):
    """An index that no query can search: gone, damaged or of another model."""


@dataclass(frozen=True, kw_only=True)
class AnnIndex:
    """An approximate index, and its measurements when it was built.

    Attributes:
        num_rows: Images when its partitions were trained.
        num_partitions: Partitions of the images.
        nprobes: Partitions that a query visits.
        refine_factor: Candidates per result that are compared exactly.
        recall_at_10: Share of the ten nearest images that it finds, over `num_queries` texts.
        num_queries: Texts that it was measured with.
        query_ms: Median milliseconds of a query.
        exact_query_ms: Median milliseconds of a query without the index.
        build_s: Seconds that training took.
        is_used: True if searches use it: it finds enough, and is faster than no index.
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
        """Return the settings of a search with a filter: all partitions, and more candidates.

        `nprobes` was tuned without a filter. Images that pass one are often alike, such as the
        images of one folder, and may be in none of the partitions nearest to the query. One bit per
        dimension also separates similar images less well.
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
        fingerprint: Short texts on weights, tokenizer and prompt, which decide its embeddings.
        model_files: Digest of names, sizes and times of the model's files: while it stays the
            same, the fingerprint need not be computed again.
        image_dir: Folder of the images.
        width: P of the embeddings.
        ann: The approximate index; None if none was built.
        tally: `num_images` and `total` of an `ImageTally` of the images that were encoded into
            it; images that were removed since still count. None if the model has no summary of
            its training images.
        precision: How the vision tower computed, and how JPEGs were decoded; empty on a CPU in the
            stored dtype, and in full.
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
        """Return it as sealed JSON."""
        return write_sealed({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)})

    @classmethod
    def unseal(cls, text: str, location: str) -> About:
        """Read what `seal` returned; IndexUnavailableError names the database if it is not that."""
        try:
            values = read_sealed(text)
            version = values.pop("format_version")
            if version == FORMAT_VERSION:
                ann = values.pop("ann")
                return cls(**values, ann=None if ann is None else AnnIndex(**ann))
        except (TypeError, ValueError, KeyError) as error:
            raise IndexUnavailableError(
                f"{location} is damaged: its table `about` cannot be read ({error}). Remove it, "
                "and index the images again."
            ) from error
        raise IndexUnavailableError(
            f"{location} has format_version {version}, and this package reads {FORMAT_VERSION}. "
            "Index the images again into a new database, or use the version that wrote it."
        )
