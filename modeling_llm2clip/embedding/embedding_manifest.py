"""Describe an output of `embed`: the content, and the complete files with their hashes.

Does not import torch, so a command can inspect an output before it loads anything.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..configs.encoding_config import EmbeddingDtype
from ..data.records.records import Modality
from ..data.store.store_manifest import ShardedManifest

METADATA_KEY = b"llm2clip"


@dataclass(frozen=True, kw_only=True)
class EmbeddingManifest(ShardedManifest):
    """Describes an output of `embed`.

    Attributes:
        modality: `text` or `image`.
        model: Name or path of the model, as the user passed it.
        prompt: Prompt with {text} in place of the caption; empty for images.
        dtype: Dtype of the embeddings; binary dtypes pack eight dimensions into a value.
        columns: Columns besides id and embedding.
        ranges: Smallest and largest value of each embedding dimension; None unless dtype is int8.
    """

    FILE = "_manifest.json"
    VERSION = 3
    CONTENT = "embeddings"
    COMMAND = "embed"
    SHARD_NAME = "embeddings-{:05d}-of-{:05d}.parquet"

    modality: Modality
    model: str
    prompt: str
    dtype: EmbeddingDtype
    columns: tuple[str, ...]
    ranges: tuple[tuple[float, ...], ...] | None = None
    format_version: int = VERSION

    def read_ranges(self) -> np.ndarray[Any, Any] | None:
        """Return the int8 ranges, (2, D) float32."""
        return None if self.ranges is None else np.array(self.ranges, np.float32)

    def list_causes(self) -> dict[str, object]:
        """Return everything that determines the bytes of an output."""
        return {
            **super().list_causes(),
            "modality": self.modality,
            "columns": self.columns,
            "rows": self.num_inputs,
        }

    def make_metadata(self) -> dict[bytes, bytes]:
        """Return the schema metadata that every file gets."""
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
