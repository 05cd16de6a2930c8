"""Tables of text pairs, as sentence-transformers takes them, in files that are mapped.

| column | content |
| --- | --- |
| `group` | integer that pairs of the same meaning share; of captions, the number of their group |
| `anchor`, `positive`, `negative_1`, … | texts |
| `anchor_key`, `positive_key`, `negative_1_key`, … | 64-bit keys of the texts |

The sampler compares integers. Equal keys of different texts only make a row wait for another batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset

from ...data.captions.caption_groups import CaptionGroups, GroupBatch
from ...data.captions.text_pairs import TextPair
from ...data.key_arrays import is_among
from ...data.records.record_columns import hash_text

Array: TypeAlias = np.ndarray[Any, Any]

GROUP_COLUMN = "group"
KEY_SUFFIX = "_key"
_PAIRS_AT_ONCE = 2**14


def write_caption_pairs(
    groups: CaptionGroups, file: Path, *, seed: int, num_pairings: int = 1
) -> None:
    """Split each group's captions into pairs at random, and write them."""
    generator = random.Random(seed)
    schema = _make_schema(num_negatives=0)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for _ in range(num_pairings):
            number = 0
            for batch in groups.iterate_batches():
                pairs = _sample_pairs(batch.counts, generator)
                owners = number + np.repeat(np.arange(len(batch.counts)), (batch.counts + 1) // 2)
                number += len(batch.counts)
                writer.write_batch(_make_batch(schema, batch, owners, pairs))


def write_text_pairs(
    pairs: Iterable[TextPair], file: Path, *, left_out: Array | None = None
) -> tuple[int, int]:
    """Write text pairs without those that have a text that is left out.

    A different text with the same 64-bit key leaves its pair out too: one pair in a billion for
    ten million texts that are left out and a thousand pairs.
    """
    remaining = iter(pairs)
    num_written, num_left_out = 0, 0
    left_out = np.empty(0, np.int64) if left_out is None else left_out
    some = list(islice(remaining, _PAIRS_AT_ONCE))
    schema = _make_schema(num_negatives=len(some[0].negatives) if some else 0)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while some:
            keys = np.array([[hash_text(text) for text in pair.texts] for pair in some], np.int64)
            kept = (~is_among(keys.ravel(), left_out)).reshape(keys.shape).all(axis=1)
            groups = [hash_text(pair.group_id) for pair in some]
            columns = [groups, *zip(*(pair.texts for pair in some), strict=True), *keys.T]
            arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
            batch = pa.RecordBatch.from_arrays(arrays, schema=schema).filter(pa.array(kept))
            if batch.num_rows:
                writer.write_batch(batch)
            num_written += batch.num_rows
            num_left_out += len(some) - batch.num_rows
            some = list(islice(remaining, _PAIRS_AT_ONCE))
    return num_written, num_left_out


def open_table(file: Path) -> Dataset:
    """Map a table, which takes no memory of its own."""
    return Dataset.from_file(str(file))


def list_text_columns(table: Dataset) -> list[str]:
    """List the columns of texts: anchor, positive, negative_1, …."""
    return [
        name
        for name in table.column_names
        if name != GROUP_COLUMN and not name.endswith(KEY_SUFFIX)
    ]


def list_key_columns(table: Dataset) -> list[str]:
    """List the columns of the texts' keys, in the order of the texts."""
    return [name + KEY_SUFFIX for name in list_text_columns(table)]


def iterate_numbers(table: Dataset, name: str) -> Iterator[Array]:
    """Yield a column of integers in pieces, as they are mapped."""
    assert table._indices is None, "rows of this table were selected"
    for chunk in table.data.column(name).chunks:
        yield np.asarray(chunk)


class MappedColumn:
    """A column of integers of a table, whose rows are read as they are asked for."""

    def __init__(self, table: Dataset, name: str) -> None:
        self.pieces = list(iterate_numbers(table, name))
        self._stops = np.cumsum([len(piece) for piece in self.pieces])

    def read(self, rows: Array) -> Array:
        """Read rows."""
        found = np.empty(len(rows), np.int64)
        numbers = np.searchsorted(self._stops, rows, side="right")
        order = np.argsort(numbers, kind="stable")
        starts = np.searchsorted(numbers[order], np.arange(len(self.pieces) + 1))
        for number in np.unique(numbers).tolist():
            places = order[starts[number] : starts[number + 1]]
            piece = self.pieces[number]
            found[places] = piece[rows[places] - (self._stops[number] - len(piece))]
        return found


def _make_schema(*, num_negatives: int) -> pa.Schema:
    texts = ["anchor", "positive", *(f"negative_{n + 1}" for n in range(num_negatives))]
    return pa.schema(
        [
            (GROUP_COLUMN, pa.int64()),
            *((name, pa.string()) for name in texts),
            *((name + KEY_SUFFIX, pa.int64()) for name in texts),
        ]
    )


def _sample_pairs(counts: Array, generator: random.Random) -> Array:
    """Pair captions of the same group, (P, 2) int64 numbers of captions of the batch."""
    numbers: list[int] = []
    start = 0
    for count in counts.tolist():
        order = list(range(start, start + count))
        generator.shuffle(order)
        if count % 2:
            order.append(order[generator.randrange(count - 1)])
        numbers += order
        start += count
    return np.array(numbers, np.int64).reshape(-1, 2)


def _make_batch(
    schema: pa.Schema, batch: GroupBatch, owners: Array, pairs: Array
) -> pa.RecordBatch:
    texts = [batch.take_texts(numbers) for numbers in pairs.T]
    keys = [pa.array(batch.keys[numbers]) for numbers in pairs.T]
    return pa.RecordBatch.from_arrays([pa.array(owners, pa.int64()), *texts, *keys], schema=schema)
