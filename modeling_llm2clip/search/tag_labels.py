"""Rank labels for images by cosine similarity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..data.labels import Label
from ..heads_llm2clip import LogitRule


@dataclass(frozen=True)
class Tag:
    """One label of an image; `/v1/classify` returns these fields unchanged.

    Attributes:
        label: Name of the label.
        cosine: Cosine similarity of image and label.
        probability: Softmax of the scaled cosines over all labels, as in the pipeline
            `zero-shot-image-classification`.
    """

    label: str
    cosine: float
    probability: float


def rank_labels(
    image_embeds: Tensor,
    label_embeds: Tensor,
    labels: Sequence[Label],
    *,
    rule: LogitRule,
    top_k: int,
) -> list[list[Tag]]:
    """Return the `top_k` labels with the highest cosine for each image, best first.

    Embeddings have unit length, and `rule` turns cosines into logits. With fewer than `top_k`
    labels, all of them are returned.
    """
    cosines = image_embeds @ label_embeds.T
    probabilities = rule.from_cosines(cosines).softmax(dim=-1)
    best = cosines.topk(min(top_k, len(labels)))
    return [
        [
            Tag(labels[number].name, cosine, probability)
            for number, cosine, probability in zip(numbers, scores, shares, strict=True)
        ]
        for numbers, scores, shares in zip(
            best.indices.tolist(),
            best.values.tolist(),
            probabilities.gather(1, best.indices).tolist(),
            strict=True,
        )
    ]
