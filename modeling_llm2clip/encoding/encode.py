"""Texts and images into embeddings: each distinct input once, in batches, from loaded objects.

N texts or images, D width of a tower, P `projection_dim`. Every result is float32 on the CPU, in
the order of the input. TF32 is off, whatever the program's settings; the numbers do not depend on
batches, device or padding beyond rounding. The model must be in evaluation mode.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModel
from ..packing_llm2clip import plan_packs, plan_token_batches
from ..processing_llm2clip import LLM2CLIPProcessor
from .batches import (
    OnBatch,
    decode_images,
    encode_distinct,
    encode_distinct_images,
    encode_distinct_texts,
    iterate_batches,
    join_prepared,
    pad_ids,
    require_finite,
    split_evenly,
)
from .eval_mode import require_eval_mode
from .float32 import float32_as_such
from .tokenized_texts import TokenizedText, TokenizedTexts

_PROJECTED_AT_ONCE = 4096
# From glibc's malloc.h; see mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK, _MOST_KEPT = 2**28, 2**30  # bytes


def encode_texts(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    processor: LLM2CLIPProcessor,
    texts: Iterable[str],
    *,
    project: bool = True,
    token_budget: int | None = None,
    show_progress: bool = False,
    on_batch: OnBatch | None = None,
) -> Tensor:
    """Encode texts, the longest first, in batches of texts of similar length.

    Args:
        model: A model with a text tower.
        processor: The model's processor.
        texts: Any number of non-blank texts, at least one.
        project: Map the tower's embeddings into the space that texts and images share. False
            gives the embeddings before adapter and projection, as an embedding store holds them.
        token_budget: Maximum tokens per batch, on a GPU padding included. Default: by device.
        show_progress: Show a progress bar, which counts tokens.
        on_batch: Called after each batch.

    Returns:
        (N, P) of unit length; with `project=False` (N, D), not normalized.

    Raises:
        ValueError: `texts` is one string or not a list, a text is blank or not a string, the
            budget is below one, the model is in training mode, or it gives NaN or infinity. Every
            such text is named.

    Examples:
        >>> model, processor = load_model("my-model")
        >>> embeds = encode_texts(model, processor, ["a dog", "two red apples"])
        >>> embeds.shape == (2, model.config.projection_dim)
        True
    """
    tokens = TokenizedTexts(processor, texts)
    return encode_tokenized_texts(
        model,
        processor,
        tokens,
        project=project,
        token_budget=token_budget,
        show_progress=show_progress,
        on_batch=on_batch,
    )


def encode_tokenized_texts(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    processor: LLM2CLIPProcessor,
    texts: Sequence[TokenizedText],
    *,
    project: bool = True,
    token_budget: int | None = None,
    show_progress: bool = False,
    on_batch: OnBatch | None = None,
) -> Tensor:
    """Encode texts that are tokenized already, otherwise as `encode_texts`.

    Args:
        model: A model with a text tower.
        processor: The model's processor, which tokenized them.
        texts: At least one.
        project: As `encode_texts` takes it.
        token_budget: As `encode_texts` takes it.
        show_progress: Show a progress bar, which counts tokens.
        on_batch: Called after each batch.

    Returns:
        (N, P) of unit length; with `project=False` (N, D), not normalized.

    Raises:
        ValueError: The budget is below one, the model is in training mode, or it gives NaN or
            infinity.
    """
    budget = default_token_budget(model.device) if token_budget is None else token_budget
    embeds = encode_distinct_texts(
        processor,
        texts,
        encode=partial(_embed_captions, model),
        device=model.device,
        token_budget=budget,
        # On a CPU the model packs texts of any lengths, and batches of few tokens are slow.
        plan=plan_packs if model.device.type == "cpu" else plan_token_batches,
        show_progress=show_progress,
        on_batch=on_batch,
    )
    return _project(model, model.to_text_embeds, embeds, inputs=texts) if project else embeds


def encode_images(
    model: LLM2CLIPModel | LLM2CLIPVisionModel,
    processor: LLM2CLIPProcessor,
    images: Sequence[Any],
    *,
    project: bool = True,
    batch_size: int | None = None,
    num_workers: int | None = None,
    show_progress: bool = False,
    on_batch: OnBatch | None = None,
) -> Tensor:
    """Encode images; threads decode them, beside a GPU the next batches while it works.

    Args:
        model: A model with a vision tower.
        processor: The model's processor.
        images: Paths, URLs, images packed in tar shards or Parquet files, PIL images, or arrays
            as the processor takes them; at least one. The same path is decoded once.
        project: Map the tower's embeddings into the space that texts and images share. False
            gives the embeddings before the projection, as an embedding store holds them.
        batch_size: Images per batch. Default: by device.
        num_workers: Threads that decode images. Default: one per core, at most 8.
        show_progress: Show a progress bar.
        on_batch: Called after each batch.

    Returns:
        (N, P) of unit length; with `project=False` (N, D), not normalized.

    Raises:
        ValueError: `images` is not a list or is empty, an image is missing or broken (it is
            named), a number is below one, the model is in training mode, or it gives NaN or
            infinity.

    Examples:
        >>> model, processor = load_model("my-model")
        >>> embeds = encode_images(model, processor, ["my-images/beach.jpg", "dog.png"])
        >>> embeds.shape == (2, model.config.projection_dim)
        True
    """
    if model.device.type == "cpu":
        raise_malloc_thresholds()
    size = default_batch_size(model.device) if batch_size is None else batch_size
    embeds = encode_distinct_images(
        processor,
        images,
        encode=partial(_embed_images, model),
        device=model.device,
        batch_size=size,
        num_workers=num_workers,
        show_progress=show_progress,
        on_batch=on_batch,
    )
    return _project(model, model.to_image_embeds, embeds, inputs=images) if project else embeds


def encode_prepared_images(
    model: LLM2CLIPModel | LLM2CLIPVisionModel,
    images: Sequence[Mapping[str, Tensor]],
    *,
    batch_size: int | None = None,
    on_batch: OnBatch | None = None,
) -> Tensor:
    """Encode images that the processor has prepared one by one.

    Args:
        model: A model with a vision tower.
        images: N results of the processor for one image each; at least one.
        batch_size: Images per batch. Default: by device.
        on_batch: Called after each batch.

    Returns:
        (N, P) of unit length.

    Raises:
        ValueError: The model gives NaN or infinity.
    """
    size = default_batch_size(model.device) if batch_size is None else batch_size
    embeds = encode_distinct(
        images,
        batches=lambda rows: split_evenly(len(rows), size=size),
        prepare=join_prepared,
        encode=partial(_embed_images, model),
        device=model.device,
        on_batch=on_batch,
    )
    return _project(model, model.to_image_embeds, embeds)


def project_captions(model: LLM2CLIPModel | LLM2CLIPTextModel, caption_embeds: Tensor) -> Tensor:
    """Map stored caption embeddings into the space that texts and images share.

    Args:
        model: The model whose LLM made them, or one with the same LLM.
        caption_embeds: (N, D) floating point on any device.

    Returns:
        (N, P) of unit length.

    Raises:
        ValueError: They are integers, or of another width than the LLM's, or the model gives NaN or
            infinity.
    """
    return _project(model, model.to_text_embeds, caption_embeds)


def project_images(model: LLM2CLIPModel | LLM2CLIPVisionModel, vision_embeds: Tensor) -> Tensor:
    """Map stored image embeddings into the space that texts and images share.

    Args:
        model: The model whose vision tower made them, or one with the same tower.
        vision_embeds: (N, D) floating point on any device.

    Returns:
        (N, P) of unit length.

    Raises:
        ValueError: They are integers, or of another width than the tower's, or the model gives NaN
            or infinity.
    """
    return _project(model, model.to_image_embeds, vision_embeds)


def iterate_token_batches(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    processor: LLM2CLIPProcessor,
    texts: Sequence[TokenizedText],
    plan: Sequence[Sequence[int]],
) -> Iterator[Tensor]:
    """Encode batches of texts that are tokenized already, without projection.

    Args:
        model: A model with a text tower.
        processor: The model's processor.
        texts: Tokenized texts.
        plan: Rows of the texts of each batch.

    Yields:
        (B, D) float32 on the CPU, for each batch.

    Raises:
        ValueError: The model gives NaN or infinity.
    """
    for _, embeds in iterate_batches(
        texts,
        plan,
        prepare=partial(pad_ids, processor),
        encode=partial(_embed_captions, model),
        device=model.device,
    ):
        yield embeds


def iterate_image_batches(
    model: LLM2CLIPModel | LLM2CLIPVisionModel,
    processor: LLM2CLIPProcessor,
    images: Sequence[Any],
    plan: Sequence[Sequence[int]],
    *,
    num_workers: int | None = None,
) -> Iterator[Tensor]:
    """Encode batches of images without projection; threads decode them.

    Args:
        model: A model with a vision tower.
        processor: The model's processor.
        images: As `encode_images` takes them.
        plan: Rows of the images of each batch.
        num_workers: Threads that decode images. Default: one per core, at most 8.

    Yields:
        (B, D) float32 on the CPU, for each batch.

    Raises:
        ValueError: An image is missing or broken (it is named), or the model gives NaN or
            infinity.
    """
    if model.device.type == "cpu":
        raise_malloc_thresholds()
    for _, embeds in iterate_batches(
        images,
        plan,
        prepare=partial(decode_images, processor),
        encode=partial(_embed_images, model),
        device=model.device,
        num_workers=num_workers,
    ):
        yield embeds


def default_token_budget(device: torch.device) -> int:
    """Return the maximum number of tokens per batch on a device, where none is given.

    Args:
        device: Where the model is. On a CPU the model divides a batch further.
    """
    return 4096 if device.type == "cpu" else 16384


def default_batch_size(device: torch.device) -> int:
    """Return the number of images per batch on a device, where none is given.

    Args:
        device: Where the model is. Larger batches overflow the caches of a CPU.
    """
    return 8 if device.type == "cpu" else 64


@cache
def raise_malloc_thresholds() -> bool:
    """Let glibc keep freed blocks of up to 256 MiB, 1 GiB of them; works once per process.

    Each batch asks for the same blocks, and each page that the system hands out anew costs a page
    fault, which convolutional towers suffer from most. By default glibc keeps no block above
    32 MiB, which is all that `packing_llm2clip.keep_freed_memory` reaches.

    Returns:
        Whether it was done: not without glibc, and not where the user set its variables.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
    )


