"""How far two computations of one vector may lie apart."""

from __future__ import annotations

import torch
from torch import Tensor

# Distances of unit vectors. One machine, another order of sums: rounding errors of one unit in the
# last place (1e-7, 1e-3, 8e-3) that grow over tens of layers.
_SAME_MACHINE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Another machine also has other kernels, and resizes pictures with another library version.
_OTHER_MACHINE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def find_tolerance(dtype: torch.dtype, *, other_machine: bool = False) -> float:
    """Return the largest harmless distance between unit vectors computed in `dtype`."""
    table = _OTHER_MACHINE if other_machine else _SAME_MACHINE
    return table.get(dtype, table[torch.float32])


def measure_distances(first: Tensor, second: Tensor) -> Tensor:
    """Return the distance of each row of (B, P) from its partner, (B,); NaN counts as infinite."""
    distances: Tensor = (first.float() - second.float()).norm(dim=1).nan_to_num(nan=torch.inf)
    return distances
