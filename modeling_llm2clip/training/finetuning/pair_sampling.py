"""Memory-mapped tables of text pairs, and batches from them without false negatives.

| column | content |
| --- | --- |
| `group` | integer shared by all pairs with the same meaning; for captions, their group number |
| `anchor`, `positive`, `negative_1`, … | texts |
| `anchor_key`, `positive_key`, `negative_1_key`, … | 64-bit keys of the texts |

The sampler compares only integers. If two different texts happen to share a key, a row only waits
for a later batch.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from accelerate import PartialState
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler, MultiDatasetDefaultBatchSampler
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

from ..._suggestions import counted
from ...data.captions.caption_groups import CaptionGroups
from ...data.captions.text_pairs import TextPair
from ...data.key_arrays import Array, contains_keys, sort_rows
from ...data.records.record_columns import hash_text

# Row number, group and text keys.
_Row: TypeAlias = tuple[int, int, tuple[int, ...]]

GROUP_COLUMN = "group"
KEY_SUFFIX = "_key"
_PAIRS_AT_ONCE = 2**14


def write_caption_pairs(
    groups: CaptionGroups, file: Path, *, seed: int, num_pairings: int = 1
) -> None:
    """Randomly split each group's captions into pairs, and write them."""
    generator = random.Random(seed)
    schema = _make_schema(num_negatives=0)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for _ in range(num_pairings):
            number = 0
            for batch in groups.iterate_batches():
                sides = _sample_pairs(batch.counts, generator).T
                owners = number + np.repeat(np.arange(len(batch.counts)), (batch.counts + 1) // 2)
                number += len(batch.counts)
                texts = [batch.take_texts(numbers) for numbers in sides]
                columns = [pa.array(owners, pa.int64()), *texts, *map(pa.array, batch.keys[sides])]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))


def write_text_pairs(
    pairs: Iterable[TextPair], file: Path | None, *, left_out: Array | None = None
) -> tuple[int, int]:
    """Write text pairs, except pairs that contain a left-out text; without a file, only count them.

    A pair is also left out if the 64-bit key of one of its texts happens to equal a left-out text's
    key. For ten million left-out texts and a thousand pairs, the chance of this is about one in a
    billion.
    """
    remaining = iter(pairs)
    num_written, num_left_out = 0, 0
    left_out = np.empty(0, np.int64) if left_out is None else left_out
    some = list(islice(remaining, _PAIRS_AT_ONCE))
    schema = _make_schema(num_negatives=len(some[0].negatives) if some else 0)
    sink = pa.MockOutputStream() if file is None else pa.OSFile(str(file), "wb")
    with sink, pa.ipc.new_stream(sink, schema) as writer:
        while some:
            keys = np.array([[hash_text(text) for text in pair.texts] for pair in some], np.int64)
            kept = (~contains_keys(left_out, keys.ravel())).reshape(keys.shape).all(axis=1)
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
    """Memory-map a table without reading it."""
    return Dataset.from_file(str(file))


def list_text_columns(table: Dataset) -> list[str]:
    """List the text columns: anchor, positive, negative_1, …."""
    return [
        name
        for name in table.column_names
        if name != GROUP_COLUMN and not name.endswith(KEY_SUFFIX)
    ]


def list_key_columns(table: Dataset) -> list[str]:
    return [name + KEY_SUFFIX for name in list_text_columns(table)]


def iterate_numbers(table: Dataset, name: str) -> Iterator[Array]:
    """Yield the memory-mapped chunks of an integer column."""
    assert table._indices is None, "the table must not be a selection of rows"
    for chunk in table.data.column(name).chunks:
        yield np.asarray(chunk)


