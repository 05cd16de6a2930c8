"""Reads a dataset's embeddings from disk.

A store is a folder:

| file | content |
| --- | --- |
| `manifest.json` | describes the embeddings and their model, with the hashes of all other files |
| `index.arrow` | the rows of each item; names, group ids, languages, hashes of captions |
| `shard-00000.safetensors`, … | tensor `embeddings` (rows, dim) |
| `_complete-00000.json`, … | until the store is complete: the record of a complete shard |

Items are the records of a dataset, in order. A shard has the distinct captions, or the images, of a
range of items. Only the index knows which rows belong to an item. Memory does not grow with the
store, because index and shards are memory-mapped. Every process verifies each file once before
using it: manifest and index when the store is opened, a shard when it is first read, at about 1 GB
per second and core.

`embedding/store_writer.py` writes the files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from torch import Tensor

from ..._suggestions import counted, list_first
from ..key_arrays import Array, group_positions
from ..sealed_manifest import list_differences
from .store_index import ItemTexts, StoreIndex
from .store_manifest import MANIFEST_FILE, RECORD_GLOB, STORED_DTYPES, StoreManifest

__all__ = ["MANIFEST_FILE", "EmbeddingStore", "Rows"]

Rows = Sequence[int] | np.ndarray[Any, Any] | Tensor


class EmbeddingStore(StoreIndex):
    """Embeddings of a dataset's captions or images, on disk.

    Use `EmbeddingStore.open`. A store can be pickled for worker processes, which reopen the store
    and know which shards are already verified.

    Attributes:
        folder: Folder of the store.
        manifest: Manifest, which describes the embeddings and the model that made them.
        names: One name per item; name and language together identify an item.
        group_ids: One group id per item.
        langs: One language per item.

    Examples:
        >>> store = EmbeddingStore.open("captions")  # a folder that `extract` wrote
        >>> caption_embeds = store.read(store.rows_of(0))  # of the first record
        >>> caption_embeds.shape == (2, store.manifest.dim)
        True
    """

    def __init__(
        self, folder: Path, manifest: StoreManifest, verified: frozenset[int] | None = None
    ) -> None:
        super().__init__(folder, manifest, verified=verified is not None)
        self.folder = folder
        self.manifest = manifest
        self._shards = StoreShards(folder, manifest, verified or ())
        self.names = ItemTexts(self, "name")
        self.group_ids = ItemTexts(self, "group_id")
        self.langs = ItemTexts(self, "lang")

    @classmethod
    def open(cls, folder: str | Path, *, check: Literal["fast", "full"] = "fast") -> EmbeddingStore:
        """Open a complete store.

        Args:
            folder: Folder that `extract` wrote.
            check: `"fast"` verifies the manifest, the index and the sizes of all shards now, and
                each shard when it is first read; `"full"` verifies every byte now.

        Returns:
            The opened store.

        Raises:
            ValueError: The folder has no store, or the store is incomplete or has another format,
                or files are missing or damaged (the message lists all such files).
        """
        if check not in ("fast", "full"):
            raise ValueError(f"check must be 'fast' or 'full', not {check!r}.")
        folder = Path(folder)
        manifest = StoreManifest.read(folder)
        if not manifest.complete:
            num_done = len(list(folder.glob(RECORD_GLOB)))
            raise ValueError(
                f"{folder} is incomplete: it has {num_done} of {manifest.num_shards} shards. Run "
                "the same extraction again, or its missing partitions, to continue."
            )
        files = [manifest.index, *manifest.shards]
        manifest.require_intact(folder, files, sizes_only=check == "fast")
        store = cls(folder, manifest)
        if check == "full":
            store.mark_verified(range(manifest.num_shards))
        return store

    def verify(self) -> frozenset[int]:
        """Verify all shards that are not verified yet; return the numbers of the verified shards.

        Raises:
            ValueError: Shards are missing or damaged; the message lists all of them.
        """
        self._shards.verify(range(self.manifest.num_shards))
        return frozenset(self._shards.verified)

    def mark_verified(self, shards: Collection[int]) -> None:
        """Read these shards without verifying them, because another process has.

        Args:
            shards: Numbers of the shards, from `verify` there.
        """
        self._shards.verified.update(shards)

    def __reduce__(self) -> tuple[Callable[..., EmbeddingStore], tuple[Any, ...]]:
        return EmbeddingStore, (self.folder, self.manifest, frozenset(self._shards.verified))

    @property
    def keys(self) -> Array:
        """(N,) int64: hash of each item's name and language, like `RecordTable.keys`."""
        return np.concatenate([np.empty(0, np.int64), *self.iterate_keys()])

    def iterate_keys(self) -> Iterator[Array]:
        """Yield `keys` in batches, one in memory at a time."""
        return self.iterate_numbers("key")

    def count_rows(self) -> tuple[Array, Array]:
        """Count the captions of each item; an image counts as a short caption.

        Returns:
            Numbers of short and of long captions, (N,) int32 each.
        """
        short, long = zip(*self.iterate_counts(), strict=True)
        return np.concatenate(short), np.concatenate(long)

    def read(self, rows: Rows, *, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """Read rows.

        Args:
            rows: (N,) row numbers of the store, in any order and possibly repeated.
            dtype: Dtype of the result; None for the stored dtype, which needs the fewest copies.

        Returns:
            (N, D) on the CPU.

        Raises:
            ValueError: A row is out of range, or a file that contains one of the rows is damaged.
        """
        stored = self._shards.read(_to_row_numbers(rows, self.manifest.num_rows))
        embeddings = torch.from_numpy(stored)
        if self.manifest.dtype == "bfloat16":
            embeddings = embeddings.view(torch.bfloat16)
        return embeddings if dtype is None else embeddings.to(dtype)

    def require_fingerprint(self, fingerprint: Mapping[str, str]) -> None:
        """Raise ValueError if the store was made with another model.

        Args:
            fingerprint: Fingerprint of the model, from `fingerprint_text` or `fingerprint_vision`.

        Raises:
            ValueError: Entries differ; the message has both values of every entry that differs.
        """
        if differences := list_differences(self.manifest.fingerprint, fingerprint):
            raise ValueError(
                f"{self.folder} was made by another model or with another configuration: "
                f"{'; '.join(differences)}. Extract it again with this model, or use the model "
                "that made it."
            )


class StoreShards:
    """Reads rows of a complete store's shards, and verifies a shard when it is first read.

    Args:
        folder: Folder of the store.
        manifest: Its manifest.
        verified: Numbers of the shards that are already verified.
    """

    def __init__(
        self, folder: Path, manifest: StoreManifest, verified: Collection[int] = ()
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self.verified = set(verified)
        self._views: dict[int, Array] = {}  # (rows, dim) of each mapped shard
        self._first_rows = np.cumsum([0, *(shard.rows for shard in manifest.shards)])

    def read(self, rows: Array) -> Array:
        """Read rows, (N, D) in the stored dtype (bfloat16 as uint16); refuse damaged files."""
        shards = np.searchsorted(self._first_rows, rows, side="right") - 1
        parts = dict(group_positions(shards))
        self.verify(parts)
        embeds = np.empty((len(rows), self._manifest.dim), STORED_DTYPES[self._manifest.dtype])
        for shard, positions in parts.items():
            embeds[positions] = self._map(shard)[rows[positions] - self._first_rows[shard]]
        return embeds

    def verify(self, shards: Iterable[int]) -> None:
        """Verify the given shards, except those that are already verified."""
        if new := set(shards) - self.verified:
            records = [self._manifest.shards[shard] for shard in sorted(new)]
            self._manifest.require_intact(self._folder, records)
            self.verified |= new

    def _map(self, shard: int) -> Array:
        if shard not in self._views:
            record = self._manifest.shards[shard]
            # Unlike Python's mmap, Arrow's does not keep files open; a store may have thousands.
            with pa.memory_map(str(self._folder / record.file)) as mapped:
                buffer = mapped.read_buffer()
            start = record.bytes - record.rows * self._manifest.row_bytes
            view = np.frombuffer(buffer, STORED_DTYPES[self._manifest.dtype], offset=start)
            self._views[shard] = view.reshape(record.rows, self._manifest.dim)
        return self._views[shard]


def _to_row_numbers(rows: Rows, num_rows: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    numbers = np.asarray(rows)
    if numbers.size == 0:
        return np.zeros(0, dtype=np.int64)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(
            f"rows must be a list of integers, not {numbers.dtype} of shape {numbers.shape}."
        )
    if numbers.min() < 0 or numbers.max() >= num_rows:
        bad = numbers[(numbers < 0) | (numbers >= num_rows)]
        raise ValueError(
            f"{counted(bad.size, 'row number')} outside 0 to {num_rows - 1}, including "
            f"{list_first(bad)}."
        )
    return numbers.astype(np.int64, copy=False)
