"""The manifest of an output of `embed`: what it holds, which files are complete, and their hashes.

It imports no torch, so that a command can look at an output before it loads anything.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..configs.encoding_config import EmbeddingDtype
from ..data.records.records import Modality
from ..data.store.store_manifest import ShardedManifest, ShardRecord

METADATA_KEY = b"llm2clip"


@dataclass(frozen=True)
class EmbeddingManifest(ShardedManifest):
    """Describes an output of `embed`.

    Attributes:
        modality: `text` or `image`.
        model: What the user named the model.
        fingerprint: Everything of the model that decides an embedding, the prompt included.
        prompt: Prefix and suffix of a text, as text; empty for images.
        dtype: Dtype of the embeddings.
        dim: Dimensions of an embedding; the binary dtypes have eight in a value.
        columns: Columns beside id and embedding.
        num_rows: Rows that were planned, before images are skipped.
        rows_per_shard: Rows of every file but the last.
        plan: What else decides the bytes, including a hash of the data.
        ranges: Smallest and largest value of each dimension; for int8 alone.
    """

    FILE = "_manifest.json"
    VERSION = 2
    CONTENT = "embeddings"
    COMMAND = "embed"
    SHARD_NAME = "embeddings-{:05d}-of-{:05d}.parquet"
    RECORD_NAME = "_complete-{:05d}.json"
    RECORD_GLOB = "_complete-*.json"

    modality: Modality
    model: str
    fingerprint: dict[str, str]
    prompt: str
    dtype: EmbeddingDtype
    dim: int
    columns: tuple[str, ...]
    num_rows: int
    rows_per_shard: int
    plan: dict[str, str]
    ranges: tuple[tuple[float, ...], ...] | None = None
    complete: bool = False
    shards: tuple[ShardRecord, ...] = ()
    format_version: int = VERSION

    def read_ranges(self) -> np.ndarray[Any, Any] | None:
        """Return the int8 ranges, (2, D) float32."""
        return None if self.ranges is None else np.array(self.ranges, np.float32)

    def list_causes(self) -> dict[str, object]:
        """Return everything that decides the bytes of an output."""
        return {
            **self.fingerprint,
            **self.plan,
            "modality": self.modality,
            "embedding dtype": self.dtype,
            "dimensions (truncate_dim)": self.dim,
            "columns": tuple(self.columns),
            "rows": self.num_rows,
            "rows_per_shard": self.rows_per_shard,
        }

    def make_metadata(self) -> dict[bytes, bytes]:
        """Return the metadata of every file."""
        described = {
            "format_version": self.format_version,
            "modality": self.modality,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "prompt": self.prompt,
            "dtype": self.dtype,
            "dim": self.dim,
            "normalized": True,
            "int8_ranges": self.ranges,
        }
        return {METADATA_KEY: json.dumps(described, sort_keys=True).encode()}
