"""Read rows of an embedding store for training, checking each once, or keep all on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ...data.key_arrays import Array
from ...data.store.embedding_store import EmbeddingStore
from ...encoding.devices import count_free_bytes
from .align_checks import have_directions, require_directions

Identify = Callable[[Array], Sequence[tuple[str, ...]]]
"""Maps row numbers within a batch to the names of their records."""
_BYTES_AT_ONCE = 2**26
_SHARE_OF_FREE_MEMORY = 0.5  # the rest is for weights, optimizer state and activations


class StoredRows:
    """Rows of a store, each checked when it is first read.

    Attributes:
        store: The store.
        resident: All rows on the training device in their stored dtype; None if batches read
            their rows from the files.
    """

    def __init__(self, store: EmbeddingStore) -> None:
        self.store = store
        self.resident: Tensor | None = None
        self._is_checked = np.zeros(store.manifest.num_rows, np.bool_)

    def copy_to(self, device: torch.device, *, num_reads: int) -> None:
        """Copy all rows to a device if they fit in half of its free memory.

        Args:
            device: Training device.
            num_reads: Number of rows that training will read. If the store has more rows, nothing
                is copied.
        """
        manifest = self.store.manifest
        num_bytes = manifest.num_rows * manifest.row_bytes
        fits = num_bytes <= _SHARE_OF_FREE_MEMORY * count_free_bytes(device)
        if self.resident is not None or not fits or num_reads < manifest.num_rows:
            return
        num_at_once = max(1, _BYTES_AT_ONCE // manifest.row_bytes)
        for rows in torch.arange(manifest.num_rows).split(num_at_once):
            embeds = self.store.read(rows, dtype=None)
            if self.resident is None:
                shape = (manifest.num_rows, manifest.dim)
                self.resident = torch.empty(shape, dtype=embeds.dtype, device=device)
            self.resident[rows[0] : rows[-1] + 1] = embeds
            # A broken row is refused when a batch contains it, to name its record.
            self._is_checked[rows.numpy()] = have_directions(embeds)

    def read(
        self, rows: Array, identify: Identify, *, dtype: torch.dtype | None = torch.float32
    ) -> Tensor:
        """Read rows, (B, D), like `EmbeddingStore.read`; refuse broken rows on first read."""
        embeds = self.store.read(rows, dtype=dtype)
        new = np.flatnonzero(~self._is_checked[rows])
        if len(new):
            some = embeds if len(new) == len(rows) else embeds[new]
            require_directions(some, self.store, lambda broken: identify(new[broken]))
            self._is_checked[rows] = True
        return embeds

    def require_checked(self, rows: Array, identify: Identify) -> Tensor:
        """Return the numbers of resident rows, (B,) int64; refuse broken rows."""
        if not self._is_checked[rows].all():
            self.read(rows, identify)
        return torch.from_numpy(rows)
