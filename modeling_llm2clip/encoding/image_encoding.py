"""Encodes many images, decoding the next ones while the tower works."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.image_sources import open_image
from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPVisionModel
from ..processing_llm2clip import LLM2CLIPProcessor
from .eval_mode import eval_mode
from .float32 import float32_as_such
from .memory import raise_malloc_thresholds


def encode_images(
    model: LLM2CLIPModel | LLM2CLIPVisionModel,
    processor: LLM2CLIPProcessor,
    images: Sequence[Any],
    *,
    batch_size: int | None = None,
    num_workers: int = 1,
    show_progress: bool = False,
    on_batch: Callable[[int], object] | None = None,
) -> Tensor:
    """Compute the image embeddings that `project_vision_embeds` takes, without dropout or TF32.

    Args:
        images: paths, packed images of a data set, or PIL images.
        batch_size: default by device: 8 on a processor, whose caches larger ones overflow; else 64.
        num_workers: threads that decode ahead of the tower.
        on_batch: told after each batch how many images it had.
    Returns: (N, D) float32 on the CPU.
    Raises: ValueError naming the image that is missing or broken, for no images or what is no
        list of them, or a batch or workers below one.
    """
    embeddings = []
    for embeds in encode_image_batches(
        model,
        processor,
        images,
        batch_size=batch_size,
        num_workers=num_workers,
        show_progress=show_progress,
    ):
        embeddings.append(embeds)
        if on_batch is not None:
            on_batch(len(embeds))
    return torch.cat(embeddings)


@torch.inference_mode()
def encode_image_batches(
    model: LLM2CLIPModel | LLM2CLIPVisionModel,
    processor: LLM2CLIPProcessor,
    images: Sequence[Any],
    *,
    batch_size: int | None = None,
    num_workers: int = 1,
    show_progress: bool = False,
) -> Iterator[Tensor]:
    """Yield the embeddings of `encode_images` batch by batch, so that each can be kept at once.

    Args:
        images: as `images` of `encode_images`, like all other arguments.
    Yields: (B, D) float32 on the CPU, in the order of the images.
    Raises: ValueError as `encode_images`, at the first batch.
    """
    if isinstance(images, str | bytes) or not isinstance(images, Sequence) or not images:
        raise ValueError(f"Got {images!r} for images; give a list of one at least.")
    batch_size = default_batch_size(model.device) if batch_size is None else batch_size
    if batch_size < 1 or num_workers < 1:
        raise ValueError(f"{batch_size=}, {num_workers=}: each must be one at least.")
    if model.device.type == "cpu":
        raise_malloc_thresholds()
    batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    with (
        ThreadPoolExecutor(num_workers) as pool,
        eval_mode(model),
        float32_as_such(),
        tqdm(total=len(images), unit=" images", disable=not show_progress) as progress,
    ):
        for inputs in _prepare_ahead(pool, processor, batches, count=num_workers + 1):
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            embeds = model.get_vision_embeds(**inputs).cpu()
            progress.update(len(embeds))
            yield embeds


def default_batch_size(device: torch.device) -> int:
    """Images of a batch on a device, where nothing else was asked for."""
    return 8 if device.type == "cpu" else 64


def _prepare_ahead(
    pool: ThreadPoolExecutor,
    processor: LLM2CLIPProcessor,
    batches: Sequence[Sequence[Any]],
    *,
    count: int,
) -> Iterator[dict[str, Any]]:
    """Prepare a few batches ahead and no more: all of them would fill the memory."""
    running: deque[Future[dict[str, Any]]] = deque()
    for batch in batches:
        running.append(pool.submit(_prepare, processor, batch))
        if len(running) > count:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _prepare(processor: LLM2CLIPProcessor, batch: Sequence[Any]) -> dict[str, Any]:
    return dict(processor(images=[open_image(image) for image in batch]))
