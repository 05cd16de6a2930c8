"""What the LLM is fine-tuned on: text pairs, in batches without false negatives."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from sentence_transformers.base.sampler import (
    DefaultBatchSampler,
    MultiDatasetDefaultBatchSampler,
)
from sentence_transformers.sentence_transformer.data_collator import (
    SentenceTransformerDataCollator,
)

from ...configs.finetune_config import FinetuneConfig
from ...data.caption_groups import (
    CaptionGroup,
    TextPair,
    sample_pairs,
)
from ...data.splits import exclude_texts, hold_out_groups

_GROUP_COLUMN = "group_id"
_MAX_HELD_OUT = 1000


@dataclass(frozen=True)
class FinetuneData:
    """What a run is trained and measured on.

    Attributes:
        tables: Text pairs, as `make_pair_table` makes them: of captions first, then others.
        weights: Batches of each table per batch of the first.
        to_train: Groups whose captions are in the first table.
        held_out: Groups that are measured on.
        counts: Groups on either side, and captions and text pairs that training lost to them.
    """

    tables: DatasetDict
    weights: list[float]
    to_train: list[CaptionGroup]
    held_out: list[CaptionGroup]
    counts: dict[str, int]


def prepare_data(
    groups: Sequence[CaptionGroup],
    text_pairs: Sequence[tuple[list[TextPair], float]],
    config: FinetuneConfig,
) -> FinetuneData:
    """Hold out groups, pair the captions of the others, and leave held-out texts out.

    Args:
        groups: Captions by image.
        text_pairs: Further pairs, and the number of their batches per batch of captions.
        config: Options of the run.

    Raises:
        ValueError: Too few groups, no pairs without a held-out caption, or a table that cannot
            fill a batch.
    """
    num_held_out = count_held_out(len(groups), config)
    to_train, held_out, num_lost = hold_out_groups(groups, num_held_out, seed=config.seed)
    pairs = sample_pairs(to_train, seed=config.seed, num_pairings=config.num_pairings)
    tables = DatasetDict(captions=make_pair_table(pairs))
    num_pairs_lost = 0
    for number, (others, _) in enumerate(text_pairs, start=1):
        kept, lost = exclude_texts(others, held_out)
        if not kept:
            raise ValueError(
                f"All {lost} pairs of number {number} of text_pairs have a caption of the "
                f"{len(held_out)} held-out images. Hold out fewer images (num_held_out), or leave "
                "this file out (text_pairs)."
            )
        num_pairs_lost += lost
        tables[f"pairs_{number}"] = make_pair_table(kept)
    batch_size = config.per_device_train_batch_size
    for table in tables.values():  # raises now for a table that cannot fill a batch
        next(iter(NoDuplicateGroupsBatchSampler(table, batch_size, drop_last=True)))
    counts = {
        "num_held_out": len(held_out),
        "num_trained": len(to_train),
        "num_captions_lost": num_lost,
        "num_text_pairs_lost": num_pairs_lost,
    }
    weights = [1.0, *(weight for _, weight in text_pairs)]
    return FinetuneData(tables, weights, to_train, held_out, counts)


def count_held_out(num_groups: int, config: FinetuneConfig) -> int:
    """Count the groups that a run measures on, and does not train on.

    Args:
        num_groups: All groups.
        config: Options of the run.
    """
    if config.num_held_out is not None:
        return config.num_held_out
    return min(_MAX_HELD_OUT, max(2, num_groups // 5))


def list_texts(data: FinetuneData) -> list[str]:
    """List all different texts that a run trains and measures on.

    Args:
        data: From `prepare_data`.
    """
    texts = {text for group in (*data.to_train, *data.held_out) for text in group.captions}
    for table in data.tables.values():
        for name in set(table.column_names) - {_GROUP_COLUMN}:
            texts.update(table[name][:])
    return [*texts]


def make_pair_table(pairs: Sequence[TextPair]) -> Dataset:
    """Make a table as sentence-transformers takes it.

    Args:
        pairs: At least one; equally many negatives in each.

    Returns:
        Columns group_id, anchor, positive, negative_1, ….
    """
    columns: dict[str, list[str]] = {
        _GROUP_COLUMN: [pair.group_id for pair in pairs],
        "anchor": [pair.anchor for pair in pairs],
        "positive": [pair.positive for pair in pairs],
    }
    for number in range(len(pairs[0].negatives)):
        columns[f"negative_{number + 1}"] = [pair.negatives[number] for pair in pairs]
    return Dataset.from_dict(columns)


class PairCollator(SentenceTransformerDataCollator):  # type: ignore[misc]
    """Leaves the group id out, which the sampler needs and the model does not."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Tokenize the texts of some rows, column by column.

        Args:
            features: Rows of a table of `make_pair_table`.
        """
        return super().__call__(  # type: ignore[no-any-return]
            [{k: v for k, v in row.items() if k != _GROUP_COLUMN} for row in features]
        )


class NoDuplicateGroupsBatchSampler(DefaultBatchSampler):  # type: ignore[misc]
    """Samples batches in which each group, and each text, occurs once over all processes.

    After sentence-transformers' `NoDuplicatesBatchSampler`. A batch of all processes is
    `num_processes` successive batches: accelerate deals them out in turn. A row that would repeat
    a group or a text waits for a later batch. Every epoch has equally many batches, `len(dataset)`
    divided by the size of a batch of all processes; a short rest is filled from the next shuffle.

    Args:
        dataset: Table of `make_pair_table`.
        batch_size: Rows per batch of one process.
        nearest: Nearest groups of each group, for hard batches: a row is then followed by a row of
            each of `num_hard_negatives` random ones of them, as long as these have rows left in
            this shuffle.
        num_hard_negatives: How many groups follow; 0 samples at random.
        **options: As `DefaultBatchSampler` takes them.

    Raises:
        ValueError: There are too few different groups for one batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        nearest: Mapping[str, Sequence[str]] | None = None,
        num_hard_negatives: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(dataset, batch_size, **{**options, "drop_last": True})
        self.nearest, self.num_hard_negatives = nearest or {}, num_hard_negatives
        self.num_processes = PartialState().num_processes
        self.window_size = batch_size * self.num_processes
        columns = [dataset[name][:] for name in dataset.column_names if name != _GROUP_COLUMN]
        self.texts_of_row = [set(texts) for texts in zip(*columns, strict=True)]
        self.group_id_of_row = dataset[_GROUP_COLUMN][:]
        num_groups = len(set(self.group_id_of_row))
        if num_groups < self.window_size:
            raise ValueError(
                f"{num_groups} different images are too few for a batch of {batch_size} on "
                f"{self.num_processes} processes, in which each may occur once. Lower "
                "per_device_train_batch_size."
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
            hard = self.num_hard_negatives
            yield from self._order_by_nearest(shuffled, generator) if hard else shuffled

    def _order_by_nearest(self, shuffled: list[int], generator: torch.Generator) -> Iterator[int]:
        """Every row once, each followed by rows of its nearest groups that are left."""
        left: dict[str, list[int]] = {}
        for row in shuffled:
            left.setdefault(self.group_id_of_row[row], []).append(row)
        for row in shuffled:
            group_id = self.group_id_of_row[row]
            if row not in left[group_id]:
                continue
            left[group_id].remove(row)
            yield row
            near = [other for other in self.nearest.get(group_id, ()) if left.get(other)]
            order = torch.randperm(len(near), generator=generator).tolist()
            yield from (left[near[i]].pop() for i in order[: self.num_hard_negatives])

    def _fill(self, rows: Iterator[int], waiting: deque[int]) -> list[int]:
        window: list[int] = []
        group_ids: set[str] = set()
        texts: set[str] = set()
        num_refused, max_refused = 0, 2 * len(self.group_id_of_row) + len(waiting)
        earlier = deque(waiting)
        waiting.clear()
        while len(window) < self.window_size:
            row = earlier.popleft() if earlier else next(rows)
            if self.group_id_of_row[row] in group_ids or texts & self.texts_of_row[row]:
                waiting.append(row)
                num_refused += 1
                if num_refused > max_refused:
                    raise ValueError(
                        f"No batch of {self.window_size} without a repeated image or text exists: "
                        f"only {len(window)} rows fit. Lower per_device_train_batch_size."
                    )
                continue
            window.append(row)
            group_ids.add(self.group_id_of_row[row])
            texts |= self.texts_of_row[row]
        waiting.extendleft(reversed(earlier))
        return window


class WeightedBatchSampler(MultiDatasetDefaultBatchSampler):  # type: ignore[misc]
    """Mixes tables: a batch of all processes is of one table, in each epoch as often as it weighs.

    Yields the batches of the whole run, so that a resumed run skips the first ones. A table that is
    used up starts again, in a new order.

    Args:
        *args: As `MultiDatasetDefaultBatchSampler` takes them.
        weights: Batches of each table per batch of the first.
        num_steps: Batches of the run, of all processes together.
        **kwargs: As `MultiDatasetDefaultBatchSampler` takes them.
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


def count_steps(lengths: Sequence[int], weights: Sequence[float], window_size: int) -> list[int]:
    """Count the batches of each table in an epoch: all of the first, others by weight.

    Args:
        lengths: Rows of each table.
        weights: Batches of each table per batch of the first; each has at least one.
        window_size: Rows per batch of all processes.
    """
    first = lengths[0] // window_size
    return [max(1, round(first * weight)) for weight in weights]
