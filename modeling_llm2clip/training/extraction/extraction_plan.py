"""What an extraction computes, the same for captions and images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from ...configs.extract_config import ExtractConfig
from ...data.embedding_store import StoreManifest
from ...data.embedding_store_writer import pack_index
from ...data.records import CaptionedImage

# Rows to compute, and a function that is given the size of each batch; returns (rows, D).
ComputeRows: TypeAlias = Callable[[range, Callable[[int], object]], Tensor]


@dataclass(frozen=True)
class ExtractionPlan:
    """Which embeddings a store will hold, and how they are computed.

    Attributes:
        manifest: Of the complete store, without its shards.
        index: Content of the store's index.
        compute: Computes rows; the same embeddings whatever was computed before.
        unit: What is counted while rows are computed.
        sizes: Units of each row; None for one each.
    """

    manifest: StoreManifest
    index: bytes
    compute: ComputeRows
    unit: str
    sizes: Sequence[int] | None = None


def pack_records(
    records: Sequence[CaptionedImage],
    *,
    short: Sequence[Sequence[int]],
    long: Sequence[Sequence[int]],
) -> bytes:
    """Make the content of an index in which item i is record i.

    Args:
        records: The dataset.
        short: Rows of each record's captions, or of its image.
        long: Rows of each record's long captions.
    """
    return pack_index(
        {
            "names": [r.name for r in records],
            "group_ids": [r.group_id for r in records],
            "langs": [r.lang for r in records],
        },
        {"short": short, "long": long},
    )


def make_manifest(
    content: str,
    config: ExtractConfig,
    index: bytes,
    *,
    fingerprint: dict[str, str],
    dim: int,
    num_rows: int,
    num_items: int,
    plan: dict[str, str],
    counts: dict[str, int],
) -> StoreManifest:
    """Make the manifest of a store that is not begun.

    Args:
        content: caption_embeds or vision_embeds.
        config: Options of the extraction.
        index: Content of the store's index.
        fingerprint: Of the tower that makes the embeddings.
        dim: Width of an embedding.
        num_rows: Number of embeddings.
        num_items: Number of records.
        plan: What else decides the bytes.
        counts: Numbers for the user.
    """
    return StoreManifest(
        content=content,
        fingerprint=fingerprint,
        dtype=config.store_dtype,
        dim=dim,
        num_rows=num_rows,
        num_items=num_items,
        rows_per_shard=config.rows_per_shard,
        plan=plan,
        counts=counts,
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )
