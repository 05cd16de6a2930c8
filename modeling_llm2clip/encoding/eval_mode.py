"""Refuses to encode with a model in training mode.

Dropout would make its embeddings random, and batch normalization would learn from what it encodes.
Nothing here switches a mode: other threads may encode with the same model, or train it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def require_eval_mode(model: nn.Module) -> Iterator[None]:
    """Require that a whole model is in evaluation mode from the begin to the end of the context.

    Args:
        model: A model of this package, wrapped or not.

    Raises:
        ValueError: A module is in training mode, or another thread called `train()` meanwhile.
    """
    before = _count_switches(model)  # first: what is switched after the look at it counts
    if training := _list_training(model):
        raise ValueError(
            f"The model is in training mode ({len(training)} of its modules are; the first: "
            f"{training[0]!r}), which would make its embeddings random. Call model.eval() before, "
            "and model.train() to go on training."
        )
    yield
    if _list_training(model) or _count_switches(model) != before:
        raise ValueError(
            "The model was switched to training mode while it encoded, so that the embeddings may "
            "be random. Encode with a copy, or while no other thread trains the model."
        )


def _list_training(model: nn.Module) -> list[str]:
    if not any(module.training for module in model.modules()):  # the usual case, without names
        return []
    return [name or type(m).__name__ for name, m in model.named_modules() if m.training]


def _count_switches(model: nn.Module) -> int:
    return int(getattr(model, "num_switches_to_training", 0))
