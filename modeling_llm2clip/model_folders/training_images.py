"""Summarize a model's training images, and measure how far other images are from them.

For each dataset, the summary has the means of its image clusters, computed from normalized
embeddings of the vision tower (before the projection). A set of images is judged as a whole: by
the distance of its mean from every mixture of these clusters. Images of a single topic of the
training data are also such a mixture. A set of unfamiliar images is not, even if each image is near
some training image. No embedding of a single image is stored.

Shapes: D width of the tower's embeddings, K clusters, N images.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data.safetensors_files import serialize_tensors

TRAINING_IMAGES_FILE = "training_images.safetensors"
FEWEST_JUDGED = 20
_FORMAT = 2
_MAX_CLUSTERS = 128
_IMAGES_PER_CLUSTER = 8
_FEWEST_IN_CLUSTER = 3
_ITERATIONS = 10
# Distance, as a fraction of the training images' spread. Held-out emoji, drawings and photographs
# stay below it; unfamiliar sets exceed it, except cut-out photographs for a model trained on
# drawings. See `benchmarks/accuracy/training_data_distance.py`.
FAR = 0.1
_MIXING_STEPS = 300
_METADATA = "training_images"

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class DatasetSummary:
    """Summary of one dataset's images, from a sample of `num_measured`.

    `spread` is the sample's variance, summed over dimensions; `clusters` (K, D) float32 are means
    of at least three images each.
    """

    name: str
    num_images: int
    num_measured: int
    spread: float
    clusters: Tensor


def summarize_images(vision_embeds: Tensor, *, name: str, num_images: int) -> DatasetSummary:
    """Summarize a sample of a dataset's images, (N, D) from the tower.

    The sample must be in random order, independent of the dataset's order.
    """
    rows = _to_unit_rows(vision_embeds)
    clusters = torch.from_numpy(_find_clusters(rows).astype(np.float32))
    spread = round(float(rows.var(axis=0).sum()), 6)
    return DatasetSummary(name, num_images, len(rows), spread, clusters)


@dataclass(frozen=True)
class TrainingImages:
    """Summary of all images that a model was trained on, in the order of training.

    `not_summarized` names datasets without a summary: of an earlier vision tower, or of a training
    loop of the user's own.
    """

    datasets: tuple[DatasetSummary, ...]
    not_summarized: tuple[str, ...] = ()

    def add(self, dataset: DatasetSummary) -> TrainingImages:
        """Return the summary with another dataset added; a known dataset is not added twice."""
        others = [
            known
            for known in self.datasets
            if (known.name, known.num_images) != (dataset.name, dataset.num_images)
            or not torch.equal(known.clusters, dataset.clusters)
        ]
        return TrainingImages((*others, dataset), self.not_summarized)

    def list_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.not_summarized, *(data.name for data in self.datasets))))

    def measure(self, tally: ImageTally) -> float | None:
        """Measure how far a set of images is from all mixtures of training images.

        Returns the squared distance as a fraction of the training images' spread, at least 0; None
        for fewer than `FEWEST_JUDGED` images.
        """
        if tally.num_images < FEWEST_JUDGED:
            return None
        self.require_width(len(tally.total))
        clusters = torch.cat([dataset.clusters for dataset in self.datasets]).double().numpy()
        spread = float(np.mean([dataset.spread for dataset in self.datasets]))
        return _measure(tally.total / tally.num_images, tally.num_images, clusters, spread)

    def require_width(self, width: int) -> None:
        """Refuse a summary whose embedding width differs from the vision tower's."""
        stated = self.datasets[0].clusters.shape[1]
        if stated != width:
            raise ValueError(
                f"{TRAINING_IMAGES_FILE} belongs to a tower with {stated} dimensions, but the "
                f"model's tower has {width}. Delete the file, or restore the model's own."
            )

    def describe_far(self, tally: ImageTally) -> str | None:
        """Describe the training data and a remedy if images differ much from it; otherwise None."""
        distance = self.measure(tally)
        if distance is None or distance <= FAR:
            return None
        names = ", ".join(f"{data.name} ({data.num_images:,} images)" for data in self.datasets)
        earlier = ", ".join(self.not_summarized)
        return (
            f"These {tally.num_images:,} images are unlike the images that this model was trained "
            f"on, {names}: distance {distance:.2f} (familiar images stay below {FAR:.2f}). Expect "
            "poor results. Train the model on captioned images like these (llm2clip extract, then "
            "llm2clip align)."
            + (f" Not compared: {earlier}, which the folder has no summary of." if earlier else "")
        )


