"""Exact float32: switches off TF32, which keeps only 10 bits of the mantissa.

On CUDA, torch uses TF32 for float32 convolutions by default, and programs often enable it for
matrix products as well. Both settings are global.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

# Since torch 2.9, each operation of a backend has its own setting, and reading the old settings can
# raise an error.
_EACH_ALONE = hasattr(torch.backends.cuda.matmul, "fp32_precision")
_lock = threading.Lock()
_passes: list[Sequence[Any]] = []  # the program's settings, once per running pass


@contextmanager
def float32_as_such() -> Iterator[None]:
    """Compute products and convolutions in exact float32 within the block, on every device.

    Threads may overlap: the last pass to end restores the program's settings.
    """
    with _lock:
        before = _swap_settings(None)
        _passes.append(_passes[0] if _passes else before)
    try:
        yield
    finally:
        with _lock:
            first = _passes.pop()
            if not _passes:
                _swap_settings(first)


def _swap_settings(settings: Sequence[Any] | None) -> list[Any]:
    """Apply settings, or exact float32 for None; return the previous ones."""
    if not _EACH_ALONE:
        before = [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32]
        precision, torch.backends.cudnn.allow_tf32 = settings or ("highest", False)
        torch.set_float32_matmul_precision(precision)
        return before
    cuda, cudnn, mkldnn = (getattr(torch.backends, name) for name in ("cuda", "cudnn", "mkldnn"))
    operations = [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
    before = [operation.fp32_precision for operation in operations]
    for operation, setting in zip(operations, settings or ["ieee"] * len(before), strict=True):
        operation.fp32_precision = setting
    return before
