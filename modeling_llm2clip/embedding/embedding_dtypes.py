"""Embeddings in the dtypes of vector databases: truncated, in fewer bits.

int8 and the two binary dtypes are those of sentence-transformers' `quantize_embeddings`, number for
number. N embeddings, P dimensions of the model, D of what is stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ..configs.encoding_config import EmbeddingDtype

Array: TypeAlias = np.ndarray[Any, Any]
# Type of the values of a stored embedding.
VALUE_TYPES: dict[EmbeddingDtype, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "int8": np.int8,
    "binary": np.int8,
    "ubinary": np.uint8,
}
_STEPS = 255
_BITS = 8


class ConvertedEmbeddings(NamedTuple):
    """Embeddings as they are stored.

    Attributes:
        values: (N, D).
        num_clipped: Values outside the int8 ranges, which became the nearest number.
    """

    values: Array
    num_clipped: int = 0


def count_values(dim: int, dtype: EmbeddingDtype) -> int:
    """Return how many values a stored embedding has; binary ones have eight dimensions in one."""
    if dtype not in ("binary", "ubinary"):
        return dim
    if dim % _BITS:
        raise ValueError(
            f"dtype={dtype!r} packs eight dimensions into a byte, and {dim} is not a multiple of "
            f"eight. Give truncate_dim={dim // _BITS * _BITS}, or another dtype."
        )
    return dim // _BITS


def truncate_embeddings(embeds: Array, dim: int) -> Array:
    """Keep the first dimensions of (N, P) embeddings, and scale them to unit length again."""
    if dim == embeds.shape[1]:
        return embeds
    kept = embeds[:, :dim]
    lengths = np.linalg.norm(kept, axis=1, keepdims=True)
    if not lengths.all():
        count = int((lengths == 0).sum())
        raise ValueError(
            f"{count} embeddings are zero in their first {dim} dimensions, and have no direction "
            "there. Give a larger truncate_dim."
        )
    shortened: Array = (kept / lengths).astype(np.float32)
    return shortened


def measure_ranges(embeds: Array) -> Array:
    """Measure the int8 ranges of (N, D) embeddings: (2, D) smallest and largest values."""
    return np.stack([embeds.min(axis=0), embeds.max(axis=0)])


def convert_embeddings(
    embeds: Array, dtype: EmbeddingDtype, *, ranges: Array | None = None
) -> ConvertedEmbeddings:
    """Convert embeddings to the dtype in which they are stored; int8 needs ranges."""
    if dtype == "int8":
        assert ranges is not None
        return _convert_to_int8(embeds, ranges)
    if dtype in ("binary", "ubinary"):
        bits = np.packbits(embeds > 0, axis=-1)
        # Signed, the byte 0 is -128.
        values = bits if dtype == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
        return ConvertedEmbeddings(values)
    return ConvertedEmbeddings(embeds.astype(VALUE_TYPES[dtype]))


def _convert_to_int8(embeds: Array, ranges: Array) -> ConvertedEmbeddings:
    starts = ranges[0]
    steps = (ranges[1] - starts) / _STEPS
    steps = np.where(steps == 0, 1, steps)
    levels = np.clip((embeds - starts) / steps, 0, _STEPS).astype(np.int16)
    outside = (embeds < ranges[0]) | (embeds > ranges[1])
    values = (levels - 128).astype(np.int8)
    return ConvertedEmbeddings(values, int(outside.sum()))