class ImageTally:
    """Adds up the embeddings of the images that a run encodes.

    Args:
        num_images: Number of images so far.
        total: Sum of the images' normalized embeddings, (D,) float64.
    """

    def __init__(self, num_images: int = 0, total: Array | None = None) -> None:
        self.num_images = num_images
        self._total = np.zeros(()) if total is None else total
        self._on_device: Tensor | None = None

    @property
    def total(self) -> Array:
        """Sum of all embeddings, (D,) float64; synchronizes with the GPU's pending sum."""
        if self._on_device is not None:
            self._total = self._total + self._on_device.cpu().numpy()
            self._on_device = None
        return self._total

    def add(self, vision_embeds: Tensor) -> None:
        """Add images' unprojected embeddings, (B, D); GPU tensors are summed on the GPU."""
        if vision_embeds.is_cuda:
            self.add_on_device(vision_embeds)
        elif len(vision_embeds):
            self.join(ImageTally(len(vision_embeds), _to_unit_rows(vision_embeds).sum(axis=0)))

    def add_on_device(self, vision_embeds: Tensor) -> None:
        """Add embeddings of images without synchronizing the device."""
        sums = F.normalize(vision_embeds.detach().double(), dim=1).sum(dim=0)
        self._on_device = sums if self._on_device is None else self._on_device + sums
        self.num_images += len(vision_embeds)

    def join(self, other: ImageTally) -> None:
        if other.num_images:
            self._total = self.total + other.total
            self.num_images += other.num_images


def read_training_images(folder: Path) -> TrainingImages | None:
    file = folder / TRAINING_IMAGES_FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            content = json.loads((opened.metadata() or {})[_METADATA])
            datasets = tuple(
                DatasetSummary(**fields, clusters=opened.get_tensor(f"clusters.{number}"))
                for number, fields in enumerate(content["datasets"])
            )
        clusters = torch.cat([dataset.clusters for dataset in datasets])  # fails if widths differ
        if content["format"] != _FORMAT or not clusters.isfinite().all():
            raise ValueError(f"format {content['format']}, or NaN")
        return TrainingImages(datasets, tuple(content["not_summarized"]))
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{file} is damaged or has another version ({error}). Restore it or delete it. "
            "Without it, there are no warnings about unfamiliar images."
        ) from error


def describe_far_images(folder: Path, tally: ImageTally) -> str | None:
    """Warn about images unlike a folder's training images; None if familiar or unknown."""
    summary = read_training_images(folder)
    return None if summary is None else summary.describe_far(tally)


def write_training_images(folder: Path, summary: TrainingImages) -> None:
    """Write a model folder's summary; the bytes are deterministic."""
    content = {
        "format": _FORMAT,
        "datasets": [
            {name: value for name, value in vars(dataset).items() if name != "clusters"}
            for dataset in summary.datasets
        ],
        "not_summarized": summary.not_summarized,
    }
    tensors = {
        f"clusters.{number}": dataset.clusters.contiguous()
        for number, dataset in enumerate(summary.datasets)
    }
    metadata = {_METADATA: json.dumps(content, ensure_ascii=False)}
    (folder / TRAINING_IMAGES_FILE).write_bytes(serialize_tensors(tensors, metadata))


def _to_unit_rows(vision_embeds: Tensor) -> Array:
    """Normalize rows in float64, so rounded sums do not depend on the number of threads."""
    rows: Array = vision_embeds.detach().cpu().double().numpy()
    unit: Array = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)
    return unit


def _find_clusters(rows: Array) -> Array:
    """Find clusters with Lloyd's algorithm, starting from the first rows; return means, (K, D)."""
    means = rows[: min(_MAX_CLUSTERS, len(rows) // _IMAGES_PER_CLUSTER)].copy()
    sizes = np.zeros(len(means), np.int64)
    for _ in range(_ITERATIONS):
        nearest = ((means**2).sum(axis=1) - 2 * rows @ means.T).argmin(axis=1)
        sizes = np.bincount(nearest, minlength=len(means))
        for number in np.flatnonzero(sizes):
            means[number] = rows[nearest == number].mean(axis=0)
    kept: Array = means[sizes >= min(_FEWEST_IN_CLUSTER, sizes.max())]
    return kept


def _measure(mean: Array, num_images: int, clusters: Array, spread: float) -> float:
    """Return the squared distance of a set's mean from the nearest mixture, divided by the spread.

    The distance expected by chance for a set of this size is subtracted. The mixture is found with
    the Frank-Wolfe method with exact steps. If all training images are identical, the result is 0.
    """
    if not spread:
        return 0.0
    mixed = clusters[((clusters - mean) ** 2).sum(axis=1).argmin()]
    for _ in range(_MIXING_STEPS):
        direction = clusters[(clusters @ (mixed - mean)).argmin()] - mixed
        length = float(direction @ direction)
        step = float((mean - mixed) @ direction) / length if length else 0.0
        if step <= 0:
            break
        mixed = mixed + min(step, 1.0) * direction
    by_chance = (1 - float(mean @ mean)) / (num_images - 1)
    distance = float(((mixed - mean) ** 2).sum()) - by_chance
    return max(0.0, distance / spread)
