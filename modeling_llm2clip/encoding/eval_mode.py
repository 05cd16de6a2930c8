"""Encodes as at inference, whatever mode the model is in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

_lock = threading.Lock()
# Of each model that is encoding: how many passes there are, and what was in training before.
_encoding: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch off dropout, and statistics that batches move, inside; each module gets its mode back.

    A model in training mode would give random embeddings, and a tower with batch normalization
    would learn from the images that it encodes. Of several threads the last one gives the modes
    back.

    Args:
        model: Changed in place.
    """
    with _lock:
        passes, training = _encoding.get(model, (0, []))
        if not passes:
            training = [module for module in model.modules() if module.training]
        for module in training:
            module.training = False
        _encoding[model] = passes + 1, training
    try:
        yield
    finally:
        with _lock:
            passes, training = _encoding.pop(model)
            if passes > 1:
                _encoding[model] = passes - 1, training
            else:
                for module in training:
                    module.training = True
