"""Embeddings that are written down by hand, and datasets for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiny_encoders import save_named_embeddings

from modeling_llm2clip.evaluation.datasets.choice_dataset import ChoiceDataset, ChoiceItem
from modeling_llm2clip.evaluation.datasets.classification_dataset import ClassificationDataset
from modeling_llm2clip.evaluation.datasets.retrieval_dataset import RetrievalDataset
from modeling_llm2clip.evaluation.encoders.auto import load_encoder
from modeling_llm2clip.evaluation.encoders.encoder import EvaluationEncoder
from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence

EAST, NORTH, WEST = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)
NORTH_EAST = (1.0, 1.0)

Embeddings = Mapping[str, Sequence[float]]


def open_embeddings(
    folder: Path, texts: Embeddings, images: Embeddings | None = None
) -> EvaluationEncoder:
    """An encoder that has these embeddings."""
    return load_encoder(save_named_embeddings(folder, dict(texts), dict(images or {})))


def make_retrieval_dataset(
    captions: Sequence[str], image_of_text: Sequence[int], *, lang: str = "en", shown: bool = True
) -> RetrievalDataset:
    """Images `p0`, `p1`, … with these captions."""
    number = max(image_of_text) + 1
    names = tuple(f"p{i}" for i in range(number))
    return RetrievalDataset(
        name="by-hand",
        images=tuple(Path(name) for name in names) if shown else (),
        image_names=names,
        captions=tuple(captions),
        correspondence=Correspondence.from_image_of_text(image_of_text, number),
        lang=lang,
    )


def make_classification_dataset(
    labels: Sequence[int], names: Sequence[str], **fields: Any
) -> ClassificationDataset:
    """Images `p0`, `p1`, … of these classes."""
    images = tuple(f"p{i}" for i in range(len(labels)))
    chosen: dict[str, Any] = {
        "images": tuple(map(Path, images)), "templates": ("{}",), "lang": "en", **fields,
    }  # fmt: skip
    return ClassificationDataset(
        name="by-hand",
        image_names=images,
        labels=tuple(labels),
        class_names=tuple(names),
        **chosen,
    )


def make_choices(form: Any, items: Sequence[ChoiceItem]) -> ChoiceDataset:
    """Questions of one form."""
    return ChoiceDataset(name="by-hand", form=form, items=tuple(items), lang="en")
