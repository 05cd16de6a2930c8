"""What a task takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from ..._extras import Need
from ..datasets.schema import EvaluationSet
from ..encoders.encoder import EncodedTexts, Encoder
from ..metrics.scores import bootstrap_mean, bootstrap_mean_of_means

CONFIDENCE_LEVEL = 0.95
NUM_RESAMPLES = 1000
# Of every task that gives an interval: part of its protocol.
INTERVAL_PROTOCOL = f"bootstrap over images, {NUM_RESAMPLES} draws, {CONFIDENCE_LEVEL:.0%}"


@dataclass(frozen=True)
class TaskScores:
    """What a task found.

    Attributes:
        scores: numbers by name, nested at will; JSON can hold them.
        counts: how many texts and images there were, and how many texts were cut.
        images: to be saved beside the scores, by name.
    """

    scores: Mapping[str, Any]
    counts: Mapping[str, Any]
    images: Mapping[str, Image.Image] = field(default_factory=dict)


RunTask: TypeAlias = Callable[[Encoder, tuple[EvaluationSet, ...]], TaskScores]


@dataclass(frozen=True)
class Task:
    """One thing to measure.

    Attributes:
        name: as `--tasks` takes it.
        title: one line for people.
        kinds: kinds of sets that it can be run on (`DatasetSpec.kind`).
        needs_images: whether the encoder must take images; None when it depends on the set.
        languages: whether all languages of a set are taken together, or one alone.
        protocol: choices of the task that move a score.
        protocol_of: further choices, which hang on the sets.
        headline: which scores a table shows: a column's title to the path in `scores`.
        chance: of those columns that have one: the path to what embeddings without meaning reach.
        run: the task itself; takes one set a language.
        check: raises ValueError for sets on which the task cannot be run, before any model is
            loaded.
        needs: optional packages that it cannot do without.
    """

    name: str
    title: str
    kinds: tuple[str, ...]
    needs_images: bool | None
    languages: bool
    protocol: Mapping[str, Any]
    headline: Mapping[str, tuple[str, ...]]
    chance: Mapping[str, tuple[str, ...]]
    run: RunTask
    check: Callable[[tuple[EvaluationSet, ...]], object] = lambda sets: None  # noqa: ARG005
    protocol_of: Callable[[tuple[EvaluationSet, ...]], Mapping[str, Any]] = lambda sets: {}  # noqa: ARG005
    needs: tuple[Need, ...] = ()


def mean_with_interval(values: Tensor, *, clusters: Tensor | None = None) -> dict[str, float]:
    """Mean of one number a query, and how far it could move with other images.

    Returns: `value`, `low`, `high`.
    """
    interval = bootstrap_mean(
        values,
        generator=torch.Generator().manual_seed(0),
        clusters=clusters,
        num_resamples=NUM_RESAMPLES,
        level=CONFIDENCE_LEVEL,
    )
    return {"value": float(values.double().mean()), "low": interval.low, "high": interval.high}


def mean_of_means_with_interval(groups: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """As `mean_with_interval`, over groups of equal weight: the values and clusters of each."""
    interval = bootstrap_mean_of_means(
        groups,
        generator=torch.Generator().manual_seed(0),
        num_resamples=NUM_RESAMPLES,
        level=CONFIDENCE_LEVEL,
    )
    value = fmean(float(values.double().mean()) for values, _ in groups)
    return {"value": value, "low": interval.low, "high": interval.high}


def count_texts(texts: EncodedTexts) -> dict[str, int | None]:
    """How many texts there were, and how many of them the encoder had to cut."""
    is_truncated = texts.is_truncated
    return {
        "texts": len(texts.embeds),
        "texts_truncated": None if is_truncated is None else int(is_truncated.sum()),
    }
