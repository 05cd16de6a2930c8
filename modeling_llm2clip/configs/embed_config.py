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

    An output that is begun is continued with the same options; only `device`, `num_workers`,
    `skip_invalid` and `show_progress` may differ. Once images are left out, the limits of images
    must stay the same too.
    """

    dtype: EmbeddingDtype = "float32"
    """Dtype of the embeddings: float32, float16, int8 (a step of 1/255 of each dimension's range),
    or one bit per dimension: binary (as int8) or ubinary (as uint8)."""
    truncate_dim: Annotated[int, Interval(ge=1)] | None = None
    """Keep the first dimensions only, scaled to unit length again. Default: all."""
    columns: tuple[EmbeddingColumn, ...] = ()
    """Columns beside id and embedding: text, name, group_id, lang, captions, long_captions,
    keywords, url, place, image_file. Default: none."""
    rows_per_shard: Annotated[int, Interval(ge=1, le=2**20)] = 8192
    """Embeddings per file."""
    token_budget: Annotated[int, Interval(ge=1)] | None = None
    """Maximum number of tokens of a batch of texts, padding included. Default: by device."""
    skip_invalid: bool = False
    """Leave out images that cannot be decoded and report how many, instead of stopping at them."""
    int8_ranges: Path | None = None
    """Output of an earlier `embed` whose int8 ranges are used, so that both fit into one index.
    Default: the ranges of a sample."""
    calibration_size: Annotated[int, Interval(ge=1)] = 1024
    """Records of the sample that int8 ranges are measured on."""

    def _find_conflicts(self) -> Iterator[str]:
        yield from super()._find_conflicts()
        if len(set(self.columns)) < len(self.columns):
            yield f"columns={self.columns} names a column twice. Name each once."
        if self.int8_ranges is not None and self.dtype != "int8":
            yield f"int8_ranges={self.int8_ranges} needs dtype='int8', not {self.dtype!r}."
