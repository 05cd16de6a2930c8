"""What an extraction computes, the same for captions and images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from ...data.store.embedding_store_writer import EmbeddingStoreWriter, StoreItems
from ...data.store.store_manifest import StoreManifest

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PreparedShard:
    """A shard whose inputs are read, and which may be encoded.

    Attributes:
        batches: Places in the shard of the rows of each batch; they depend on the shard alone.
        encode: Computes some of the batches, in their order: (rows of the batch, D) each.
        num_truncated: How many of its captions are longer than the model reads.
    """

    batches: Sequence[Array]
    encode: Callable[[Sequence[Array]], Iterator[Tensor]]
    num_truncated: int = 0


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
    open_shards: Callable[[EmbeddingStoreWriter], Callable[[range], PreparedShard]]
    unit: str
