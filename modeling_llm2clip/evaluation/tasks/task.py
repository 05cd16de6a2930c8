"""Tasks, and what they share: intervals, counts, parts of their protocols."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..._extras import Need
from ..datasets.dataset_spec import DatasetType, EvaluationDataset
from ..encoders.encoder import EncodedTexts, Encoder
from ..metrics.ranking import TIE_RULE
from ..metrics.scores import bootstrap_mean, bootstrap_mean_of_means

CONFIDENCE_LEVEL = 0.95
_NUM_RESAMPLES = 1000
# Part of the protocol of every task that has intervals.
BY_COSINE = {"similarity": "cosine", "ties": TIE_RULE}
INTERVAL_PROTOCOL = f"bootstrap over images, {_NUM_RESAMPLES} samples, {CONFIDENCE_LEVEL:.0%}"

Datasets: TypeAlias = tuple[EvaluationDataset, ...]


@dataclass(frozen=True)
class TaskScores:
    """Scores by name, nested at will, and counts of texts and images, as JSON values.

    Of a classification, `confusion` has the (C, C) int64 numbers of images of each class by
    predicted class, and the names of the classes.
    """

    scores: Mapping[str, Any]
    counts: Mapping[str, Any]
    confusion: tuple[Tensor, tuple[str, ...]] | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to measure.

    Attributes:
        protocol: Choices of the task that change a score.
        headline: Scores that a table shows: title of a column to the path in `scores`.
        chance: For the columns that have one: the path to what embeddings without meaning reach.
        run: Takes one dataset per language.
        needs_images: None if it depends on the dataset.
        all_languages: Takes all languages of a dataset together, not one alone.
        check: Raises ValueError for datasets on which the task cannot run, before any model is
            loaded.
        describe_data: Further choices, which depend on the datasets.
        needs: Optional packages that it cannot do without.
    """

    name: str
    title: str
    dataset_types: tuple[DatasetType, ...]
    protocol: Mapping[str, Any]
    headline: Mapping[str, tuple[str, ...]]
    chance: Mapping[str, tuple[str, ...]]
    run: Callable[[Encoder, Datasets], TaskScores]
    needs_images: bool | None = None
    all_languages: bool = False
    check: Callable[[Datasets], object] = lambda datasets: None  # noqa: ARG005
    describe_data: Callable[[Datasets], Mapping[str, Any]] = lambda datasets: {}  # noqa: ARG005
    needs: tuple[Need, ...] = ()


def mean_with_interval(values: Tensor, *, clusters: Tensor | None = None) -> dict[str, float]:
    """Compute the mean of one number per query, and how far other images could move it."""
    interval = bootstrap_mean(
        values,
        generator=torch.Generator().manual_seed(0),
        clusters=clusters,
        num_resamples=_NUM_RESAMPLES,
        level=CONFIDENCE_LEVEL,
    )
    return {"value": float(values.double().mean()), "low": interval.low, "high": interval.high}


def mean_of_means_with_interval(groups: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Compute the mean over groups of equal weight of their means, as `mean_with_interval`."""
    interval = bootstrap_mean_of_means(
        groups,
        generator=torch.Generator().manual_seed(0),
        num_resamples=_NUM_RESAMPLES,
        level=CONFIDENCE_LEVEL,
    )
    value = fmean(float(values.double().mean()) for values, _ in groups)
    return {"value": value, "low": interval.low, "high": interval.high}


def count_texts(texts: EncodedTexts) -> dict[str, int | None]:
    """Count the texts, and those that the encoder had to truncate."""
    is_truncated = texts.is_truncated
    return {
        "texts": len(texts.embeds),
        "texts_truncated": None if is_truncated is None else int(is_truncated.sum()),
    }
