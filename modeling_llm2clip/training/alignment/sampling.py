"""Sample images and a caption for each, as a function of only the seed and the step.

There is no state between steps and no shared generator, so a resumed run or a run with another
number of workers samples the same images and captions. Noise is generated on the training device
from a seed per step and process, so it differs between devices and numbers of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ...data.key_arrays import Array

# Purposes of seeds, so no two uses share random numbers.
_ORDER, _CAPTIONS, _NOISE, _KEPT = range(4)


class Samples(NamedTuple):
    """A batch of one process, before its data is read.

    Attributes:
        items: (B,) record numbers.
        draws: (B, 2) random numbers in [0, 1) that choose a caption for each record.
        noise_seed: Seed for the noise on stored embeddings.
    """

    items: Array
    draws: Array
    noise_seed: int


def draw_samples(
    items: Array, *batch_id: int, seed: int, rank: int = 0, num_processes: int = 1
) -> Samples:
    """Sample captions for a global batch; return one process's part of the batch.

    Args:
        items: Records of the global batch.
        batch_id: Integers that identify the batch within the run, such as its step.
        seed: Seed of the run.
        rank: Rank of this process.
        num_processes: Number of processes that share the batch.
    """
    size = len(items) // num_processes
    rows = slice(rank * size, (rank + 1) * size)
    generator = torch.Generator().manual_seed(_make_seed(seed, _CAPTIONS, *batch_id))
    draws: Array = torch.rand(len(items), 2, dtype=torch.float64, generator=generator).numpy()
    return Samples(items[rows], draws[rows], _make_seed(seed, _NOISE, *batch_id, rank))


@dataclass(eq=False)
class ResumableBatchSampler(Sampler[Samples]):
    """Yields one process's batches of a whole run.

    Every epoch shuffles all items anew and drops the last items, which do not fill a batch.
    """

    items: Array
    _: KW_ONLY
    batch_size: int
    num_steps: int
    seed: int
    rank: int = 0
    num_processes: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return len(self.items) // self.batch_size

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Samples]:
        for step in range(self.num_steps):
            epoch, number = divmod(step, self.steps_per_epoch)
            if number == 0:
                order = self._shuffle(epoch)
            yield self._take(order, step)

    def read_step(self, step: int) -> Samples:
        return self._take(self._shuffle(step // self.steps_per_epoch), step)

    def _take(self, order: Array, step: int) -> Samples:
        start = step % self.steps_per_epoch * self.batch_size
        items = self.items[order[start : start + self.batch_size]]
        return draw_samples(
            items, step, seed=self.seed, rank=self.rank, num_processes=self.num_processes
        )

    def _shuffle(self, epoch: int) -> Array:
        """Return an epoch's shuffled order, with 4 bytes per item if item numbers fit."""
        generator = torch.Generator().manual_seed(_make_seed(self.seed, _ORDER, epoch))
        dtype = torch.int32 if len(self.items) < 2**31 else torch.int64
        order: Array = torch.randperm(len(self.items), generator=generator, dtype=dtype).numpy()
        return order


def choose_captions(
    num_short: Array, num_long: Array, draws: Array, *, long_caption_ratio: float
) -> Array:
    """Choose a caption number for each item, (B,) int64; short captions are numbered first."""
    is_long = (num_short == 0) | ((num_long > 0) & (draws[:, 0] < long_caption_ratio))
    count = np.where(is_long, num_long, num_short)
    number = (draws[:, 1] * count).astype(np.int64)
    return number + np.where(is_long, num_short, 0)


def sample_rows(num_rows: int, most: int, *, seed: int, step: int) -> Tensor:
    """Sample at most `most` distinct row numbers for a step, sorted."""
    generator = torch.Generator().manual_seed(_make_seed(seed, _KEPT, step))
    return torch.randperm(num_rows, generator=generator)[:most].sort().values


def rank_keys(keys: Array, seed: int) -> Array:
    """Assign each 64-bit hash a random rank, (N,) uint64, that does not depend on other keys."""
    factor = np.random.default_rng(seed).integers(2**63, dtype=np.uint64) * np.uint64(2)
    ranks: Array = keys.astype(np.int64).view(np.uint64) * (factor + np.uint64(1))
    return ranks


def _make_seed(*numbers: int) -> int:
    """Mix non-negative integers into a seed for `torch.Generator`."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
