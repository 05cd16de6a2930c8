"""What every alignment shares: which parameters decay, and how the learning rate moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


def split_by_decay(
    parameters: Iterable[nn.Parameter], weight_decay: float, **settings: Any
) -> list[dict[str, Any]]:
    """Decay matrices only: not norms, biases and the temperature (arXiv:2103.00020).

    Args:
        settings: of both groups, e.g. `lr`.
    Returns: groups for an optimizer, without empty ones.
    """
    listed = list(parameters)
    groups = [
        {"params": [p for p in listed if p.ndim > 1], "weight_decay": weight_decay, **settings},
        {"params": [p for p in listed if p.ndim <= 1], "weight_decay": 0.0, **settings},
    ]
    return [group for group in groups if group["params"]]


def warm_up_then_cosine(steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at each step: up for a tenth of the steps, down as a cosine."""
    warm_up = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

    return factor
