"""Images that are encoded once and searched by any number of sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..encoding.encode import encode_texts, project_images
from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor
from .results_page import SearchResult


@dataclass(frozen=True)
class Gallery:
    """Images and their embeddings.

    Attributes:
        paths: one an image.
        image_embeds: (N, P) float32 on the CPU, of unit length.
    """

    paths: Sequence[Path]
    image_embeds: Tensor


def make_gallery(model: LLM2CLIPModel, paths: Sequence[Path], vision_embeds: Tensor) -> Gallery:
    """Project what `encode_images` computed of these paths, (N, D)."""
    return Gallery(paths, project_images(model, vision_embeds))


def find_images(
    model: LLM2CLIPModel,
    processor: LLM2CLIPProcessor,
    gallery: Gallery,
    sentences: Sequence[str],
    *,
    count: int = 6,
) -> list[SearchResult]:
    """Find for each sentence the images of the greatest cosine, best first.

    Args:
        count: images a sentence; all of them where there are fewer.
    Raises: ValueError for a count below 1, or naming every sentence that is blank.
    """
    cosines = encode_texts(model, processor, sentences) @ gallery.image_embeds.T
    return take_best(sentences, cosines, gallery.paths, count=count)


def find_similar_images(
    gallery: Gallery, queries: Gallery, *, count: int = 6
) -> list[SearchResult]:
    """Find for each query image the images of the greatest cosine, best first.

    Args:
        gallery: images to search; one that is a query too finds itself.
        queries: query images.
        count: images per query; all of them where there are fewer.

    Raises:
        ValueError: the count is below 1.
    """
    cosines = queries.image_embeds @ gallery.image_embeds.T
    found = take_best([str(path) for path in queries.paths], cosines, gallery.paths, count=count)
    return [
        replace(result, query_image=path) for result, path in zip(found, queries.paths, strict=True)
    ]


def take_best(
    sentences: Sequence[str], cosines: Tensor, paths: Sequence[Path], *, count: int
) -> list[SearchResult]:
    """Take for each sentence the images of the greatest cosine, best first.

    Args:
        cosines: (sentences, images).
        paths: one an image.
        count: images a sentence; all of them where there are fewer.
    Raises: ValueError for a count below 1, or a cosine that is not finite.
    """
    if count < 1:
        raise ValueError(f"count={count} finds nothing; give at least 1.")
    require_finite(cosines)  # a NaN would come first
    best = cosines.topk(min(count, len(paths)))
    return [
        SearchResult(sentence, [(paths[i], float(s)) for s, i in zip(scores, rows, strict=True)])
        for sentence, scores, rows in zip(sentences, best.values, best.indices, strict=True)
    ]


def require_finite(cosines: Tensor) -> None:
    """Raise ValueError when a cosine is NaN or infinite."""
    if not cosines.isfinite().all():
        broken = int((~cosines.isfinite()).sum())
        raise ValueError(
            f"{broken} of {cosines.numel()} cosines are NaN or infinite: the model gave broken "
            "embeddings. Examine it with llm2clip doctor."
        )
