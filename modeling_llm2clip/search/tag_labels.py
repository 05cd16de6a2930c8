"""Ranks the labels of images by their cosines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..data.labels import Label
from ..heads_llm2clip import LogitRule


@dataclass(frozen=True)
class Tag:
    """One label of an image, whose fields `/v1/classify` sends as they are.

    Attributes:
        label: Name of the label.
        cosine: Cosine of image and label.
        probability: Softmax of the scaled cosines over all labels, as the pipeline
            `zero-shot-image-classification` gives it.
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
    """List the labels of the greatest cosine for each image, best first.

    Embeddings have unit length; `rule` turns cosines into the logits of a softmax. Where there are
    fewer than `top_k` labels, an image has all of them.
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
