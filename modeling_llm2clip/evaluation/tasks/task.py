"""Define the interface of tasks and their common parts: intervals, counts, protocols."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..._extras import Need
from ..datasets.dataset_spec import DatasetType, EvaluationDataset
from ..encoders.encoder import EncodedTexts, EvaluationEncoder
from ..metrics.ranking import TIE_RULE
from ..metrics.scores import CONFIDENCE_LEVEL, NUM_RESAMPLES

# Protocol fields of tasks that rank by cosine.
BY_COSINE = {"similarity": "cosine", "ties": TIE_RULE}

Datasets: TypeAlias = tuple[EvaluationDataset, ...]


@dataclass(frozen=True)
class TaskScores:
    """Scores by name, which may be nested, and counts of texts and images, as JSON values."""

    scores: Mapping[str, Any]
    counts: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task to evaluate.

    Attributes:
        protocol: Choices of the task that affect scores.
        headline: Scores shown in tables: maps each column title to the score's path in `scores`.
        chance: Maps column titles to the paths of scores of random embeddings, if there are any.
        run: Computes the scores; takes one dataset per language.
        needs_images: Whether the task needs images; None if that depends on the dataset.
        all_languages: Whether the task takes all languages of a dataset at once.
        check: Raises ValueError if the task cannot run on the datasets, before any model is loaded.
        describe_data: Returns further choices for the protocol, which depend on the datasets.
        needs: Optional packages that the task requires.
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
    """Describe how confidence intervals are computed, for a task's protocol."""
    return f"bootstrap over {sampled}, {NUM_RESAMPLES} samples, {CONFIDENCE_LEVEL:.0%}"


def count_texts(texts: EncodedTexts) -> dict[str, int | None]:
    """Count the texts, and how many of them the encoder truncated."""
    is_truncated = texts.is_truncated
    return {
        "texts": len(texts.embeds),
        "texts_truncated": None if is_truncated is None else int(is_truncated.sum()),
    }
