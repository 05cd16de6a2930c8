"""Keeps the memory of one batch for the next, which the C library would give back in between."""

from __future__ import annotations

import ctypes
import os
from functools import cache

# From glibc's malloc.h; see mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK, _MOST_KEPT = 2**28, 2**30  # bytes


@cache
def raise_malloc_thresholds() -> bool:
    """Let glibc keep freed blocks of up to 256 MiB, 1 GiB of them; works once a process.

    Batch after batch asks for the same blocks, and each page that the system hands out anew costs
    an error, which convolutional towers feel most. By itself glibc keeps none above 32 MiB, which
    is all that `packing_llm2clip.keep_freed_memory` reaches.

    Returns: whether it was done; not without glibc, nor where the user has set its variables.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
    )
