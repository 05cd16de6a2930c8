"""How far a score could move with another sample of images: bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CLUSTERS_AT_A_TIME = 2**22


@dataclass(frozen=True)
class Interval:
    """Where a score lies in the given share of resampled data sets."""

    low: float
    high: float
    level: float


def bootstrap_mean(
    values: Tensor,
    *,
    generator: torch.Generator,
    clusters: Tensor | None = None,
    num_resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of a mean over queries (Efron and Tibshirani, 1993, ch. 13).

    Whole clusters are drawn with replacement. The five captions of an image succeed and fail
    together; drawn one by one they would pass for five independent trials, and the interval would
    be too narrow.

    Args:
        values: (Q,) one number a query, as `hits_at` and its like give.
        generator: on the CPU; the same seed gives the same interval.
        clusters: (Q,) whole numbers, equal for queries that are drawn together: for captions, the
            row of their image. Each query by itself unless given.
    Raises: ValueError for no values, NaN, other lengths, or a level outside (0, 1).
    """
    if values.ndim != 1 or not len(values) or not values.isfinite().all():
        raise ValueError(
            f"values {tuple(values.shape)} must be finite numbers, one for each query."
        )
    if not 0 < level < 1 or num_resamples < 1:
        raise ValueError(
            f"level={level} must be between 0 and 1, num_resamples={num_resamples} at least 1."
        )
    if clusters is None:
        clusters = torch.arange(len(values))
    elif clusters.shape != values.shape:
        raise ValueError(
            f"clusters {tuple(clusters.shape)} must name one cluster for each of the "
            f"{len(values)} values."
        )
    numbers, sizes = clusters.unique(return_inverse=True, return_counts=True)[1:]
    sums = torch.zeros(len(sizes), dtype=torch.float64)
    sums.index_add_(0, numbers, values.double().cpu())
    means = _resample_means(sums, sizes.double(), num_resamples, generator)
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(low, high, level)


def bootstrap_mean_of_means(
    groups: Sequence[tuple[Tensor, Tensor]],
    *,
    generator: torch.Generator,
    num_resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of a mean over groups, such as languages, of their means.

    One draw of clusters serves all groups: an image that is drawn twice counts twice in every
    language that it has captions in.

    Args:
        groups: the values and the clusters of each, as `bootstrap_mean` takes them; equal numbers
            are one cluster, in whatever group.
        generator, num_resamples, level: as `bootstrap_mean`.
    """
    numbers = torch.cat([clusters for _, clusters in groups]).unique(return_inverse=True)[1]
    num_clusters = int(numbers.max()) + 1
    sums, sizes = torch.zeros(2, num_clusters, len(groups), dtype=torch.float64)
    parts = numbers.split([len(values) for values, _ in groups])
    for group, ((values, _), rows) in enumerate(zip(groups, parts, strict=True)):
        sums[:, group].index_add_(0, rows, values.double().cpu())
        sizes[:, group] = torch.bincount(rows, minlength=num_clusters)
    means = []
    for count in _split(num_resamples, max(1, _CLUSTERS_AT_A_TIME // num_clusters)):
        drawn = torch.randint(num_clusters, (count, num_clusters), generator=generator)
        times = torch.zeros(count, num_clusters, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones_like(times))
        # A small group may have no image in a draw; the others are the mean then.
        means.append((times @ sums / (times @ sizes)).nanmean(dim=1))
    tail = (1 - level) / 2
    bounds = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.cat(means).quantile(bounds).tolist()
    return Interval(low, high, level)


def _resample_means(
    sums: Tensor, sizes: Tensor, num_resamples: int, generator: torch.Generator
) -> Tensor:
    """Mean over all queries of each of many draws of clusters, (num_resamples,) float64."""
    num_clusters = len(sizes)
    means = []
    for count in _split(num_resamples, max(1, _CLUSTERS_AT_A_TIME // num_clusters)):
        drawn = torch.randint(num_clusters, (count, num_clusters), generator=generator)
        means.append(sums[drawn].sum(dim=1) / sizes[drawn].sum(dim=1))
    return torch.cat(means)


def _split(total: int, most: int) -> list[int]:
    return [min(most, total - start) for start in range(0, total, most)]
