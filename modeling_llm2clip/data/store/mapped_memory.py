"""Memory that files are mapped to: advice to the kernel, and arrays over it."""

from __future__ import annotations

import ctypes
import os
import sys
from enum import IntEnum
from functools import cache
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]


class Advice(IntEnum):
    """What a process will do with mapped memory; the numbers of Linux and macOS, see madvise(2)."""

    RANDOM = 1  # no reading ahead
    READ_AHEAD = 3  # read it now, while the process goes on
    FORGET = 4  # no longer count it as resident; it is read again when it is used


def advise(address: int, size: int, advice: Advice) -> None:
    """Advise the kernel about mapped memory; a system without such advice works without it.

    Args:
        address: where it begins.
        size: bytes of it.
        advice: what the process will do.
    """
    madvise = _find_madvise()
    if madvise is not None:
        start = address // _page_bytes() * _page_bytes()
        madvise(start, address + size - start, advice)


def view_memory(
    address: int, shape: tuple[int, int], strides: tuple[int, int], dtype: np.dtype[Any]
) -> Array:
    """Return a read-only array over mapped memory, without copying it.

    Args:
        address: where it begins; the memory must stay mapped.
        shape: of the array.
        strides: of the array, in bytes.
        dtype: of the array.
    """
    data = (address, True)
    return np.asarray(_Memory(data=data, shape=shape, strides=strides, typestr=dtype.str))


def count_memory_bytes() -> int:
    """Return how much memory the machine has; 0 if it does not say."""
    if sys.platform not in ("linux", "darwin"):
        return 0
    return _page_bytes() * os.sysconf("SC_PHYS_PAGES")


class _Memory:
    """What numpy makes an array of."""

    def __init__(self, **interface: Any) -> None:
        self.__array_interface__ = {**interface, "version": 3}


@cache
def _page_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE")


@cache
def _find_madvise() -> Any:
    if sys.platform not in ("linux", "darwin"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
