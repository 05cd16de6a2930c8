"""Cosines of pairs of an image and a text: how well each text describes its image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._suggestions import counted
from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor
from .encode import encode_images, encode_texts


def score_pairs(
    model: LLM2CLIPModel,
    processor: LLM2CLIPProcessor,
    images: Sequence[Any],
    texts: Sequence[str],
    *,
    batch_size: int | None = None,
    token_budget: int | None = None,
    num_workers: int | None = None,
    show_progress: bool = False,
) -> Tensor:
    """Compute the cosine of each image and its text.

    With the official L/14-336 checkpoint it is what OneIG-Bench computes for an image and the
    answer that it should show (`scripts/utils/inference.py` of OneIG-Bench/OneIG-Benchmark at
    41b4983, from which AISBench and Pruna took it), there with weights in bfloat16 under autocast.

    Args:
        model: A whole model.
        processor: Its processor.
        images: As `encode_images` takes them; an image may occur in several pairs.
        texts: As many non-blank texts.
        batch_size: Images per batch. Default: by device.
        token_budget: Maximum tokens per batch of texts. Default: by device.
        num_workers: Threads that decode images. Default: one per core, at most 8.
        show_progress: Show progress bars.

    Returns:
        (N,) float32 on the CPU, from -1 to 1, in the order of the pairs.

    Raises:
        ValueError: There are not as many texts as images, or what `encode_images` and
            `encode_texts` refuse.

    Examples:
        >>> model, processor = load_model("my-model")
        >>> score_pairs(model, processor, ["dog.png", "dog.png"], ["a dog", "a red cup"]).shape
        torch.Size([2])
    """
    if len(images) != len(texts):
        raise ValueError(
            f"{counted(len(images), 'image')} and {counted(len(texts), 'text')} are no pairs: give "
            "a text for each image."
        )
    image_embeds = encode_images(
        model, processor, images, batch_size=batch_size, num_workers=num_workers,
        show_progress=show_progress,
    )  # fmt: skip
    text_embeds = encode_texts(
        model, processor, texts, token_budget=token_budget, show_progress=show_progress
    )
    return (image_embeds * text_embeds).sum(dim=1)
