"""Numbers for the distinct texts of a dataset, by first occurrence, in bounded memory.

Equal texts get one number, different ones never share one. Texts are first compared within a batch.
What a batch has is then split by hash into partitions on disk, and the texts of a partition, which
fit the memory, are compared with each other. A hash only chooses the partition, so two texts with
the same hash stay two. On disk are temporary files with about the size of all texts; in memory is
one partition at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from ..key_arrays import Array

_TEXTS_PER_PARTITION = 2**19
_MOST_PARTITIONS = 256  # files that are open at once
_NUMBERED_AT_ONCE = 2**20
_SCHEMA = pa.schema([("entry", pa.int64()), ("text", pa.large_string())])


class TextNumbers:
    """Numbers distinct texts: add all, call `number`, and iterate over the numbers in their order.

    Args:
        folder: Empty folder for temporary files, which the caller deletes.
        num_texts: About how many texts will be added.
    """

    def __init__(self, folder: Path, num_texts: int) -> None:
        self._folder = folder
        self.num_texts = self.num_distinct = 0
        count = min(-(-num_texts // _TEXTS_PER_PARTITION), _MOST_PARTITIONS) or 1
        self._partitions = [folder / f"partition-{number}" for number in range(count)]
        self._sinks = [pa.OSFile(str(file), "wb") for file in self._partitions]
        self._writers = [pa.ipc.new_stream(sink, _SCHEMA) for sink in self._sinks]
        self._codes = (folder / "codes").open("wb")
        self._batches: list[tuple[int, int]] = []  # texts, and distinct ones
        self._num_entries = 0
        self._numbers: Array = np.empty(0, np.int64)

    def add(self, texts: pa.Array, keys: Array) -> pa.Array:
        """Add a batch of texts."""
        encoded = texts.dictionary_encode()
        codes, distinct = np.asarray(encoded.indices), encoded.dictionary
        self._codes.write(np.ascontiguousarray(codes, np.int32).tobytes())
        # The first of each: codes count up in the order of first occurrence.
        first = np.empty(len(distinct), np.int64)
        first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)
        count = np.uint64(len(self._partitions))
        partitions = (keys[first].view(np.uint64) >> np.uint64(24)) % count
        entries = np.arange(self._num_entries, self._num_entries + len(distinct))
        order = np.argsort(partitions, kind="stable")
        starts = np.searchsorted(partitions[order], np.arange(len(self._partitions) + 1))
        for number in np.flatnonzero(np.diff(starts)).tolist():
            places = order[starts[number] : starts[number + 1]]
            taken = distinct.take(pa.array(places)).cast(pa.large_string())
            columns = [pa.array(entries[places]), taken]
            self._writers[number].write_batch(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))
        self._batches.append((len(codes), len(distinct)))
        self._num_entries += len(distinct)
        self.num_texts += len(codes)
        return distinct

    def number(self) -> None:
        """Compare the texts of different batches, and number all."""
        for writer, sink in zip(self._writers, self._sinks, strict=True):
            writer.close()
            sink.close()
        self._writers, self._sinks = [], []
        self._codes.close()
        if not self._num_entries:
            return
        file = self._folder / "numbers"
        numbers = np.memmap(file, np.int64, "w+", shape=(self._num_entries,))
        for partition in self._partitions:
            _find_first_entries(partition, numbers)
            partition.unlink()
        for start in range(0, self._num_entries, _NUMBERED_AT_ONCE):
            firsts = np.array(numbers[start : start + _NUMBERED_AT_ONCE])
            is_new = firsts == np.arange(start, start + len(firsts))
            fresh = self.num_distinct + np.cumsum(is_new) - 1
            numbers[start : start + len(firsts)] = fresh
            # What occurred before has its number already, in an earlier place.
            again = np.flatnonzero(~is_new)
            numbers[start + again] = numbers[firsts[again]]
            self.num_distinct += int(is_new.sum())
        self._numbers = numbers

    def __iter__(self) -> Iterator[Array]:
        """Yield the numbers of the texts of each batch, as they were added."""
        entry = 0
        with (self._folder / "codes").open("rb") as opened:
            for num_texts, num_distinct in self._batches:
                codes = np.frombuffer(opened.read(4 * num_texts), np.int32)
                yield np.asarray(self._numbers[entry : entry + num_distinct])[codes]
                entry += num_distinct


def _find_first_entries(partition: Path, firsts: Array) -> None:
    """Write the first entry with the same text for each entry of a partition."""
    with pa.memory_map(str(partition)) as mapped:
        batches = list(pa.ipc.open_stream(mapped))
    if not batches:
        return
    entries = np.concatenate([np.asarray(batch.column("entry")) for batch in batches])
    texts = pa.concat_arrays([batch.column("text") for batch in batches])
    codes = np.asarray(texts.dictionary_encode().indices)
    first = np.empty(codes.max() + 1, np.int64)
    first[codes[::-1]] = entries[::-1]
    firsts[entries] = first[codes]
