"""Write an embedding store: first the index of items, then the shards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from safetensors.torch import save
from torch import Tensor

from ..data.atomic_files import atomic_file
from ..data.sealed_manifest import record_file
from ..data.store.store_index import SCHEMA
from ..data.store.store_manifest import INDEX_FILE, VISION_EMBEDS, StoreManifest
from .sharded_writer import ShardedWriter, begin_output, explain_full_output


class StoreWriter(ShardedWriter[StoreManifest]):
    """Writes one process's shards of a store."""

    verifies_on_read = True

    @property
    def stored_dtype(self) -> torch.dtype:
        return getattr(torch, self.manifest.dtype)  # type: ignore[no-any-return]

    def encode(self, shard: int, embeds: Tensor) -> tuple[bytes, dict[str, Any]]:  # noqa: ARG002
        return save({"embeddings": embeds}), {"rows": len(embeds)}


def begin_store(folder: Path, planned: StoreManifest, batches: Iterable[pa.RecordBatch]) -> None:
    """Write a store's index from batches made by `make_batch`, then the store's manifest."""
    num_rows = num_items = num_texts = 0
    with (
        explain_full_output(folder, "its index"),
        atomic_file(folder / INDEX_FILE, replaces=True) as file,
        pa.ipc.new_file(file, SCHEMA) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)
            rows = np.asarray(batch.column("rows").values)
            num_rows = max(num_rows, int(rows.max(initial=-1)) + 1)
            num_items += len(batch)
            num_texts += len(rows)
    begun = replace(
        planned,
        num_inputs=num_rows if planned.content == VISION_EMBEDS else num_texts,
        num_rows=num_rows,
        num_items=num_items,
        index=record_file(folder, INDEX_FILE),
    )
    begin_output(folder, begun)
