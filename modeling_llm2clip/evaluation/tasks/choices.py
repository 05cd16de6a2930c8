"""Score compositional choices: pick the true caption, or the image that a caption describes.

| form of the dataset | scores |
| --- | --- |
| `image` (SugarCrepe) | `accuracy`: the true caption is closer to the image than the false one |
| `text` | same, with another true caption instead of the image, for text-only encoders |
| `images` (Winoground, arXiv:2204.03162) | `text`: each image finds its caption; `image`: each
caption finds its image; `group`: both |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..datasets.choice_dataset import ChoiceDataset
from ..encoders.encoder import EvaluationEncoder
from ..metrics.ranking import TIE_TOLERANCE
from ..metrics.scores import mean_with_interval
from .task import Datasets, Task, TaskScores, count_texts, describe_interval

# For Winoground's text and image scores, two comparisons must be right by luck. For its group
# score, this is the share of orderings of four numbers in which all four comparisons are right.
_CHANCES = {"accuracy": 1 / 2, "text": 1 / 4, "image": 1 / 4, "group": 1 / 6}


def _run_choices(encoder: EvaluationEncoder, datasets: Datasets) -> TaskScores:
    [dataset] = datasets
    assert isinstance(dataset, ChoiceDataset)
    captions = [caption for item in dataset.items for caption in item.captions]
    anchors = [item.anchor for item in dataset.items if item.anchor is not None]
    texts = encoder.encode_texts([*captions, *anchors])
    caption_embeds = F.normalize(texts.embeds[: len(captions)], dim=-1).unflatten(0, (-1, 2))
    if dataset.form == "text":
        others = F.normalize(texts.embeds[len(captions) :], dim=-1).unflatten(0, (-1, 1))
    else:
        images = [image for item in dataset.items for image in item.images]
        names = [
            f"{item.name}/{number}" if len(item.images) > 1 else item.name
            for item in dataset.items
            for number in range(len(item.images))
        ]
        embeds = F.normalize(encoder.encode_images(images, names=names), dim=-1)
        others = embeds.unflatten(0, (len(dataset.items), -1))
    answers = compare_choices(caption_embeds, others)
    num_images = len({image for item in dataset.items for image in item.images})
    counts = {"items": len(dataset.items), "images": num_images, **count_texts(texts)}
    return TaskScores(_score(dataset, answers), counts)


def compare_choices(captions: Tensor, others: Tensor) -> dict[str, Tensor]:
    """Return whether each item is answered correctly, (N,) bool per score; a tie is wrong.

    `captions` is (N, 2, D). `others` is (N, 1, D) or (N, 2, D), of images or texts. Embeddings have
    unit length, and the first caption belongs to the first of `others`.
    """
    scores = others.double() @ captions.double().transpose(1, 2)  # (N, images, captions)
    wrong = scores + TIE_TOLERANCE
    if others.shape[1] == 1:
        return {"accuracy": scores[:, 0, 0] > wrong[:, 0, 1]}
    right = scores.diagonal(dim1=1, dim2=2)  # (N, 2)
    text = (right > wrong.flip(2).diagonal(dim1=1, dim2=2)).all(dim=1)
    image = (right > wrong.flip(1).diagonal(dim1=1, dim2=2)).all(dim=1)
    return {"text": text, "image": image, "group": text & image}


def _score(dataset: ChoiceDataset, answers: Mapping[str, Tensor]) -> dict[str, Any]:
    categories = [item.category for item in dataset.items]
    numbers: dict[tuple[object, ...], int] = {}
    # Questions about the same image succeed or fail together.
    shown = [item.image_names or item.images or (item.name,) for item in dataset.items]
    images = torch.tensor([numbers.setdefault(names, len(numbers)) for names in shown])
    scores: dict[str, Any] = {
        name: {**mean_with_interval(right.double(), clusters=images), "chance": _CHANCES[name]}
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


_COLUMNS = {
    "accuracy": "accuracy", "text score": "text", "image score": "image", "group score": "group",
}  # fmt: skip

CHOICES = Task(
    name="choices",
    title="which of two captions is true",
    dataset_types=("choice",),
    protocol={
        "similarity": "cosine",
        "ties": f"cosines that differ by no more than {TIE_TOLERANCE:g} are a wrong answer",
        "interval": describe_interval("images, with all items of one together"),
    },
    headline={title: (name, "value") for title, name in _COLUMNS.items()},
    chance={title: (name, "chance") for title, name in _COLUMNS.items()},
    run=_run_choices,
)
