"""Retrieval in both directions: every metric, and an interval for the hit rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..datasets.schema import EvaluationSet, RetrievalDataset
from ..encoders.encoder import EncodedTexts, Encoder
from ..metrics.correspondence import Correspondence
from ..metrics.ranking import TIE_RULE, Ranking, rank_retrieval
from ..metrics.scores import hits_at, summarize
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
    """Rank all captions for every image and all images for every caption."""
    (data,) = sets
    assert isinstance(data, RetrievalDataset)
    texts, images = encode_dataset(encoder, data)
    scores = score_retrieval(rank_directions(images, texts.embeds, data.correspondence))
    return TaskScores(scores, {"images": len(images), **count_texts(texts)})


def encode_dataset(encoder: Encoder, data: RetrievalDataset) -> tuple[EncodedTexts, Tensor]:
    """Embeddings of a set's captions and of its images."""
    texts = encoder.encode_texts(data.captions)
    return texts, encoder.encode_images(data.images, names=data.image_names)


def rank_directions(
    images: Tensor, texts: Tensor, correspondence: Correspondence
) -> dict[str, tuple[Ranking, Tensor]]:
    """Rank in both directions.

    Args:
        images, texts: (I, D), (T, D).
    Returns: `t2i` and `i2t`, each with its ranking and, for each query, the row
        of its image: the captions of an image are drawn together for an interval.
    """
    found = rank_retrieval(images, texts, correspondence, all_positives=True)
    image_of_text = torch.zeros(correspondence.num_texts, dtype=torch.long)
    image_of_text[correspondence.text_of_pair] = correspondence.image_of_pair
    return {
        "t2i": (found.t2i, image_of_text),
        "i2t": (found.i2t, torch.arange(correspondence.num_images)),
    }


def score_retrieval(directions: Mapping[str, tuple[Ranking, Tensor]]) -> dict[str, Any]:
    """All scores of both directions, from `rank_directions`.

    Returns: `t2i` and `i2t`, each with what `summarize` names, `intervals` of
        the hit rates, and `chance_hit_rate_at_1`: what embeddings without meaning would reach.
    """
    return {
        name: {
            **summarize(ranking, ks=KS),
            "chance_hit_rate_at_1": chance_of(ranking),
            "intervals": {
                f"hit_rate_at_{k}": mean_with_interval(hits_at(ranking, k=k), clusters=images)
                for k in KS
            },
        }
        for name, (ranking, images) in directions.items()
    }


def chance_of(ranking: Ranking) -> float:
    """Hit rate at 1 that embeddings without meaning would reach."""
    return float((ranking.num_positives.double() / ranking.num_candidates).mean())


RETRIEVAL = Task(
    name="retrieval",
    title="images by caption, and captions by image",
    kinds=("retrieval",),
    needs_images=True,
    languages=False,
    protocol=PROTOCOL,
    headline={
        "text to image R@1": ("t2i", "hit_rate_at_1"),
        "image to text R@1": ("i2t", "hit_rate_at_1"),
    },
    chance={
        "text to image R@1": ("t2i", "chance_hit_rate_at_1"),
        "image to text R@1": ("i2t", "chance_hit_rate_at_1"),
    },
    run=run_retrieval,
)
