"""Encodes as at inference, whatever mode the model is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch off dropout, and statistics that batches move, inside; each module gets its mode back.

    A model in training mode would give random vectors, and a tower with batch normalisation would
    learn from the pictures that it encodes.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
