"""Sampling of images, and of a caption for each: a function of seed and step alone.

There is no state between steps and no shared generator, so a run that is resumed, or has another
number of workers or processes, samples the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

_WORD = (1 << 64) - 1


class ResumableBatchSampler(Sampler[list[tuple[int, int]]]):
    """The batches of a whole run, as one process sees them: lists of (epoch, item).

    Every epoch has its own order of all items, and leaves out the last ones, which do not fill a
    batch.

    Args:
        items: Items to sample.
        batch_size: Of all processes together; divisible by their number.
        num_steps: Batches of the run.
        seed: Of the order.
        rank: Number of this process.
        num_processes: Number of processes.
    """

    def __init__(
        self,
        items: Sequence[int],
        *,
        batch_size: int,
        num_steps: int,
        seed: int,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.items = items
        self.batch_size = batch_size
        self.num_steps = num_steps
        self.seed = seed
        self.rank = rank
        self.num_processes = num_processes

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass over the items."""
        return len(self.items) // self.batch_size

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        own_size = self.batch_size // self.num_processes
        order = torch.empty(0, dtype=torch.long)
        for step in range(self.num_steps):
            epoch, number = divmod(step, self.steps_per_epoch)
            if number == 0:
                generator = torch.Generator().manual_seed(_mix(self.seed, epoch) >> 1)
                order = torch.randperm(len(self.items), generator=generator)
            start = number * self.batch_size + self.rank * own_size
            sampled = order[start : start + own_size].tolist()
            yield [(epoch, self.items[number]) for number in sampled]


def sample_caption(
    num_short: int, num_long: int, *, long_caption_ratio: float, seed: int, epoch: int, item: int
) -> tuple[bool, int]:
    """Sample one caption of an item.

    Args:
        num_short: Short captions of the item.
        num_long: Long captions of the item.
        long_caption_ratio: Probability of a long caption where there are both.
        seed: Of the run.
        epoch: Pass over the data.
        item: Number of the item.

    Returns:
        Whether it is a long one, and its number among the long or short ones.
    """
    is_long = num_short == 0 or (
        num_long > 0 and _sample(seed, epoch, item, 0) < long_caption_ratio
    )
    return is_long, int(_sample(seed, epoch, item, 1) * (num_long if is_long else num_short))


def _sample(*numbers: int) -> float:
    """A number in [0, 1), uniform and independent for each combination of integers."""
    return (_mix(*numbers) >> 11) / (1 << 53)


def _mix(*numbers: int) -> int:
    """Mix integers into one of 64 bits (splitmix64, doi:10.1145/2660193.2660195)."""
    state = 0
    for number in numbers:
        state = (state ^ (number & _WORD)) + 0x9E3779B97F4A7C15 & _WORD
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _WORD
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _WORD
        state ^= state >> 31
    return state


def sample_normal(rows: Sequence[tuple[int, ...]], width: int) -> Tensor:
    """Sample standard normal numbers; each row depends on its own integers alone.

    splitmix64 counts through a row, and Box and Muller's method makes two numbers of each word.

    Args:
        rows: Integers that identify each row.
        width: Numbers per row.

    Returns:
        (len(rows), width) float32.
    """
    states = np.array([_mix(*numbers) for numbers in rows], dtype=np.uint64)
    counts = np.arange(1, (width + 1) // 2 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words = states[:, None] + counts  # wraps around, as it should
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    upper = (words >> np.uint64(32)).astype(np.float32)
    lower = (words & np.uint64(0xFFFFFFFF)).astype(np.float32)
    # Above 0, so that the logarithm is finite.
    radius = np.sqrt(-2 * np.log((upper + 1) / np.float32(2**32 + 1)).clip(max=0))
    angle = lower * np.float32(2 * np.pi / 2**32)
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return torch.from_numpy(both[:, :width].copy())
