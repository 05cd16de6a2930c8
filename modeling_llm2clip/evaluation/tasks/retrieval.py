"""Retrieval in both directions: every metric, and an interval for the hit rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..encoders.encoder import EncodedTexts, Encoder
from ..metrics.correspondence import Correspondence
from ..metrics.ranking import TIE_RULE, Ranking, rank_both_ways
from ..metrics.scores import hits_at, summarize
from ..sets.schema import EvaluationSet, RetrievalSet
from .task import INTERVAL_PROTOCOL, Task, TaskScores, count_texts, mean_with_interval

KS = (1, 5, 10)
PROTOCOL = {
    "similarity": "cosine",
    "ties": TIE_RULE,
    "hit_rate_at_k": "some positive among the first k: R@K of the CLIP papers",
    "recall_at_k": "share of the positives among the first k",
    "interval": INTERVAL_PROTOCOL,
}


def run_retrieval(encoder: Encoder, sets: tuple[EvaluationSet, ...]) -> TaskScores:
    """Rank all captions for every picture and all pictures for every caption."""
    (data,) = sets
    assert isinstance(data, RetrievalSet)
    texts, images = encode_set(encoder, data)
    scores = score_both_ways(rank_directions(images, texts.embeds, data.correspondence))
    return TaskScores(scores, {"pictures": len(images), **count_texts(texts)})


def encode_set(encoder: Encoder, data: RetrievalSet) -> tuple[EncodedTexts, Tensor]:
    """Vectors of a set's captions and of its pictures."""
    texts = encoder.encode_texts(data.captions)
    return texts, encoder.encode_pictures(data.pictures, names=data.picture_names)


def rank_directions(
    images: Tensor, texts: Tensor, correspondence: Correspondence
) -> dict[str, tuple[Ranking, Tensor]]:
    """Rank in both directions.

    Args:
        images, texts: (I, D), (T, D).
    Returns: `text_to_image` and `image_to_text`, each with its ranking and, for each query, the row
        of its picture: the captions of a picture are drawn together for an interval.
    """
    found = rank_both_ways(images, texts, correspondence, all_positives=True)
    picture_of_text = torch.zeros(correspondence.num_texts, dtype=torch.long)
    picture_of_text[correspondence.text_of_pair] = correspondence.image_of_pair
    return {
        "text_to_image": (found.text_to_image, picture_of_text),
        "image_to_text": (found.image_to_text, torch.arange(correspondence.num_images)),
    }


def score_both_ways(directions: Mapping[str, tuple[Ranking, Tensor]]) -> dict[str, Any]:
    """All scores of both directions, from `rank_directions`.

    Returns: `text_to_image` and `image_to_text`, each with what `summarize` names, `intervals` of
        the hit rates, and `chance_hit_rate_at_1`: what vectors without meaning would reach.
    """
    return {
        name: {
            **summarize(ranking, ks=KS),
            "chance_hit_rate_at_1": chance_of(ranking),
            "intervals": {
                f"hit_rate_at_{k}": mean_with_interval(hits_at(ranking, k=k), clusters=pictures)
                for k in KS
            },
        }
        for name, (ranking, pictures) in directions.items()
    }


def chance_of(ranking: Ranking) -> float:
    """Hit rate at 1 that vectors without meaning would reach."""
    return float((ranking.num_positives.double() / ranking.num_candidates).mean())


RETRIEVAL = Task(
    name="retrieval",
    title="pictures by caption, and captions by picture",
    kinds=("retrieval",),
    needs_pictures=True,
    languages=False,
    protocol=PROTOCOL,
    headline={
        "text to picture R@1": ("text_to_image", "hit_rate_at_1"),
        "picture to text R@1": ("image_to_text", "hit_rate_at_1"),
    },
    chance={
        "text to picture R@1": ("text_to_image", "chance_hit_rate_at_1"),
        "picture to text R@1": ("image_to_text", "chance_hit_rate_at_1"),
    },
    run=run_retrieval,
)
