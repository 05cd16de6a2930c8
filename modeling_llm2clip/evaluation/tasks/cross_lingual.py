"""Retrieval language by language, and the mean over the languages."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from ..encoders.encoder import Encoder
from ..sets.schema import EvaluationSet, RetrievalSet
from .retrieval import PROTOCOL, encode_set, score_both_ways
from .task import Task, TaskScores, count_texts


def run_cross_lingual(encoder: Encoder, sets: tuple[EvaluationSet, ...]) -> TaskScores:
    """Score each language by itself: its captions look among its own pictures."""
    scores: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    for data in sets:
        assert isinstance(data, RetrievalSet)
        texts, images = encode_set(encoder, data)
        scores[data.lang] = score_both_ways(images, texts.embeds, data.correspondence)
        counts[data.lang] = {"pictures": len(images), **count_texts(texts)}
    directions = ("text_to_image", "image_to_text")
    numbers = {
        direction: [name for name, value in scores[sets[0].lang][direction].items()
                    if isinstance(value, float)]
        for direction in directions
    }  # fmt: skip
    mean = {
        direction: {
            name: fmean(of_language[direction][name] for of_language in scores.values())
            for name in names
        }
        for direction, names in numbers.items()
    }
    return TaskScores({"mean": mean, "languages": scores}, {"languages": counts})


CROSS_LINGUAL = Task(
    name="cross-lingual",
    title="retrieval in every language of a set, and the mean",
    kinds=("retrieval",),
    needs_pictures=True,
    languages=True,
    protocol={**PROTOCOL, "mean": "over languages, each with the same weight"},
    headline={
        "text to picture R@1": ("mean", "text_to_image", "hit_rate_at_1"),
        "picture to text R@1": ("mean", "image_to_text", "hit_rate_at_1"),
    },
    run=run_cross_lingual,
)
