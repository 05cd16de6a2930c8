"""What an extraction computes, the same for captions and images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...configs.extract_config import ExtractConfig
from ...data.captions.caption_columns import FirstOccurrences
from ...data.store.embedding_store_writer import EmbeddingStoreWriter, StoreItems, plan_manifest
from ...data.store.store_index import StoreIndex
from ...data.store.store_manifest import STORED_DTYPES, StoreManifest
from ...scheduling.shard_computation import Prepare


@dataclass(frozen=True)
class ExtractionPlan:
    """Which embeddings a store will hold, and how they are computed.

    Attributes:
        manifest: Of a store whose items are not known.
        list_items: Makes the items, with an empty folder for temporary files.
        open_shards: Takes the store that is begun; returns what prepares a shard, given its rows.
        unit: What is counted.
    """

    manifest: StoreManifest
    list_items: Callable[[Path], StoreItems]
    open_shards: Callable[[EmbeddingStoreWriter], Prepare]
    unit: str


def plan_store(
    content: str,
    config: ExtractConfig,
    *,
    fingerprint: dict[str, str],
    dim: int,
    plan: dict[str, str],
) -> StoreManifest:
    """Make the manifest of a store whose items are not known yet.

    Args:
        content: caption_embeds or vision_embeds.
        config: Options of the extraction.
        fingerprint: Of the tower that makes the embeddings.
        dim: Width of an embedding.
        plan: What else decides the bytes.
    """
    row_bytes = dim * np.dtype(STORED_DTYPES[config.store_dtype][1]).itemsize
    return plan_manifest(
        content,
        fingerprint=fingerprint,
        dtype=config.store_dtype,
        dim=dim,
        rows_per_shard=config.count_rows_per_shard(row_bytes),
        plan=plan,
    )


def find_first_occurrences(writer: EmbeddingStoreWriter) -> FirstOccurrences:
    """Find where each row of a store that is begun occurs first.

    Args:
        writer: Of the store.
    """
    manifest = writer.manifest
    index = StoreIndex(writer.folder, manifest.index, manifest.num_items)
    return FirstOccurrences(index, manifest.rows_per_shard)
