"""Float32 that is float32: no TF32, which keeps 10 bits of a number.

On CUDA torch convolves float32 numbers in TF32 by default, and programs switch it on for matrix
products too. Both settings hold for the whole program.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

# From torch 2.9 on each operation of a backend has its own setting, and reading the old ones can
# raise.
_EACH_ALONE = hasattr(torch.backends.cuda.matmul, "fp32_precision")
_lock = threading.Lock()
_passes: list[Sequence[Any]] = []  # the settings before each that is inside


@contextmanager
def float32_as_such() -> Iterator[None]:
    """Compute products and convolutions of float32 numbers as such inside, on every device.

    Of several threads the last one gives the program its settings back.
    """
    with _lock:
        before = _passes[0] if _passes else _read_settings()
        _passes.append(before)
        _write_settings([_exact(setting) for setting in before])
    try:
        yield
    finally:
        with _lock:
            before = _passes.pop()
            if not _passes:
                _write_settings(before)


def _exact(setting: Any) -> Any:
    if isinstance(setting, bool):  # whether TF32 is allowed
        return False
    return "ieee" if _EACH_ALONE else "highest"


def _list_operations() -> list[Any]:
    cuda, cudnn, mkldnn = (getattr(torch.backends, name) for name in ("cuda", "cudnn", "mkldnn"))
    return [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


def _read_settings() -> list[Any]:
    if _EACH_ALONE:
        return [operation.fp32_precision for operation in _list_operations()]
    return [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32]


def _write_settings(settings: Sequence[Any]) -> None:
    if _EACH_ALONE:
        for operation, setting in zip(_list_operations(), settings, strict=True):
            operation.fp32_precision = setting
    else:
        torch.set_float32_matmul_precision(settings[0])
        torch.backends.cudnn.allow_tf32 = settings[1]