@torch.no_grad()
def _project(
    model: LLM2CLIPModel | LLM2CLIPTextModel | LLM2CLIPVisionModel,
    to_embeds: Callable[[Tensor], Tensor],
    embeds: Tensor,
    *,
    inputs: Sequence[Any] | None = None,
) -> Tensor:
    """Project in parts, because all embeddings of a large dataset may not fit on the device."""
    with require_eval_mode(model), float32_as_such():
        parts = embeds.split(_PROJECTED_AT_ONCE)
        projected = torch.cat([to_embeds(part.to(model.device)).cpu() for part in parts])
    require_finite(projected, range(len(projected)), inputs)
    return projected


def _embed_captions(
    model: LLM2CLIPModel | LLM2CLIPTextModel, inputs: tuple[Tensor, Tensor]
) -> Tensor:
    input_ids, attention_mask = (value.to(model.device) for value in inputs)
    with require_eval_mode(model):
        return model.get_caption_embeds(input_ids=input_ids, attention_mask=attention_mask)


def _embed_images(
    model: LLM2CLIPModel | LLM2CLIPVisionModel, inputs: Mapping[str, Tensor]
) -> Tensor:
    on_device: dict[str, Any] = {name: value.to(model.device) for name, value in inputs.items()}
    with require_eval_mode(model):
        return model.get_vision_embeds(**on_device)
