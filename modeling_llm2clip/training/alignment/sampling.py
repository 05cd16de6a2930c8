"""Sampling of images, and of a caption for each: a function of seed and step alone.

There is no state between steps and no shared generator, so a run that is resumed, or has another
number of workers or processes, samples the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ...data.key_arrays import Array
from ...encoding.devices import runs_ahead

_ROWS_AT_ONCE = 64
# Number of the kept texts for the random generator, beside those of captions and noise.
_KEPT = 4


@dataclass(eq=False)
class ResumableBatchSampler(Sampler[Array]):
    """The batches of a whole run, as one process sees them: (B, 2), epoch and item of each sample.

    Every epoch has its own order of all items, and leaves out the last ones, which do not fill a
    batch.
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

    def __iter__(self) -> Iterator[Array]:
        for step in range(self.num_steps):
            epoch, number = divmod(step, self.steps_per_epoch)
            if number == 0:
                order = self._shuffle(epoch)
            yield self._take(order, epoch, number)

    def read_step(self, step: int) -> Array:
        """Return the batch of a step."""
        epoch, number = divmod(step, self.steps_per_epoch)
        return self._take(self._shuffle(epoch), epoch, number)

    def _take(self, order: Array, epoch: int, number: int) -> Array:
        own_size = self.batch_size // self.num_processes
        start = number * self.batch_size + self.rank * own_size
        items = self.items[order[start : start + own_size]]
        return np.stack([np.full_like(items, epoch), items], axis=1)

    def _shuffle(self, epoch: int) -> Array:
        """Return the order of an epoch, in 4 bytes an item where these are enough."""
        seed = int(mix(self.seed, epoch)) >> 1
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.int32 if len(self.items) < 2**31 else torch.int64
        order: Array = torch.randperm(len(self.items), generator=generator, dtype=dtype).numpy()
        return order


def sample_captions(
    num_short: Array,
    num_long: Array,
    *,
    long_caption_ratio: float,
    seed: int,
    epochs: Array,
    items: Array,
) -> Array:
    """Sample the number of a caption of each item, (B,) int64; short captions come first."""
    wants_long = _sample(seed, epochs, items, 0) < long_caption_ratio
    is_long = (num_short == 0) | ((num_long > 0) & wants_long)
    count = np.where(is_long, num_long, num_short)
    number = (_sample(seed, epochs, items, 1) * count).astype(np.int64)
    return number + np.where(is_long, num_short, 0)


def sample_rows(num_rows: int, most: int, *, seed: int, step: int) -> Tensor:
    """Sample the numbers of different rows for a step, at most so many, in their order."""
    if num_rows <= most:
        return torch.arange(num_rows)
    words = mix(seed, step, np.arange(num_rows), _KEPT)
    return torch.from_numpy(np.sort(np.argpartition(words, most)[:most]))


def seed_rows(seed: int, epochs: Array, items: Array, side: int) -> Tensor:
    """Mix the integers of each row into the seed of its noise, (B,) int64."""
    return torch.from_numpy(mix(seed, epochs, items, side).view(np.int64))


def sample_normal(seeds: Tensor, *, width: int) -> Tensor:
    """Sample standard normal numbers, (B, width) float32, on the device of the seeds.

    Each row depends on its own seed alone, and has the same numbers on every device.
    """
    if runs_ahead(seeds.device):
        return _sample_on_device(seeds, width)
    # splitmix64 counts through a row, and each quarter of a word chooses one of the quantiles.
    states = seeds.numpy().view(np.uint64)
    counts = np.arange(1, -(-width // 4) + 1, dtype=np.uint64) * _GOLDEN
    normal = np.empty((len(states), width), np.float32)
    for start in range(0, len(states), _ROWS_AT_ONCE):  # few enough for a core's cache
        rows = slice(start, start + _ROWS_AT_ONCE)
        quarters = _scramble(states[rows, None] + counts).view(np.uint16)[:, :width]
        # No quarter is out of bounds; the default mode would check it, and copy the result.
        np.take(_quantiles(), quarters, out=normal[rows], mode="clip")
    return torch.from_numpy(normal)


def _sample_on_device(seeds: Tensor, width: int) -> Tensor:
    """Sample as NumPy does, in words of int64, since torch shifts no unsigned ones."""
    counts = torch.arange(1, -(-width // 4) + 1, device=seeds.device)
    words = seeds[:, None] + counts * _as_signed(_GOLDEN)
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        words = _fold(words, shift) * _as_signed(factor)
    words = _fold(words, _SHIFTS[-1])
    quarters = words.view(torch.int16)[:, :width].int() & 0xFFFF
    return _quantiles_on(seeds.device).index_select(0, quarters.flatten()).view(len(seeds), width)


@cache
def _quantiles() -> Array:
    """Compute the normal number amid each of 65,536 equal shares of probability, float32."""
    middles = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    quantiles: Array = torch.special.ndtri(middles).float().numpy()
    return quantiles


@cache
def _quantiles_on(device: torch.device) -> Tensor:
    return torch.from_numpy(_quantiles()).to(device)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SHIFTS = (30, 27, 31)
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def _as_signed(word: np.uint64) -> int:
    return int(word.view(np.int64))


def _fold(words: Tensor, shift: int) -> Tensor:
    """Mix the high bits of words into the low ones, without the sign, which fills shifted bits."""
    folded: Tensor = words ^ ((words >> shift) & (2 ** (64 - shift) - 1))
    return folded


def mix(*numbers: int | Array) -> Array:
    """Mix integers, or arrays of them, into 64 bits (splitmix64, doi:10.1145/2660193.2660195)."""
    state: Array = np.zeros((1,), np.uint64)  # of one dimension, since scalars warn where they wrap
    for number in numbers:
        words = np.asarray(number).astype(np.int64).astype(np.uint64)  # negative ones wrap around
        state = _scramble((state ^ words) + _GOLDEN)
    return state if any(np.ndim(number) for number in numbers) else state.reshape(())


def _scramble(words: Array) -> Array:
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        words = (words ^ words >> np.uint64(shift)) * factor
    scrambled: Array = words ^ words >> np.uint64(_SHIFTS[-1])
    return scrambled


def _sample(*numbers: int | Array) -> Array:
    """Draw numbers in [0, 1), uniform and independent for each combination of integers."""
    return (mix(*numbers) >> np.uint64(11)).astype(np.float64) / (1 << 53)
