"""Matrix products in full float32, and how far even these are from the truth."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...encoding.float32 import float32_as_such


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Compute float32 products as such: no TF32, no bfloat16, no autocast.

    Both keep 10 bits of a number or fewer, and the settings that choose them hold for the whole
    program; near scores would change places.
    """
    with torch.autocast(device_type, enabled=False), float32_as_such():
        yield


def bound_float32_error(width: int) -> float:
    """How far a float32 cosine of embeddings of this width may be from the exact one.

    Rounding errors of a sum grow with the root of its length with all but certain probability
    (Higham and Mary, 2019, doi:10.1137/18M1226312). Three roots, and four roundings for the
    embeddings themselves; the most that was measured is 1.6 roots, for embeddings that begin with a
    large number (widths 8 to 4,096, tiles of several shapes).
    """
    return (3 * math.sqrt(width) + 4) * 2**-24
