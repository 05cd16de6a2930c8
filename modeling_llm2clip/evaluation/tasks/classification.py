"""Zero-shot classification: the class whose prompts are nearest to the image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..datasets.schema import ClassificationDataset, EvaluationSet
from ..encoders.encoder import Encoder
from ..metrics.ranking import TIE_RULE, TIE_TOLERANCE
from .confusion import plot_confusion
from .task import INTERVAL_PROTOCOL, Task, TaskScores, count_texts, mean_with_interval

KS = (1, 5)
_MOST_CONFUSED = 20
_ROWS_AT_ONCE = 1024
_NEAR = 1e-4  # of a cosine in float32, far above its rounding


def run_classification(encoder: Encoder, sets: tuple[EvaluationSet, ...]) -> TaskScores:
    """Compare every image with every class; a class is the mean of its prompts' unit embeddings."""
    (data,) = sets
    assert isinstance(data, ClassificationDataset)
    prompts = [
        template.replace("{}", name) for name in data.class_names for template in data.templates
    ]
    texts = encoder.encode_texts(prompts)
    of_class = F.normalize(texts.embeds, dim=-1).unflatten(0, (len(data.class_names), -1))
    classes = F.normalize(of_class.mean(dim=1), dim=-1)  # (C, D)
    images = F.normalize(encoder.encode_images(data.images, names=data.image_names), dim=-1)
    if images.shape[1] != classes.shape[1]:
        raise ValueError(
            f"Images have width {images.shape[1]}, texts {classes.shape[1]}; they must come from "
            "one model."
        )
    labels = torch.tensor(data.labels)
    ranks, predicted = rank_classes(images, classes, labels)
    confusion = count_confusion(labels, predicted, num_classes=len(classes))
    scores = _score(ranks, labels, confusion, data.class_names)
    tied = [data.class_names[row] for row in find_tied(classes)]
    return TaskScores(
        scores={**scores, "classes_with_tied_embeddings": tied},
        counts={"images": len(images), "classes": len(classes), **count_texts(texts)},
        images={"confusion": plot_confusion(confusion, data.class_names)},
    )


def rank_classes(images: Tensor, classes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of each image's own class, and the class that it is taken for.

    Args:
        images, classes: (N, D), (C, D) of unit length.
        labels: (N,) int64.
    Returns: (N,) int64 each; ranks begin at 1, and ties count against the model: an image whose
        own class ties with others is taken for the nearest of these.
    """
    scores = images.double() @ classes.double().T  # (N, C)
    own = scores.gather(1, labels[:, None])
    others = scores.scatter(1, labels[:, None], -torch.inf)
    ranks = 1 + (others >= own - TIE_TOLERANCE).sum(dim=1)
    return ranks, torch.where(ranks == 1, labels, others.argmax(dim=1))


def find_tied(classes: Tensor) -> list[int]:
    """Rows that lie as near to another row as a tie: images of them can only be wrong.

    Names that differ to a reader may be one to a model: in capitals, or cut at its last token.

    Args:
        classes: (C, D) of unit length.
    """
    tied: set[int] = set()
    for start in range(0, len(classes), _ROWS_AT_ONCE):
        # A product finds candidates among all pairs; only their difference is exact enough.
        near = classes[start : start + _ROWS_AT_ONCE] @ classes.T > 1 - _NEAR
        first, second = near.nonzero().T
        first = first + start
        distances = (classes[first].double() - classes[second].double()).norm(dim=1)
        tied.update(first[(first != second) & (distances <= TIE_TOLERANCE)].tolist())
    return sorted(tied)


def count_confusion(labels: Tensor, predicted: Tensor, *, num_classes: int) -> Tensor:
    """How many images of each class (row) were taken for each class (column), (C, C) int64."""
    cells = labels * num_classes + predicted
    return torch.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def _score(
    ranks: Tensor, labels: Tensor, confusion: Tensor, names: tuple[str, ...]
) -> dict[str, Any]:
    scores: dict[str, Any] = {
        f"top_{k}": mean_with_interval((ranks <= k).double()) for k in KS if k < len(names)
    }
    is_right = (ranks == 1).double()
    present = labels.unique()
    per_class = torch.stack([is_right[labels == label].mean() for label in present])
    wrong = confusion.clone().fill_diagonal_(0)
    counts, cells = wrong.flatten().topk(min(_MOST_CONFUSED, wrong.numel()))
    return {
        **scores,
        "mean_per_class_top_1": float(per_class.mean()),
        "chance_top_1": 1 / len(names),
        "top_1_of_class": {
            names[int(label)]: float(value) for label, value in zip(present, per_class, strict=True)
        },
        "most_confused": [
            {"class": names[cell // len(names)], "taken_for": names[cell % len(names)], "count": n}
            for cell, n in zip(cells.tolist(), counts.tolist(), strict=True)
            if n
        ],
    }


CLASSIFICATION = Task(
    name="classification",
    title="zero-shot classification by prompts",
    kinds=("classification",),
    needs_images=True,
    languages=False,
    protocol={
        "similarity": "cosine",
        "ties": TIE_RULE,
        "class_embedding": "mean of the unit embeddings of its prompts, unit length again",
        "interval": INTERVAL_PROTOCOL,
    },
    headline={
        "top-1": ("top_1", "value"),
        "top-5": ("top_5", "value"),
        "per class": ("mean_per_class_top_1",),
    },
    chance={"top-1": ("chance_top_1",), "per class": ("chance_top_1",)},
    run=run_classification,
)
