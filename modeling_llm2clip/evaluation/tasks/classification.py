"""Score zero-shot classification, which predicts the class with the closest prompts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...encoding.encode import average_prompts
from ..datasets.classification_dataset import ClassificationDataset
from ..encoders.encoder import EvaluationEncoder
from ..metrics.ranking import TIE_TOLERANCE
from ..metrics.scores import mean_with_interval
from .task import BY_COSINE, Datasets, Task, TaskScores, count_texts, describe_interval

_KS = (1, 5)
_NUM_CONFUSED = 20
_IMAGES_AT_A_TIME = 2048  # limits the memory of the float64 scores
_NEAR = 1e-4  # far above the rounding error of a float32 cosine


def _run_classification(encoder: EvaluationEncoder, datasets: Datasets) -> TaskScores:
    [dataset] = datasets
    assert isinstance(dataset, ClassificationDataset)
    texts = encoder.encode_texts(list_prompts(dataset))
    classes = average_prompts(texts.embeds, [len(dataset.templates)] * len(dataset.class_names))
    images = F.normalize(encoder.encode_images(dataset.images, names=dataset.image_names), dim=-1)
    labels = torch.tensor(dataset.labels)
    ranks, predicted = rank_classes(images, classes, labels, device=encoder.ranking_device)
    num_classes = len(classes)
    cells = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    confusion = cells.unflatten(0, (num_classes, num_classes))  # own class, predicted class
    scores = _score(ranks, labels, confusion, dataset.class_names)
    tied = [dataset.class_names[row] for row in find_tied_classes(classes)]
    return TaskScores(
        scores={**scores, "classes_with_tied_embeddings": tied},
        counts={"images": len(images), "classes": num_classes, **count_texts(texts)},
    )


def list_prompts(dataset: ClassificationDataset) -> list[str]:
    """List the prompts of all classes, grouped by class."""
    return [
        template.replace("{}", name)
        for name in dataset.class_names
        for template in dataset.templates
    ]


def rank_classes(
    images: Tensor, classes: Tensor, labels: Tensor, *, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the rank of each image's own class, from 1, and the predicted class, both (N,) int64.

    Images are (N, D) and classes (C, D), of unit length. Ties count against the model: if an
    image's own class ties with others, the closest of the others is predicted. Scores are computed
    in float64 on `device` (default: the images' device), and the results are on the CPU.
    """
    device = device or images.device
    classes, labels, parts = classes.to(device).double(), labels.to(device), []
    for start in range(0, len(images), _IMAGES_AT_A_TIME):
        chosen = slice(start, start + _IMAGES_AT_A_TIME)
        own_class = labels[chosen, None]
        scores = images[chosen].to(device).double() @ classes.T  # (n, C)
        least = scores.gather(1, own_class) - TIE_TOLERANCE
        scores.scatter_(1, own_class, -torch.inf)
        ranks = 1 + (scores >= least).sum(dim=1)
        nearest = torch.where(ranks == 1, own_class[:, 0], scores.argmax(dim=1))
        parts.append(torch.stack([ranks, nearest]))
    ranks, predicted = torch.cat(parts, dim=1).cpu()
    return ranks, predicted


def find_tied_classes(classes: Tensor) -> list[int]:
    """Find the rows of classes that tie with another class; all images of these classes are wrong.

    A model may not be able to distinguish names that differ only in case, or only after the maximum
    length.
    """
    # The product selects candidate pairs; only their difference is precise enough to decide.
    first, second = (classes @ classes.T > 1 - _NEAR).nonzero().T
    distances = (classes[first].double() - classes[second].double()).norm(dim=1)
    rows: list[int] = first[(first != second) & (distances <= TIE_TOLERANCE)].unique().tolist()
    return rows


def _score(
    ranks: Tensor, labels: Tensor, confusion: Tensor, names: tuple[str, ...]
) -> dict[str, Any]:
    scores: dict[str, Any] = {
        f"top_{k}": mean_with_interval((ranks <= k).double()) for k in _KS if k < len(names)
    }
    is_right = (ranks == 1).double()
    present = labels.unique()
    per_class = torch.stack([is_right[labels == label].mean() for label in present])
    wrong = confusion.clone().fill_diagonal_(0)
    counts, cells = wrong.flatten().topk(min(_NUM_CONFUSED, wrong.numel()))
    return {
        **scores,
        "mean_per_class_top_1": float(per_class.mean()),
        "chance_top_1": 1 / len(names),
        "top_1_of_class": {
            names[int(label)]: float(value) for label, value in zip(present, per_class, strict=True)
        },
        "most_confused": [
            {"class": names[cell // len(names)], "predicted": names[cell % len(names)], "count": n}
            for cell, n in zip(cells.tolist(), counts.tolist(), strict=True)
            if n
        ],
    }


CLASSIFICATION = Task(
    name="classification",
    title="zero-shot classification by prompts",
    dataset_types=("classification",),
    needs_images=True,
    protocol={
        **BY_COSINE,
        "class_embedding": "mean of the unit embeddings of its prompts, normalized again",
        "interval": describe_interval("images"),
    },
    headline={
        "top-1": ("top_1", "value"),
        "top-5": ("top_5", "value"),
        "per class": ("mean_per_class_top_1",),
    },
    chance={"top-1": ("chance_top_1",), "per class": ("chance_top_1",)},
    run=_run_classification,
)
