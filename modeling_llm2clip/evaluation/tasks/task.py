"""The interface of tasks, and their common parts: intervals, counts, protocols."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..._extras import Need
from ..datasets.dataset_spec import DatasetType, EvaluationDataset
from ..encoders.encoder import EncodedTexts, EvaluationEncoder
from ..metrics.ranking import TIE_RULE
from ..metrics.scores import CONFIDENCE_LEVEL, NUM_RESAMPLES

# Part of the protocol of every task that has intervals.
BY_COSINE = {"similarity": "cosine", "ties": TIE_RULE}

Datasets: TypeAlias = tuple[EvaluationDataset, ...]


@dataclass(frozen=True)
class TaskScores:
    """Scores by name, nested at will, and counts of texts and images, as JSON values."""

    scores: Mapping[str, Any]
    counts: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to measure.

    Attributes:
        protocol: Choices of the task that change a score.
        headline: Scores that a table shows: title of a column to the path in `scores`.
        chance: For some columns, the path to the score of embeddings without meaning.
        run: Takes one dataset per language.
        needs_images: None if it depends on the dataset.
        all_languages: Takes all languages of a dataset together, not one alone.
        check: Raises ValueError for datasets on which the task cannot run, before any model is
            loaded.
        describe_data: Further choices, which depend on the datasets.
        needs: Optional packages that it requires.
    """

    name: str
    title: str
    dataset_types: tuple[DatasetType, ...]
    protocol: Mapping[str, Any]
    headline: Mapping[str, tuple[str, ...]]
    chance: Mapping[str, tuple[str, ...]]
    run: Callable[[EvaluationEncoder, Datasets], TaskScores]
    needs_images: bool | None = None
    all_languages: bool = False
    check: Callable[[Datasets], object] = lambda datasets: None  # noqa: ARG005
    describe_data: Callable[[Datasets], Mapping[str, Any]] = lambda datasets: {}  # noqa: ARG005
    needs: tuple[Need, ...] = ()


def describe_interval(sampled: str) -> str:
    """Describe the confidence intervals, for the protocol of a task."""
    return f"bootstrap over {sampled}, {NUM_RESAMPLES} samples, {CONFIDENCE_LEVEL:.0%}"


def count_texts(texts: EncodedTexts) -> dict[str, int | None]:
    """Count the texts, and those that the encoder had to truncate."""
    is_truncated = texts.is_truncated
    return {
        "texts": len(texts.embeds),
        "texts_truncated": None if is_truncated is None else int(is_truncated.sum()),
    }
