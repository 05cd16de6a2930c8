"""Train an approximate index; keep it if it is faster than exact search and its recall suffices.

Text embeddings lie far from all image embeddings, so the images nearest to a text are spread over
many partitions. The number of partitions to visit is therefore tuned with text queries. With image
queries, far fewer partitions would seem to be enough.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from .._suggestions import counted
from .index_about import AnnIndex
from .index_database import IndexDatabase

# Below this number of images, an exact search takes less than about 50 ms.
FEWEST_ROWS = 20_000
# Larger partitions mean more comparisons per query; smaller partitions scatter the nearest
# images.
_ROWS_PER_PARTITION = 1000
_TOP_K, MIN_RECALL = 10, 0.97
_SHARES_VISITED = (
    0.02, 0.05, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0
)  # fmt: skip
# One bit per dimension is coarse, so this many candidates per result are re-ranked by exact cosine.
_REFINE_FACTORS = (50, 200)
# Partitions are retrained once the number of images has changed by more than this factor.
_MOST_GROWTH = 1.25
# Two summation orders of a cosine in float32 differ by less than this.
_ROUNDING = 1e-5

Report = Callable[[str], object]


def needs_training(database: IndexDatabase) -> bool:
    """Return True if the index has no partitions, or its number of images has changed too much."""
    ann = database.about.ann
    if ann is None:
        return True
    return not ann.num_rows / _MOST_GROWTH <= database.count() <= ann.num_rows * _MOST_GROWTH


def train_ann(
    database: IndexDatabase,
    queries: np.ndarray[Any, Any],
    *,
    always: bool,
    report: Report,
) -> AnnIndex:
    """Train the approximate index; set the result's `is_used` if the index was kept.

    Queries are unit-length text embeddings, (Q, P) float32. `always` keeps the index even if it is
    slower than exact search or its recall is too low.
    """
    num_rows = database.count()
    num_partitions = max(1, round(num_rows / _ROWS_PER_PARTITION))
    report(f"Training an approximate index on {counted(num_rows, 'image')} …")
    started = time.monotonic()
    database.build_ann(num_partitions)
    seconds = round(time.monotonic() - started, 1)
    untuned = AnnIndex(
        num_rows=num_rows, num_partitions=num_partitions, nprobes=1, refine_factor=1,
        recall_at_10=0, num_queries=len(queries), query_ms=0, exact_query_ms=0,
        build_s=seconds, is_used=True,
    )  # fmt: skip
    ann = tune_ann(database, untuned, queries)
    finds_enough, is_faster = ann.recall_at_10 >= MIN_RECALL, ann.query_ms < ann.exact_query_ms
    ann = replace(ann, is_used=always or (finds_enough and is_faster))
    if not ann.is_used:
        database.drop_ann()
    reason = f"recall below {MIN_RECALL}" if not finds_enough else "slower than exact search"
    report(
        f"Trained in {seconds:.0f} s. {describe_ann(ann)}"
        + ("" if ann.is_used else f" Not kept: {reason}. Every image is compared instead.")
    )
    return ann


def tune_ann(database: IndexDatabase, ann: AnnIndex, queries: np.ndarray[Any, Any]) -> AnnIndex:
    """Choose the fewest partitions per query that reach the minimum recall, or maximize recall."""
    greatest = find_greatest_cosines(
        queries, (part for _, part in database.iterate_embeddings()), top_k=_TOP_K
    )
    best = replace(ann, recall_at_10=0)  # the old recall was measured on other images
    for refine_factor, nprobes in product(_REFINE_FACTORS, _list_nprobes(ann.num_partitions)):
        tried = replace(ann, nprobes=nprobes, refine_factor=refine_factor)
        cosines, query_ms = measure_search(database, queries, ann=tried)
        recall = round(measure_ann_recall(cosines, greatest), 4)
        best = max(
            best,
            replace(tried, recall_at_10=recall, query_ms=query_ms),
            key=lambda candidate: candidate.recall_at_10,
        )
        if best.recall_at_10 >= MIN_RECALL:
            break
    _, exact_query_ms = measure_search(database, queries[:3], ann=None)
    return replace(best, num_queries=len(queries), exact_query_ms=exact_query_ms)


def measure_search(
    database: IndexDatabase, queries: np.ndarray[Any, Any], *, ann: AnnIndex | None
) -> tuple[list[list[float]], float]:
    """Run all queries, (Q, P); return each query's hit cosines and the median time in ms."""
    cosines, seconds = [], []
    for query in queries:
        started = time.perf_counter()
        rows = database.search(query, top_k=_TOP_K, ann=ann)
        seconds.append(time.perf_counter() - started)
        cosines.append([row["cosine"] for row in rows])
    return cosines, round(1000 * statistics.median(seconds), 2)


def find_greatest_cosines(
    queries: np.ndarray[Any, Any], parts: Iterable[np.ndarray[Any, Any]], *, top_k: int
) -> np.ndarray[Any, Any]:
    """Compute each query's highest cosines with unit-length embeddings, (Q, top_k), descending."""
    best = np.empty((len(queries), 0), dtype=np.float32)
    for part in parts:
        best = np.concatenate([best, queries @ part.T], axis=1)
        if best.shape[1] > top_k:
            best = np.partition(best, -top_k, axis=1)[:, -top_k:]
    return -np.sort(-best, axis=1)


def measure_ann_recall(results: Sequence[Sequence[float]], greatest: np.ndarray[Any, Any]) -> float:
    """Measure the share of the nearest images that a search found.

    A hit counts if its cosine reaches the lowest cosine of the exact search, so tied images are
    interchangeable.
    """
    hits = [
        min(sum(cosine >= row[-1] - _ROUNDING for cosine in cosines), len(row)) / len(row)
        for cosines, row in zip(results, greatest, strict=True)
    ]
    return float(np.mean(hits))


def describe_ann(ann: AnnIndex) -> str:
    return (
        f"Approximate index: {ann.nprobes} of {ann.num_partitions} partitions per query, "
        f"{ann.refine_factor} candidates per result; recall@10 {ann.recall_at_10:.3f} on "
        f"{ann.num_queries} texts; {ann.query_ms:.0f} ms per query, {ann.exact_query_ms:.0f} ms "
        "without it."
    )


def _list_nprobes(num_partitions: int) -> list[int]:
    return sorted({max(1, round(share * num_partitions)) for share in _SHARES_VISITED})
