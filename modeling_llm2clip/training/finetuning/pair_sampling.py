"""Batches of text pairs in which no text is a negative of another text of the same image."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from sentence_transformers.base.sampler import (
    DefaultBatchSampler,
    MultiDatasetDefaultBatchSampler,
)
from sentence_transformers.sentence_transformer.data_collator import (
    SentenceTransformerDataCollator,
)

from ...data.caption_groups import TextPair

GROUP_COLUMN = "group_id"


def make_pair_table(pairs: Sequence[TextPair]) -> Dataset:
    """Make sentence-transformers' table: group_id, anchor, positive, negative_1, …."""
    columns: dict[str, list[str]] = {
        GROUP_COLUMN: [pair.group_id for pair in pairs],
        "anchor": [pair.anchor for pair in pairs],
        "positive": [pair.positive for pair in pairs],
    }
    for number in range(len(pairs[0].negatives)):
        columns[f"negative_{number + 1}"] = [pair.negatives[number] for pair in pairs]
    return Dataset.from_dict(columns)


class PairCollator(SentenceTransformerDataCollator):  # type: ignore[misc]
    """Leaves the group id out: the sampler needs it, the model does not."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Tokenize the texts of some rows, column by column."""
        return super().__call__(  # type: ignore[no-any-return]
            [{k: v for k, v in row.items() if k != GROUP_COLUMN} for row in features]
        )


class NoDuplicateGroupsBatchSampler(DefaultBatchSampler):  # type: ignore[misc]
    """Draws batches in which each group, and each text, occurs once over all processes.

    A batch of all processes is `num_processes` successive batches: accelerate deals them out in
    turn. A row that would repeat a group or a text waits for a later batch. Every epoch has equally
    many batches, `len(dataset)` divided by the size of a whole batch; what a short rest cannot
    fill is filled from the next shuffle.

    Args:
        alike: nearest groups of each group, where batches are to be hard: a row then comes together
            with a row of each of `num_alike` random ones of them, as long as these have any left
            in this shuffle.
    Raises: ValueError when there are too few different groups for one batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        alike: Mapping[str, Sequence[str]] | None = None,
        num_alike: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(dataset, batch_size, **{**settings, "drop_last": True})
        self.alike, self.num_alike = alike or {}, num_alike
        self.num_processes = PartialState().num_processes
        self.window_size = batch_size * self.num_processes
        columns = [dataset[name][:] for name in dataset.column_names if name != GROUP_COLUMN]
        self.texts_of_row = [set(texts) for texts in zip(*columns, strict=True)]
        self.group_id_of_row = dataset[GROUP_COLUMN][:]
        num_groups = len(set(self.group_id_of_row))
        if num_groups < self.window_size:
            raise ValueError(
                f"{num_groups} different images are too few for a batch of {batch_size} on "
                f"{self.num_processes} processes: each may occur once. Lower the batch size."
            )

    def __len__(self) -> int:
        return int(len(self.group_id_of_row) // self.window_size * self.num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        rows = self._shuffle_forever(generator)
        waiting: deque[int] = deque()
        for _ in range(len(self) // self.num_processes):
            window = self._fill(rows, waiting)
            for start in range(0, self.window_size, self.batch_size):
                yield window[start : start + self.batch_size]

    def _shuffle_forever(self, generator: torch.Generator) -> Iterator[int]:
        while True:
            shuffled = torch.randperm(len(self.group_id_of_row), generator=generator).tolist()
            yield from self._group_alike(shuffled, generator) if self.num_alike else shuffled

    def _group_alike(self, shuffled: list[int], generator: torch.Generator) -> Iterator[int]:
        """Every row once, each followed by rows of its nearest groups that have not been yet."""
        left: dict[str, list[int]] = {}
        for row in shuffled:
            left.setdefault(self.group_id_of_row[row], []).append(row)
        for row in shuffled:
            group_id = self.group_id_of_row[row]
            if row not in left[group_id]:
                continue
            left[group_id].remove(row)
            yield row
            near = [other for other in self.alike.get(group_id, ()) if left.get(other)]
            order = torch.randperm(len(near), generator=generator).tolist()
            yield from (left[near[i]].pop() for i in order[: self.num_alike])

    def _fill(self, rows: Iterator[int], waiting: deque[int]) -> list[int]:
        window: list[int] = []
        group_ids: set[str] = set()
        texts: set[str] = set()
        refused, most_refused = 0, 2 * len(self.group_id_of_row) + len(waiting)
        earlier = deque(waiting)
        waiting.clear()
        while len(window) < self.window_size:
            row = earlier.popleft() if earlier else next(rows)
            if self.group_id_of_row[row] in group_ids or texts & self.texts_of_row[row]:
                waiting.append(row)
                refused += 1
                if refused > most_refused:
                    raise ValueError(
                        f"No batch of {self.window_size} without a repeated image or text can "
                        f"be drawn: only {len(window)} fit. Lower the batch size."
                    )
                continue
            window.append(row)
            group_ids.add(self.group_id_of_row[row])
            texts |= self.texts_of_row[row]
        waiting.extendleft(reversed(earlier))
        return window


class WeightedBatchSampler(MultiDatasetDefaultBatchSampler):  # type: ignore[misc]
    """Mixes tables: a whole batch is always of one table, in each epoch as often as it weighs.

    Yields the batches of the whole run, so that a resumed one goes on by leaving some out. A table
    that is used up starts again, shuffled anew.

    Args:
        weights: batches of each table for one batch of the first.
        num_steps: whole batches of the run.
    """

    def __init__(self, *args: Any, weights: Sequence[float], num_steps: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_processes = PartialState().num_processes
        self.num_steps = num_steps
        lengths = [len(table) for table in self.dataset.datasets]
        self.steps = count_steps(lengths, weights, self.batch_size * self.num_processes)

    def __len__(self) -> int:
        return int(self.num_steps * self.num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        starts = [0]
        for table in self.dataset.datasets:
            starts.append(starts[-1] + len(table))
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


def require_weight(weight: float, of: str) -> None:
    """Raise ValueError for a weight that no share of the batches can have; `of` names its table."""
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(
            f"{of} has the weight {weight}, wanted a finite number above 0. Leave out what is not "
            "to be mixed in."
        )


def count_steps(lengths: Sequence[int], weights: Sequence[float], window_size: int) -> list[int]:
    """Count the whole batches of each table in an epoch: all of the first, others by weight.

    However little it weighs, each has one.
    """
    first = lengths[0] // window_size
    return [max(1, round(first * weight)) for weight in weights]
