"""Truncate and quantize final embeddings, and write Parquet files for vector databases.

The id of a text is its name, language and caption number, as in `beach.jpg#de#0`. The language is
left out if the dataset has only one. The id of an image is its name.

The int8 and binary values equal those of sentence-transformers' `quantize_embeddings`. N is the
number of embeddings, P the dimensions of the model, D the stored dimensions.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from torch import Tensor

from .._suggestions import counted
from ..configs.encoding_config import EmbeddingDtype
from ..data.key_arrays import Array
from .embedding_manifest import EmbeddingManifest
from .input_rows import InputRows
from .sharded_writer import ShardedWriter

# Type of a stored value.
VALUE_TYPES: dict[EmbeddingDtype, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "int8": np.int8,
    "binary": np.int8,
    "ubinary": np.uint8,
}
_STEPS = 255
_BITS = 8


class ParquetWriter(ShardedWriter[EmbeddingManifest]):
    """Writes one process's shards of an output.

    Args:
        folder: Output folder.
        manifest: Manifest of the output.
        rows: Source of the ids and columns.
    """

    stored_dtype = torch.float32

    def __init__(self, folder: Path, manifest: EmbeddingManifest, rows: InputRows) -> None:
        super().__init__(folder, manifest)
        self.rows = rows

    def encode(self, shard: int, embeds: Tensor) -> tuple[bytes, dict[str, Any]]:
        """Return the content of a file, without rows of zeros, which mark undecodable images."""
        table = self.rows.read(self.manifest.inputs_of_shard(shard))
        is_valid = embeds.numpy().any(axis=1)
        skipped = table.column("id").filter(pa.array(~is_valid)).to_pylist()
        kept = truncate_embeddings(embeds.numpy()[is_valid], self.manifest.dim)
        ranges = self.manifest.read_ranges()
        values, num_clipped = convert_embeddings(kept, self.manifest.dtype, ranges=ranges)
        content = self._encode(table.filter(pa.array(is_valid)), values)
        return content, {
            "rows": len(values), "num_clipped": num_clipped, "skipped": tuple(skipped)
        }  # fmt: skip

    def _encode(self, table: pa.Table, values: Array) -> bytes:
        width = count_values(self.manifest.dim, self.manifest.dtype)
        kind = pa.from_numpy_dtype(VALUE_TYPES[self.manifest.dtype])
        flat = pa.array(np.ascontiguousarray(values).reshape(-1), kind)
        table = table.add_column(1, "embedding", pa.FixedSizeListArray.from_arrays(flat, width))
        table = table.replace_schema_metadata(self.manifest.make_metadata())
        sink = io.BytesIO()
        # Embeddings look like random bits, so dictionaries and compression only cost time.
        pq.write_table(
            table,
            sink,
            row_group_size=max(1, table.num_rows),
            use_dictionary=False,
            compression="none",
            write_statistics=["id"],
            write_page_checksum=True,
        )
        return sink.getvalue()


def count_values(dim: int, dtype: EmbeddingDtype) -> int:
    """Return the number of values per embedding; a binary value packs eight dimensions."""
    if dtype not in ("binary", "ubinary"):
        return dim
    if dim % _BITS:
        raise ValueError(
            f"dtype={dtype!r} packs eight dimensions into a byte, but {dim} is not a multiple of "
            f"eight. Set truncate_dim={dim // _BITS * _BITS}, or choose another dtype."
        )
    return dim // _BITS


def truncate_embeddings(embeds: Array, dim: int) -> Array:
    """Keep the first dimensions of (N, P) embeddings and renormalize."""
    if dim == embeds.shape[1]:
        return embeds
    kept = embeds[:, :dim]
    lengths = np.linalg.norm(kept, axis=1, keepdims=True)
    if not lengths.all():
        count = int((lengths == 0).sum())
        raise ValueError(
            f"truncate_dim={dim}: {counted(count, 'embedding')} would be all zeros. Choose a "
            "larger one."
        )
    return (kept / lengths).astype(np.float32)  # type: ignore[no-any-return]


def measure_ranges(embeds: Array) -> Array:
    """Return the smallest and largest value per dimension of (N, D) embeddings, as (2, D)."""
    return np.stack([embeds.min(axis=0), embeds.max(axis=0)])


def convert_embeddings(
    embeds: Array, dtype: EmbeddingDtype, *, ranges: Array | None = None
) -> tuple[Array, int]:
    """Convert embeddings to the stored dtype; int8 needs `ranges`.

    Returns the values, (N, D), and how many were clipped to the int8 ranges.
    """
    if dtype == "int8":
        assert ranges is not None
        steps = (ranges[1] - ranges[0]) / _STEPS
        steps = np.where(steps == 0, 1, steps)
        levels = np.clip((embeds - ranges[0]) / steps, 0, _STEPS).astype(np.int16)
        outside = (embeds < ranges[0]) | (embeds > ranges[1])
        return (levels - 128).astype(np.int8), int(outside.sum())
    if dtype in ("binary", "ubinary"):
        bits = np.packbits(embeds > 0, axis=-1)
        # The signed dtype stores byte 0 as -128.
        return bits if dtype == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8), 0
    return embeds.astype(VALUE_TYPES[dtype]), 0
