"""Tags images: the labels of the greatest cosine, each label encoded once for all images."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..encoding.encode import encode_texts
from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor
from .image_index import ImageIndex
from .tag_labels import Label

_COLUMNS = ("image", "rank", "label", "cosine", "probability")
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Tag:
    """One label of an image.

    Attributes:
        label: Name of the label.
        cosine: Of image and label.
        probability: Softmax of the scaled cosines over all labels, as the pipeline
            `zero-shot-image-classification` gives it.
    """

    label: str
    cosine: float
    probability: float


@dataclass(frozen=True)
class TaggedImage:
    """An image and its labels.

    Attributes:
        path: The image.
        tags: Its labels, best first; none where no cosine reaches the threshold.
    """

    path: Path
    tags: Sequence[Tag]


def encode_labels(
    model: LLM2CLIPModel, processor: LLM2CLIPProcessor, labels: Sequence[Label]
) -> Tensor:
    """Encode each label: the mean of its prompts' unit embeddings, of unit length again.

    Args:
        model: A model with a text tower.
        processor: Its processor.
        labels: Labels and their prompts.

    Returns:
        (labels, P) float32 on the CPU.

    Raises:
        ValueError: As `encode_texts`.
    """
    prompts = [prompt for label in labels for prompt in label.prompts]
    return average_prompts(encode_texts(model, processor, prompts), labels)


def average_prompts(embeds: Tensor, labels: Sequence[Label]) -> Tensor:
    """Average the embeddings of each label's prompts.

    Args:
        embeds: Of all prompts in the order of the labels, (prompts, P) of unit length.
        labels: Labels and their prompts.

    Returns:
        (labels, P) of unit length.
    """
    means = [part.mean(dim=0) for part in embeds.split([len(label.prompts) for label in labels])]
    return F.normalize(torch.stack(means), dim=-1)


@torch.inference_mode()
def tag_images(
    index: ImageIndex,
    labels: Sequence[Label],
    *,
    top_k: int = 3,
    threshold: float | None = None,
) -> Iterator[TaggedImage]:
    """Yield the labels of each image; each label is encoded once.

    Args:
        index: The images.
        labels: Labels and their prompts.
        top_k: Labels per image; all of them where there are fewer.
        threshold: Smallest cosine of a label.

    Yields:
        Each image of the index, in its order.

    Raises:
        ValueError: `top_k` is below 1, or a prompt is blank.
    """
    if top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1.")
    label_embeds = encode_labels(index.model, index.processor, labels)
    scale = float(index.model.logit_scale())
    for start in range(0, len(index), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        found = rank_labels(
            index.image_embeds[rows], label_embeds, labels, scale=scale, top_k=top_k
        )
        for path, tags in zip(index.paths[rows], found, strict=True):
            yield TaggedImage(
                path, [tag for tag in tags if threshold is None or tag.cosine >= threshold]
            )


def rank_labels(
    image_embeds: Tensor,
    label_embeds: Tensor,
    labels: Sequence[Label],
    *,
    scale: float,
    top_k: int,
) -> list[list[Tag]]:
    """Take for each image the labels of the greatest cosine, best first.

    Args:
        image_embeds: (N, P) of unit length.
        label_embeds: (labels, P) of unit length.
        labels: The labels.
        scale: Factor of the cosines before the softmax.
        top_k: Labels per image; all of them where there are fewer.
    """
    cosines = image_embeds @ label_embeds.T
    probabilities = (scale * cosines).softmax(dim=-1)
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


def write_tags(tagged: Iterable[TaggedImage], file: IO[str], style: str) -> tuple[int, int]:
    """Write tags as CSV, one line per label, or as JSON lines, one per image.

    An image without a label has a line too; in CSV its other columns are empty.

    Args:
        tagged: Images with their labels.
        file: Text file, open for writing.
        style: `".csv"` or `".jsonl"`.

    Returns:
        How many images there were, and how many of them have no label.
    """
    num_images = num_untagged = 0
    writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
    if style == ".csv":
        writer.writeheader()
    for image in tagged:
        num_images += 1
        num_untagged += not image.tags
        if style == ".csv":
            writer.writerows(_list_rows(image))
        else:
            file.write(json.dumps(_to_record(image), ensure_ascii=False) + "\n")
    return num_images, num_untagged


def _list_rows(image: TaggedImage) -> Iterator[dict[str, Any]]:
    if not image.tags:
        yield {"image": image.path}
    for rank, tag in enumerate(image.tags, start=1):
        yield {"image": image.path, "rank": rank, **_to_numbers(tag)}


def _to_record(image: TaggedImage) -> dict[str, Any]:
    return {"image": str(image.path), "labels": [_to_numbers(tag) for tag in image.tags]}


def _to_numbers(tag: Tag) -> dict[str, Any]:
    return {
        "label": tag.label,
        "cosine": round(tag.cosine, 6),
        "probability": round(tag.probability, 6),
    }