class MappedColumn:
    """An integer column whose rows are read on demand."""

    def __init__(self, table: Dataset, name: str) -> None:
        self.pieces = list(iterate_numbers(table, name))
        self._stops = np.cumsum([len(piece) for piece in self.pieces])

    def read(self, rows: Array) -> Array:
        values = np.empty(len(rows), np.int64)
        numbers = np.searchsorted(self._stops, rows, side="right")
        order = np.argsort(numbers, kind="stable")
        starts = np.searchsorted(numbers[order], np.arange(len(self.pieces) + 1))
        for number in np.unique(numbers).tolist():
            places = order[starts[number] : starts[number + 1]]
            piece = self.pieces[number]
            values[places] = piece[rows[places] - (self._stops[number] - len(piece))]
        return values


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
    """Pair captions of the same group; return the captions' numbers in the batch, (P, 2) int64."""
    numbers: list[int] = []
    start = 0
    for size in counts.tolist():
        order = list(range(start, start + size))
        generator.shuffle(order)
        if size % 2:
            order.append(order[generator.randrange(size - 1)])
        numbers += order
        start += size
    return np.array(numbers, np.int64).reshape(-1, 2)


class PairCollator(SentenceTransformerDataCollator):  # type: ignore[misc]
    """Drops the integer columns, which only the sampler needs."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        return super().__call__(  # type: ignore[no-any-return]
            [
                {k: v for k, v in row.items() if k != GROUP_COLUMN and not k.endswith(KEY_SUFFIX)}
                for row in features
            ]
        )


def require_rows(num_groups: int, batch_size: int) -> None:
    """Raise ValueError if a global batch needs more groups than there are."""
    num_processes = PartialState().num_processes
    if num_groups < batch_size * num_processes:
        raise ValueError(
            f"Too few different images ({num_groups}) for a batch of {batch_size}, in which each "
            f"may occur only once (processes: {num_processes}). Lower per_device_train_batch_size."
        )


class NoDuplicateGroupsBatchSampler(DefaultBatchSampler):  # type: ignore[misc]
    """Samples batches without repeated groups or texts across all processes.

    Based on sentence-transformers' `NoDuplicatesBatchSampler`. A global batch is `num_processes`
    successive batches, which accelerate distributes to the processes in turn. A row that would
    repeat a group or a text waits for a later batch. The number of batches per epoch and process is
    `len(dataset)` divided by the global batch size; a batch that cannot be completed is filled from
    the next shuffle.

    Memory holds only the shuffled order, 4 bytes per row; groups and text keys are read from the
    table.

    With `nearest`, (groups, K) integers, batches contain hard negatives: each row is followed by
    one row from each of `num_hard_negatives` randomly chosen nearest groups that still have unused
    rows.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        nearest: Array | None = None,
        num_hard_negatives: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(dataset, batch_size, **{**options, "drop_last": True})
        self.nearest, self.num_hard_negatives = nearest, num_hard_negatives
        self.num_processes = PartialState().num_processes
        self.window_size = batch_size * self.num_processes
        self.num_rows = len(dataset)
        self.groups = MappedColumn(dataset, GROUP_COLUMN)
        self.keys = [MappedColumn(dataset, name) for name in list_key_columns(dataset)]
        groups: set[int] = set()
        for piece in self.groups.pieces:
            groups.update(np.unique(piece).tolist())
            if len(groups) >= self.window_size:
                break
        require_rows(len(groups), batch_size)

    def __len__(self) -> int:
        return int(self.num_rows // self.window_size * self.num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        rows = self._shuffle_forever(torch.Generator().manual_seed(self.seed + self.epoch))
        waiting: deque[_Row] = deque()
        for _ in range(len(self) // self.num_processes):
            window = self._fill(rows, waiting)
            for start in range(0, self.window_size, self.batch_size):
                yield window[start : start + self.batch_size]

    def _shuffle_forever(self, generator: torch.Generator) -> Iterator[_Row]:
        while True:
            shuffled = _shuffle(self.num_rows, generator)
            if not self.num_hard_negatives:
                for start in range(0, len(shuffled), _PAIRS_AT_ONCE):
                    yield from self._read(shuffled[start : start + _PAIRS_AT_ONCE])
                continue
            ordered = self._order_by_nearest(shuffled, generator)
            while rows := list(islice(ordered, _PAIRS_AT_ONCE)):
                yield from self._read(np.array(rows))

    def _read(self, rows: Array) -> Iterator[_Row]:
        groups = self.groups.read(rows).tolist()
        keys = zip(*(column.read(rows).tolist() for column in self.keys), strict=True)
        yield from zip(rows.tolist(), groups, keys, strict=True)

    def _order_by_nearest(self, shuffled: Array, generator: torch.Generator) -> Iterator[int]:
        """Yield every row once, each row followed by unused rows of its nearest groups."""
        assert self.nearest is not None
        group_of_row = np.concatenate([piece.astype(np.int32) for piece in self.groups.pieces])
        by_group = shuffled[sort_rows(group_of_row[shuffled])]
        # A group's remaining rows are by_group[first[group] : last[group]]. In its own turn, a
        # group yields its first remaining row; as a hard negative of another group, its last
        # remaining row.
        last = np.cumsum(np.bincount(group_of_row), dtype=np.int32)
        first = np.concatenate([last[:1] * 0, last[:-1]])
        for row in shuffled:
            group = group_of_row[row]
            if first[group] == last[group] or by_group[first[group]] != row:
                continue
            first[group] += 1
            yield int(row)
            near = self.nearest[group]
            near = near[first[near] < last[near]]
            order = torch.randperm(len(near), generator=generator)[: self.num_hard_negatives]
            for other in near[order.numpy()].tolist():
                last[other] -= 1
                yield int(by_group[last[other]])

    def _fill(self, rows: Iterator[_Row], waiting: deque[_Row]) -> list[int]:
        window: list[int] = []
        groups: set[int] = set()
        texts: set[int] = set()
        num_refused, max_refused = 0, 2 * self.num_rows + len(waiting)
        earlier = deque(waiting)
        waiting.clear()
        while len(window) < self.window_size:
            row = earlier.popleft() if earlier else next(rows)
            number, group, keys = row
            if group in groups or not texts.isdisjoint(keys):
                waiting.append(row)
                num_refused += 1
                if num_refused > max_refused:
                    raise ValueError(
                        f"No batch of {self.window_size} rows without repeated images or texts is "
                        f"possible: at most {counted(len(window), 'row')} could be combined. Lower "
                        "per_device_train_batch_size."
                    )
                continue
            window.append(number)
            groups.add(group)
            texts.update(keys)
        waiting.extendleft(reversed(earlier))
        return window


class WeightedBatchSampler(MultiDatasetDefaultBatchSampler):  # type: ignore[misc]
    """Mixes tables by weight; each global batch comes from a single table.

    Only the first table, with the captions, gets hard negatives.

    Yields the batches of the whole run, so a resumed run can skip the first batches. An exhausted
    table starts over in a new order. A step is one global batch.
    """

    def __init__(self, *args: Any, weights: Sequence[float], num_steps: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_processes = PartialState().num_processes
        self.num_steps = num_steps
        lengths = [len(table) for table in self.dataset.datasets]
        self.steps = count_table_batches(lengths, weights, self.batch_size * self.num_processes)
        # Nearest groups exist only for the first table, with the captions.
        for sampler in self.batch_samplers[1:]:
            sampler.num_hard_negatives = 0

    def __len__(self) -> int:
        return int(self.num_steps * self.num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        starts = [0, *self.dataset.cumulative_sizes]
        batches = [self._repeat(table) for table in range(len(self.steps))]
        for table in islice(self._order_tables(), self.num_steps):
            for _ in range(self.num_processes):
                yield [row + starts[table] for row in next(batches[table])]

    def _order_tables(self) -> Iterator[int]:
        once = torch.tensor([t for t, number in enumerate(self.steps) for _ in range(number)])
        for epoch in count():
            generator = torch.Generator().manual_seed(self.seed + epoch)
            yield from once[torch.randperm(len(once), generator=generator)].tolist()

    def _repeat(self, table: int) -> Iterator[list[int]]:
        sampler = self.batch_samplers[table]
        for turn in count():
            sampler.set_epoch(turn)
            yield from sampler


def count_table_batches(
    lengths: Sequence[int], weights: Sequence[float], window_size: int
) -> list[int]:
    """Count each table's batches per epoch: the first table in full, other tables by weight."""
    return [max(1, round(lengths[0] // window_size * weight)) for weight in weights]


def _shuffle(number: int, generator: torch.Generator) -> Array:
    """Shuffle the integers below `number`; if it is below two billion, each takes 4 bytes."""
    dtype = torch.int32 if number <= np.iinfo(np.int32).max else torch.int64
    return torch.randperm(number, generator=generator, dtype=dtype).numpy()
