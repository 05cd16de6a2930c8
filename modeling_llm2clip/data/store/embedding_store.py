"""A dataset's embeddings on disk: what the files are, and reading them.

A store is a folder:

| file | content |
| --- | --- |
| `manifest.json` | what the embeddings are, which model made them, the hashes of all other files |
| `index.arrow` | which rows an item has; names, group ids, languages, hashes of captions |
| `shard-00000.safetensors`, … | tensor `embeddings` (rows, dim) |
| `_complete-00000.json`, … | until the store is complete: the record of a complete shard |

Items are the records of a dataset in its order. A shard has the distinct captions of a range of
them, or images, and only the index says which rows belong to an item. Memory does not grow with the
store: index and shards are mapped. Every file is verified before it is used, once in each process:
manifest and index when the store is opened, a shard when it is first read.

The parts are `store_manifest.py`, `store_index.py` and `store_shards.py`; they are written by
`embedding/embedding_store_writer.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..._suggestions import counted, list_first
from ..key_arrays import Array
from ..sealed_manifest import list_differences
from .store_index import ItemTexts, StoreIndex
from .store_manifest import MANIFEST_FILE, RECORD_GLOB, StoreManifest
from .store_shards import StoreShards

__all__ = ["MANIFEST_FILE", "EmbeddingStore", "Rows"]

Rows = Sequence[int] | np.ndarray[Any, Any] | Tensor


class EmbeddingStore(StoreIndex):
    """Embeddings of a dataset's captions or images, on disk.

    Use `EmbeddingStore.open`. A store can be pickled for worker processes, which open it again and
    know which shards were verified already.

    Attributes:
        folder: Folder of the store.
        manifest: What it holds and which model made it.
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
            ValueError: The folder holds no store, or one of another format, or an incomplete one;
                or files are missing or damaged, all of which are named.
        """
        if check not in ("fast", "full"):
            raise ValueError(f"check must be 'fast' or 'full', got {check!r}.")
        folder = Path(folder)
        manifest = StoreManifest.read(folder)
        if not manifest.complete:
            num_done = len(list(folder.glob(RECORD_GLOB)))
            raise ValueError(
                f"{folder} is not complete: {num_done} of {manifest.num_shards} shards. Run the "
                "same extraction again, or its missing partitions; each continues."
            )
        files = [manifest.index, *manifest.shards]
        manifest.require_intact(folder, files, sizes_only=check == "fast")
        store = cls(folder, manifest)
        if check == "full":
            store._shards.verified.update(range(manifest.num_shards))
        return store

    def __reduce__(self) -> tuple[Callable[..., EmbeddingStore], tuple[Any, ...]]:
        return EmbeddingStore, (self.folder, self.manifest, frozenset(self._shards.verified))

    @property
    def keys(self) -> Array:
        """(N,) int64: a hash of name and language of each item, as `RecordTable.keys`."""
        return np.concatenate([np.empty(0, np.int64), *self.iterate_keys()])

    def iterate_keys(self) -> Iterator[Array]:
        """Yield `keys` in batches, which take no memory."""
        return self.iterate_numbers("key")

    def count_rows(self) -> tuple[Array, Array]:
        """Count the captions of each item; an image counts as a short caption.

        Returns:
            (N,) int32 each: short and long captions.
        """
        short, long = zip(*self.iterate_counts(), strict=True)
        return np.concatenate(short), np.concatenate(long)

    def read(self, rows: Rows, *, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """Read rows, in any order and as often as they are given.

        Args:
            rows: (N,) row numbers of the store.
            dtype: Dtype of the result; None for that in which they are stored, which copies least.

        Returns:
            (N, D) on the CPU.

        Raises:
            ValueError: The store does not have all of these rows, or files with some of them are
                damaged.
        """
        stored = self._shards.read(_to_row_numbers(rows, self.manifest.num_rows))
        embeddings = torch.from_numpy(stored)
        if self.manifest.dtype == "bfloat16":
            embeddings = embeddings.view(torch.bfloat16)
        return embeddings if dtype is None else embeddings.to(dtype)

    def require_fingerprint(self, fingerprint: Mapping[str, str]) -> None:
        """Check that a model is the one that made the store.

        Args:
            fingerprint: Fingerprint of the model, from `fingerprint_text` or `fingerprint_vision`.

        Raises:
            ValueError: Entries differ; both values of each are named.
        """
        if differences := list_differences(self.manifest.fingerprint, fingerprint):
            raise ValueError(
                f"{self.folder} was made by another model or with another configuration: "
                f"{'; '.join(differences)}. Extract it again with this model, or use the model "
                "that made it."
            )


def _to_row_numbers(rows: Rows, num_rows: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    numbers = np.asarray(rows)
    if numbers.size == 0:
        return np.zeros(0, dtype=np.int64)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(
            f"Rows must be a list of integers; got {numbers.dtype} of shape {numbers.shape}."
        )
    if numbers.min() < 0 or numbers.max() >= num_rows:
        bad = numbers[(numbers < 0) | (numbers >= num_rows)]
        raise ValueError(
            f"{counted(bad.size, 'row number')} outside 0 to {num_rows - 1}, among them "
            f"{list_first(bad)}."
        )
    return numbers.astype(np.int64, copy=False)
