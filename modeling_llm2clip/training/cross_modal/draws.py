"""Which pictures a step sees, and which caption of each: functions of the seed alone.

Nothing is remembered between steps and no generator is shared, so a run that is resumed, or has
another number of workers or processes, draws the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

_WORD = (1 << 64) - 1


class RunBatches(Sampler[list[tuple[int, int]]]):
    """The batches of a whole run, as one process sees them: lists of (epoch, item).

    Every epoch has its own order of all items, and leaves out those that do not fill a batch.

    Args:
        batch_size: over all processes; divisible by their number.
        num_steps: batches of the run.
    """

    def __init__(
        self,
        num_items: int,
        *,
        batch_size: int,
        num_steps: int,
        seed: int,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.num_items = num_items
        self.batch_size = batch_size
        self.num_steps = num_steps
        self.seed = seed
        self.rank = rank
        self.num_processes = num_processes

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass over the items."""
        return self.num_items // self.batch_size

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        own_size = self.batch_size // self.num_processes
        order = torch.empty(0)
        for step in range(self.num_steps):
            epoch, number = divmod(step, self.steps_per_epoch)
            if number == 0:
                generator = torch.Generator().manual_seed(mix(self.seed, epoch) >> 1)
                order = torch.randperm(self.num_items, generator=generator)
            start = number * self.batch_size + self.rank * own_size
            yield [(epoch, int(item)) for item in order[start : start + own_size]]


def draw_caption(
    num_short: int, num_long: int, *, long_share: float, seed: int, epoch: int, item: int
) -> tuple[bool, int]:
    """Draw one caption of an item: whether a long one, and its number among its kind.

    Args:
        long_share: probability of a long caption where both kinds exist.
    """
    is_long = num_short == 0 or (num_long > 0 and draw(seed, epoch, item, 0) < long_share)
    return is_long, int(draw(seed, epoch, item, 1) * (num_long if is_long else num_short))


def draw(*numbers: int) -> float:
    """A number in [0, 1), even and independent for each combination of whole numbers."""
    return (mix(*numbers) >> 11) / (1 << 53)


def mix(*numbers: int) -> int:
    """Mix whole numbers into one of 64 bits (splitmix64, doi:10.1145/2660193.2660195)."""
    state = 0
    for number in numbers:
        state = (state ^ (number & _WORD)) + 0x9E3779B97F4A7C15 & _WORD
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _WORD
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _WORD
        state ^= state >> 31
    return state
