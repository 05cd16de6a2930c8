"""Options of embeddings for a vector database."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from annotated_types import Interval

from .encoding_config import BackendConfig, EncodingConfig

EmbeddingDtype: TypeAlias = Literal["float32", "float16", "int8", "binary", "ubinary"]
EmbeddingColumn: TypeAlias = Literal[
    "text",
    "name",
    "group_id",
    "lang",
    "captions",
    "long_captions",
    "keywords",
    "url",
    "place",
    "image_file",
]


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(EncodingConfig, BackendConfig):
    """Options of `embed`: the encoding, and the content of its files.

    An interrupted output continues only with the same options, except for `device`, `num_workers`,
    `skip_invalid` and `show_progress`. If images were left out, the image limits must stay the
    same too.
    """

    dtype: EmbeddingDtype = "float32"
    """Dtype of the embeddings: float32, float16, int8 (a step of 1/255 of each dimension's range),
    or one bit per dimension as binary (int8) or ubinary (uint8)."""
    truncate_dim: Annotated[int, Interval(ge=1)] | None = None
    """Number of dimensions to keep from the first on; the embeddings are scaled to unit length
    again. Default: all."""
    columns: tuple[EmbeddingColumn, ...] = ()
    """Columns besides id and embedding: text, name, group_id, lang, captions, long_captions,
    keywords, url, place, image_file. Default: none."""
    rows_per_shard: Annotated[int, Interval(ge=1, le=2**20)] = 8192
    """Embeddings per file."""
    token_budget: Annotated[int, Interval(ge=1)] | None = None
    """Maximum number of tokens per batch of texts, padding included. Default: by device."""
    skip_invalid: bool = False
    """Skip images that cannot be decoded and report their number, instead of stopping."""
    int8_ranges: Path | None = None
    """Output of an earlier `embed` whose int8 ranges to use, so that both fit into one index.
    Default: the ranges of a sample."""
    calibration_size: Annotated[int, Interval(ge=1)] = 1024
    """Number of records in the sample that measures int8 ranges."""

    def find_conflicts(self) -> Iterator[str]:
        """Yield a sentence for a column given twice, and for ranges that nothing uses."""
        yield from super().find_conflicts()
        if len(set(self.columns)) < len(self.columns):
            yield f"columns={self.columns} names a column twice. Name each once."
        if self.int8_ranges is not None and self.dtype != "int8":
            yield f"int8_ranges={self.int8_ranges} needs dtype='int8', not {self.dtype!r}."
