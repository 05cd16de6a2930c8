"""Labeled images, whose classification shows what an alignment costs.

Retrieval does not show it: a vision tower that is aligned with captions gets better at them, and
forgets classes that it knew (ProCLIP, arXiv:2510.18795, table 2).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...encoding.encode import TorchEncoder, average_prompts, project_stored
from ...evaluation.datasets.classification_dataset import ClassificationDataset
from ...evaluation.datasets.dataset_registry import load_dataset
from ...evaluation.results import hash_dataset
from ...evaluation.tasks.classification import list_prompts, rank_classes
from ...processing_llm2clip import LLM2CLIPProcessor
from .alignment_model import AlignmentModel


def load_labeled_images(source: str) -> ClassificationDataset:
    """Load labeled images, with the prompts of their dataset."""
    dataset = load_dataset(source)
    if not isinstance(dataset, ClassificationDataset):
        raise ValueError(
            f"zero_shot={source}: these images have captions and no classes. Give labeled images, "
            "such as image-folder=FOLDER with a folder per class, or imagenet=FOLDER."
        )
    return dataset


class ZeroShotImages:
    """Classifies labeled images by their prompts, with the weights that a model has now.

    What does not change in a run is encoded once, by the towers of its source.

    Args:
        dataset: The labeled images.
        source: Folder of the model that the run starts from.
        processor: Its processor.
    """

    def __init__(
        self, dataset: ClassificationDataset, source: Path, processor: LLM2CLIPProcessor
    ) -> None:
        self._dataset, self._source, self._processor = dataset, source, processor
        self._labels = torch.tensor(dataset.labels)
        self._known: dict[str, Tensor] = {}

    def identify(self) -> dict[str, Any]:
        """Describe the images for the record of a run."""
        dataset = self._dataset
        return {
            "dataset": dataset.name,
            "num_images": len(dataset.labels),
            "num_classes": len(dataset.class_names),
            "digest": hash_dataset(dataset),
        }

    def measure(self, model: AlignmentModel) -> float:
        """Return the share of images whose nearest class is their own, as `evaluate` does."""
        was_training = model.training
        model.train(False)
        try:
            texts, images = (
                project_stored(model, self._find_embeds(model, modality), modality)
                for modality in ("text", "image")
            )
        finally:
            model.train(was_training)
        classes = average_prompts(
            texts, [len(self._dataset.templates)] * len(self._dataset.class_names)
        )
        ranks, _ = rank_classes(images, classes, self._labels)
        return float((ranks == 1).double().mean())

    def _find_embeds(self, model: AlignmentModel, modality: str) -> Tensor:
        """Return what a tower makes of the prompts or of the images, before projection."""
        if modality in self._known:
            return self._known[modality]
        is_trained = model.trains_text if modality == "text" else model.trains_vision
        encoder = TorchEncoder(
            model if is_trained else self._source, self._processor, device=model.device
        )
        if modality == "text":
            embeds = encoder.encode_texts(list_prompts(self._dataset), project=False)
        else:
            embeds = encoder.encode_images(list(self._dataset.images), project=False)
        if not is_trained:
            self._known[modality] = embeds
        return embeds
