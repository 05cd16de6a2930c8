"""Compositional choices: which of two captions is true, of which of two images.

| form of the set | scores |
| --- | --- |
| `image` (SugarCrepe) | `accuracy`: the true caption is nearer to the image than the false one |
| `text` | the same with another true caption in place of the image, for text encoders alone |
| `images` (Winoground, arXiv:2204.03162) | `text`: each image finds its caption; `image`: each
caption finds its image; `group`: both |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..datasets.schema import ChoiceDataset, EvaluationSet
from ..encoders.encoder import EncodedTexts, Encoder
from ..metrics.ranking import TIE_TOLERANCE
from .task import INTERVAL_PROTOCOL, Task, TaskScores, count_texts, mean_with_interval

# Of Winoground: two comparisons right by luck, and the share of orders of four numbers that do
# for all four.
CHANCES = {"accuracy": 1 / 2, "text": 1 / 4, "image": 1 / 4, "group": 1 / 6}


def run_choices(encoder: Encoder, sets: tuple[EvaluationSet, ...]) -> TaskScores:
    """Answer every item, and score all of them and each category."""
    (data,) = sets
    assert isinstance(data, ChoiceDataset)
    captions = [caption for item in data.items for caption in item.captions]
    anchors = [item.anchor for item in data.items if item.anchor is not None]
    texts = encoder.encode_texts([*captions, *anchors])
    captions_embeds = F.normalize(texts.embeds[: len(captions)], dim=-1).unflatten(0, (-1, 2))
    if data.form == "text":
        others = F.normalize(texts.embeds[len(captions) :], dim=-1).unflatten(0, (-1, 1))
    else:
        others = _encode_images(encoder, data)
    answers = compare(captions_embeds, others)
    return TaskScores(_score(data, answers), _count(data, texts))


def compare(captions: Tensor, others: Tensor) -> dict[str, Tensor]:
    """Which items are answered right; an equal score is a wrong answer.

    Args:
        captions: (N, 2, D) of unit length; the first is true of the first of the others.
        others: (N, 1, D) or (N, 2, D), images or what stands for them.
    Returns: name of a score to (N,) bool.
    """
    scores = others.double() @ captions.double().transpose(1, 2)  # (N, images, captions)
    if others.shape[1] == 1:
        return {"accuracy": _is_nearer(scores[:, 0, 0], scores[:, 0, 1])}
    text = _is_nearer(scores[:, 0, 0], scores[:, 0, 1]) & _is_nearer(
        scores[:, 1, 1], scores[:, 1, 0]
    )
    image = _is_nearer(scores[:, 0, 0], scores[:, 1, 0]) & _is_nearer(
        scores[:, 1, 1], scores[:, 0, 1]
    )
    return {"text": text, "image": image, "group": text & image}


def _is_nearer(right: Tensor, wrong: Tensor) -> Tensor:
    return torch.gt(right, wrong + TIE_TOLERANCE)


def _encode_images(encoder: Encoder, data: ChoiceDataset) -> Tensor:
    images = [image for item in data.items for image in item.images]
    names = [
        f"{item.name}/{number}" if len(item.images) > 1 else item.name
        for item in data.items
        for number in range(len(item.images))
    ]
    embeds = F.normalize(encoder.encode_images(images, names=names), dim=-1)
    return embeds.reshape(len(data.items), -1, embeds.shape[1])


def _score(data: ChoiceDataset, answers: Mapping[str, Tensor]) -> dict[str, Any]:
    categories = [item.category for item in data.items]
    scores: dict[str, Any] = {
        name: {**mean_with_interval(right.double()), "chance": CHANCES[name]}
        for name, right in answers.items()
    }
    of_category = {}
    for category in dict.fromkeys(categories):
        chosen = torch.tensor([other == category for other in categories])
        of_category[category] = {
            "items": int(chosen.sum()),
            **{name: float(right[chosen].double().mean()) for name, right in answers.items()},
        }
    return {**scores, "categories": of_category}


def _count(data: ChoiceDataset, texts: EncodedTexts) -> dict[str, Any]:
    images = {image for item in data.items for image in item.images}
    return {"items": len(data.items), "images": len(images), **count_texts(texts)}


CHOICES = Task(
    name="choices",
    title="which of two captions is true",
    kinds=("choice",),
    needs_images=None,
    languages=False,
    protocol={
        "similarity": "cosine",
        "ties": f"cosines no further apart than {TIE_TOLERANCE:g} are a wrong answer",
        "interval": INTERVAL_PROTOCOL.replace("images", "items"),
    },
    headline={
        "accuracy": ("accuracy", "value"),
        "text score": ("text", "value"),
        "image score": ("image", "value"),
        "group score": ("group", "value"),
    },
    chance={
        "accuracy": ("accuracy", "chance"),
        "text score": ("text", "chance"),
        "image score": ("image", "chance"),
        "group score": ("group", "chance"),
    },
    run=run_choices,
)
