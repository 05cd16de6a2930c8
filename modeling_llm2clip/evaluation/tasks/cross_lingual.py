"""Retrieval language by language, and the mean over the languages."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..datasets.schema import EvaluationSet, RetrievalDataset
from ..encoders.encoder import Encoder
from ..metrics.scores import hits_at
from .retrieval import KS, PROTOCOL, encode_dataset, rank_directions, score_retrieval
from .task import Task, TaskScores, count_texts, mean_of_means_with_interval


def run_cross_lingual(encoder: Encoder, sets: tuple[EvaluationSet, ...]) -> TaskScores:
    """Score each language by itself: its captions look among its own images."""
    scores: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    numbers: dict[str, int] = {}
    hits: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
    for data in sets:
        assert isinstance(data, RetrievalDataset)
        texts, image_embeds = encode_dataset(encoder, data)
        directions = rank_directions(image_embeds, texts.embeds, data.correspondence)
        scores[data.lang] = score_retrieval(directions)
        # An image has one number in all languages.
        number = torch.tensor([numbers.setdefault(n, len(numbers)) for n in data.image_names])
        for name, (ranking, queries) in directions.items():
            for k in KS:
                hits.setdefault((name, k), []).append((hits_at(ranking, k=k), number[queries]))
        counts[data.lang] = {"images": len(image_embeds), **count_texts(texts)}
    mean = {direction: _average(scores, direction) for direction in directions}
    for direction, of_mean in mean.items():
        of_mean["intervals"] = {
            f"hit_rate_at_{k}": mean_of_means_with_interval(hits[direction, k]) for k in KS
        }
    return TaskScores({"mean": mean, "languages": scores}, {"languages": counts})


def _average(scores: Mapping[str, Any], direction: str) -> dict[str, Any]:
    """The mean over the languages of every number of a direction."""
    of_languages = [of_language[direction] for of_language in scores.values()]
    names = [name for name, value in of_languages[0].items() if isinstance(value, float)]
    return {name: fmean(numbers[name] for numbers in of_languages) for name in names}


CROSS_LINGUAL = Task(
    name="cross-lingual",
    title="retrieval in every language of a set, and the mean",
    kinds=("retrieval",),
    needs_images=True,
    languages=True,
    protocol={**PROTOCOL, "mean": "over languages, each with the same weight"},
    headline={
        "text to image R@1": ("mean", "t2i", "hit_rate_at_1"),
        "image to text R@1": ("mean", "i2t", "hit_rate_at_1"),
    },
    chance={
        "text to image R@1": ("mean", "t2i", "chance_hit_rate_at_1"),
        "image to text R@1": ("mean", "i2t", "chance_hit_rate_at_1"),
    },
    run=run_cross_lingual,
)
