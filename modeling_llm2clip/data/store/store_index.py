"""The index of an embedding store: the rows of each item, in an Arrow file.

| column | content |
| --- | --- |
| `name`, `group_id`, `lang` | from the record; name and language together identify an item |
| `key`, `group_key` | hashes of name and language, and of the group id, as in a `RecordTable` |
| `text_key` | hash of the record's captions, in order, without sentence views |
| `num_short` | number of rows that belong to short captions |
| `rows` | rows of the short captions, then of the long ones; one row for an image |
| `text_keys` | hash of each of these captions; equal captions in different shards share it |

The file is memory-mapped. When it is opened, its hash is compared with the hash in the manifest. An
item takes about 100 bytes in addition to its texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from ..key_arrays import Array, group_positions
from ..records.data_hashes import hash_own_texts
from ..records.record_columns import ROWS_PER_BATCH
from .store_manifest import INDEX_FILE, StoreManifest

SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("group_id", pa.string()),
        ("lang", pa.string()),
        ("key", pa.int64()),
        ("group_key", pa.int64()),
        ("text_key", pa.int64()),
        ("num_short", pa.int32()),
        ("rows", pa.list_(pa.int64())),
        ("text_keys", pa.list_(pa.int64())),
    ]
)


class ItemTexts(Sequence[str]):
    """One text per item, read from a column of an index on access."""

    def __init__(self, index: StoreIndex, column: str) -> None:
        self._index = index
        self._column = column

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, item: int) -> str: ...
    @overload
    def __getitem__(self, item: slice) -> list[str]: ...
    def __getitem__(self, item: int | slice) -> str | list[str]:
        if isinstance(item, slice):
            return [self[i] for i in range(*item.indices(len(self)))]
        batch, row = self._index.locate(item)
        text: str = self._index.batch(batch).column(self._column)[row].as_py()
        return text

    def __iter__(self) -> Iterator[str]:
        for batch in self._index.iterate_batches():
            yield from batch.column(self._column).to_pylist()


class StoreIndex:
    """The items of a store, complete or not, and their rows.

    Args:
        folder: Folder of the store.
        manifest: Its manifest.
        verified: Whether the parent process has already verified the index file.

    Raises:
        ValueError: The index file is missing or damaged, or does not contain all of the store's
            items.
    """

    def __init__(self, folder: Path, manifest: StoreManifest, *, verified: bool = False) -> None:
        self._length = manifest.num_items
        manifest.require_intact(folder, [manifest.index], sizes_only=verified)
        # Unlike Python's mmap, Arrow's does not keep the file open.
        with pa.memory_map(str(folder / INDEX_FILE)) as mapped:
            self._reader = pa.ipc.open_file(pa.BufferReader(mapped.read_buffer()))
        if self._reader.num_record_batches != -(-self._length // ROWS_PER_BATCH):
            raise ValueError(f"{INDEX_FILE}: it does not contain the store's {self._length} items.")
        self._batches: dict[int, pa.RecordBatch] = {}
        self._lists: dict[tuple[str, int], tuple[Array, Array]] = {}

    def __len__(self) -> int:
        return self._length

    def iterate_batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the items in batches of `ROWS_PER_BATCH`."""
        yield from map(self.batch, range(self._reader.num_record_batches))

    def iterate_numbers(self, column: str) -> Iterator[Array]:
        """Yield a column of numbers, such as `key`, in batches of `ROWS_PER_BATCH`."""
        for batch in self.iterate_batches():
            yield np.asarray(batch.column(column))

    def iterate_counts(self) -> Iterator[tuple[Array, Array]]:
        """Yield the number of short and of long captions of each item, in batches."""
        for number, short in enumerate(self.iterate_numbers("num_short")):
            ends, _ = self._read_lists("rows", number)
            yield short, (np.diff(ends) - short).astype(short.dtype)

    def locate(self, item: int) -> tuple[int, int]:
        """Return the batch that contains an item, and the item's position in the batch."""
        if not -self._length <= item < self._length:
            raise IndexError(f"There is no item {item}: the store has {self._length}.")
        return divmod(int(item) % self._length, ROWS_PER_BATCH)

    def rows_of(self, item: int, *, long: bool = False) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the rows of an item's short or long captions, or the one row of an image.

        Args:
            item: Number of the item; negative numbers count from the end.
            long: Return the rows of the long captions instead of the short ones; none for an image.

        Returns:
            (captions,) int64, in the order of the record's captions.

        Raises:
            IndexError: There is no such item.
        """
        number, position = self.locate(item)
        ends, rows = self._read_lists("rows", number)
        num_short = self.batch(number).column("num_short")[position].as_py()
        start, stop = int(ends[position]), int(ends[position + 1])
        middle = start + num_short
        return np.array(rows[middle:stop] if long else rows[start:middle])

    def rows_at(self, items: Array, numbers: Array) -> Array:
        """Return, for each item, the row of one caption.

        Args:
            items: (M,) item numbers, from 0, in any order.
            numbers: (M,) caption numbers within each item, where short captions come before long
                captions; 0 for an image.

        Returns:
            (M,) int64.

        Raises:
            IndexError: There is no such item, or the item has no such caption.
        """
        return self._read_at("rows", np.asarray(items), np.asarray(numbers))

    def text_keys_at(self, items: Array, numbers: Array) -> Array:
        """Return, for each item, the hash of one caption.

        Args:
            items: (M,) item numbers, as in `rows_at`.
            numbers: (M,) caption numbers within each item.

        Returns:
            (M,) int64; equal captions have equal hashes.

        Raises:
            IndexError: There is no such item, or the item has no such caption.
        """
        return self._read_at("text_keys", np.asarray(items), np.asarray(numbers))

    def read_text_keys(self, num_rows: int) -> Array:
        """Read the hash of each row's caption, (num_rows,) int64."""
        keys = np.empty(num_rows, np.int64)
        for number in range(self._reader.num_record_batches):
            _, rows = self._read_lists("rows", number)
            keys[rows] = self._read_lists("text_keys", number)[1]
        return keys

    def _read_at(self, column: str, items: Array, numbers: Array) -> Array:
        values = np.empty(len(items), np.int64)
        if bad := items[(items < 0) | (items >= self._length)][:1].tolist():
            raise IndexError(f"There is no item {bad[0]}: the store has {self._length}.")
        for batch, positions in group_positions(items // ROWS_PER_BATCH):
            ends, listed = self._read_lists(column, batch)
            within = items[positions] - batch * ROWS_PER_BATCH
            start, chosen = ends[within].astype(np.int64), numbers[positions]
            lacking = (chosen < 0) | (start + chosen >= ends[within + 1])
            if lacking.any():
                first = positions[lacking.argmax()]
                raise IndexError(
                    f"Item {items[first]} has no caption {numbers[first]} (counted from 0), "
                    f"because it has only {np.diff(ends)[within][lacking.argmax()]}."
                )
            values[positions] = listed[start + chosen]
        return values

    def batch(self, number: int) -> pa.RecordBatch:
        if number not in self._batches:
            self._batches[number] = self._reader.get_batch(number)
        return self._batches[number]

    def _read_lists(self, column: str, number: int) -> tuple[Array, Array]:
        """Return the offsets of a batch's lists in a column, and the lists' concatenated values."""
        if (column, number) not in self._lists:
            lists = self.batch(number).column(column)
            self._lists[column, number] = np.asarray(lists.offsets), np.asarray(lists.values)
        return self._lists[column, number]


def make_batch(
    records: pa.RecordBatch,
    num_short: Array,
    ends: Array,
    rows: Array,
    text_keys: pa.ListArray | None = None,
) -> pa.RecordBatch:
    """Make a batch of an index; `text_keys` has the hash of each row, including sentence views."""
    own_keys = pa.array(hash_own_texts(records.column("text_keys"), num_short))
    lists = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(rows, pa.int64()))
    columns = [records.column(name) for name in SCHEMA.names[:5]]
    if text_keys is None:  # images
        text_keys = pa.nulls(len(records), SCHEMA.field("text_keys").type)
    return pa.RecordBatch.from_arrays(
        [*columns, own_keys, pa.array(num_short, pa.int32()), lists, text_keys], schema=SCHEMA
    )
