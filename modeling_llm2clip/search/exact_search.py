"""Exact search through all embeddings, many queries in one pass, and recall against it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

# Two ways to add up a cosine in float32 differ by less.
_ROUNDING = 1e-5


def find_greatest_cosines(
    queries: np.ndarray[Any, Any], parts: Iterable[np.ndarray[Any, Any]], *, top_k: int
) -> np.ndarray[Any, Any]:
    """Find the greatest cosines of unit embeddings, (Q, top_k) in descending order."""
    best = np.empty((len(queries), 0), dtype=np.float32)
    for part in parts:
        best = np.concatenate([best, queries @ part.T], axis=1)
        if best.shape[1] > top_k:
            best = np.partition(best, -top_k, axis=1)[:, -top_k:]
    return -np.sort(-best, axis=1)


def measure_recall(found: Sequence[Sequence[float]], greatest: np.ndarray[Any, Any]) -> float:
    """Measure the share of the nearest images that a search has found.

    An image counts if its cosine is at least the smallest of the exact results, so that images of
    equal cosines stand for each other.
    """
    hits = [
        min(sum(cosine >= row[-1] - _ROUNDING for cosine in cosines), len(row)) / len(row)
        for cosines, row in zip(found, greatest, strict=True)
    ]
    return float(np.mean(hits))
