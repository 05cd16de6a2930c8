"""Batches of texts and images for whatever encodes them: tokenized, decoded and prepared ahead.

Each distinct input is encoded once. N texts or images, D width of an embedding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..data.images.image_sources import ArrowImage, ParquetImage, TarImage, open_image
from ..packing_llm2clip import plan_token_batches
from ..processing_llm2clip import LLM2CLIPProcessor
from .float32 import float32_as_such
from .preparation import prepare_batches
from .tokenized_texts import TokenizedText

OnBatch: TypeAlias = Callable[[Sequence[int], Tensor], object]
"""Called after each batch with the rows of its inputs, (B,), and their tower's embeddings, (B, D).

A row is the first of equal inputs.
"""

_PIXELS_AT_ONCE = 2**22
_SHOWN = 5  # inputs that an error names


def encode_distinct_texts(
    processor: LLM2CLIPProcessor,
    texts: Sequence[TokenizedText],
    *,
    encode: Callable[[tuple[Tensor, Tensor]], Tensor],
    device: torch.device,
    token_budget: int,
    plan: Callable[..., list[list[int]]] = plan_token_batches,
    show_progress: bool = False,
    on_batch: OnBatch | None = None,
) -> Tensor:
    """Encode every distinct text once, the longest first.

    Args:
        processor: The model's processor.
        texts: Tokenized texts; at least one.
        encode: Computes (B, D) of token ids and mask, each (B, L) int64, padded on the right.
        device: Where `encode` computes.
        token_budget: Maximum tokens per batch.
        plan: Batches texts by their lengths: `plan_token_batches`, or `plan_packs` where `encode`
            spends no time on padding.
        show_progress: Show a progress bar, which counts tokens.
        on_batch: Called after each batch.

    Returns:
        (N, D) float32 on the CPU, in the order of the texts.

    Raises:
        ValueError: The budget is below one, or an embedding has NaN or infinity.
    """
    if token_budget < 1:
        raise ValueError(f"{token_budget=} holds no token; give a positive one, or None.")
    texts = list(texts)

    def count_tokens(rows: Sequence[int], embeds: Tensor) -> None:
        progress.update(sum(len(texts[row].ids) for row in rows))
        if on_batch is not None:
            on_batch(rows, embeds)

    # Tokens cost about the same each; texts do not, and the longest come first.
    num_tokens = sum({one.text: len(one.ids) for one in texts}.values())
    with tqdm(
        total=num_tokens, unit=" tokens", unit_scale=True, disable=not show_progress
    ) as progress:
        return encode_distinct(
            texts,
            batches=lambda rows: plan(
                [len(texts[row].ids) for row in rows], token_budget=token_budget
            ),
            prepare=partial(pad_ids, processor),
            encode=encode,
            device=device,
            on_batch=count_tokens,
        )


def encode_distinct_images(
    processor: LLM2CLIPProcessor,
    images: Sequence[Any],
    *,
    encode: Callable[[Mapping[str, Tensor]], Tensor],
    device: torch.device,
    batch_size: int,
    num_workers: int | None = None,
    show_progress: bool = False,
    on_batch: OnBatch | None = None,
) -> Tensor:
    """Decode images in threads and encode every distinct one once.

    Args:
        processor: The model's processor.
        images: As `encode_images` takes them.
        encode: Computes (B, D) of the processor's tensors by name.
        device: Where `encode` computes.
        batch_size: Images per batch.
        num_workers: Threads that decode images; None for `default_num_workers`.
        show_progress: Show a progress bar.
        on_batch: Called after each batch.

    Returns:
        (N, D) float32 on the CPU, in the order of the images.

    Raises:
        ValueError: `images` is not a list or is empty, an image is missing or broken, a number is
            below one, or an embedding has NaN or infinity.
    """
    if isinstance(images, str | bytes) or not isinstance(images, Sequence) or not images:
        raise ValueError(f"Got {images!r} for images; give a list of at least one.")
    if batch_size < 1 or (num_workers is not None and num_workers < 1):
        raise ValueError(f"{batch_size=}, {num_workers=}: each must be at least one.")

    def count_images(rows: Sequence[int], embeds: Tensor) -> None:
        progress.update(len(rows))
        if on_batch is not None:
            on_batch(rows, embeds)

    total = len(set(list_keys(images)))
    with tqdm(total=total, unit=" images", disable=not show_progress) as progress:
        return encode_distinct(
            images,
            batches=lambda rows: split_evenly(len(rows), size=batch_size),
            prepare=partial(decode_images, processor),
            encode=encode,
            device=device,
            num_workers=num_workers,
            on_batch=count_images,
        )


@torch.no_grad()
def encode_distinct(
    inputs: Sequence[Any],
    *,
    batches: Callable[[Sequence[Any]], Iterable[Sequence[int]]],
    prepare: Callable[[list[Any]], Any],
    encode: Callable[[Any], Tensor],
    device: torch.device,
    num_workers: int | None = 1,
    on_batch: OnBatch | None = None,
) -> Tensor:
    """Encode every distinct input once, in batches that are prepared ahead.

    Equal inputs get the same embedding, bit for bit: from two batches they would differ in the
    last bit, and no longer tie.

    Args:
        inputs: Texts, tokenized or not, addresses of images, or images; at least one. PIL images
            and arrays are equal only to themselves.
        batches: Takes the rows of the distinct inputs, each at its first occurrence, and returns
            batches of places in that list; each place once.
        prepare: Turns the inputs of a batch into what `encode` takes; runs in threads.
        encode: Computes (B, D) of any floating-point dtype.
        device: Where `encode` computes.
        num_workers: Threads that prepare batches; None for `default_num_workers`.
        on_batch: Called after each batch.

    Returns:
        (N, D) float32 on the CPU, in the order of the inputs.

    Raises:
        ValueError: An embedding has NaN or infinity; every such input of the batch is named.
    """
    keys = list_keys(inputs)
    first_of = {key: row for row, key in reversed(list(enumerate(keys)))}
    firsts = sorted(first_of.values())
    plan = [[firsts[place] for place in places] for places in batches(firsts)]
    place_of = {row: place for place, row in enumerate(firsts)}
    embeddings: Tensor | None = None
    for rows, embeds in iterate_batches(
        inputs, plan, prepare=prepare, encode=encode, device=device, num_workers=num_workers
    ):
        if embeddings is None:
            embeddings = torch.empty(len(firsts), embeds.shape[1], dtype=torch.float32)
        embeddings[[place_of[row] for row in rows]] = embeds
        if on_batch is not None:
            on_batch(rows, embeds)
    assert embeddings is not None
    if len(firsts) == len(inputs):
        return embeddings
    return embeddings[[place_of[first_of[key]] for key in keys]]


@torch.no_grad()
def iterate_batches(
    inputs: Sequence[Any],
    plan: Sequence[Sequence[int]],
    *,
    prepare: Callable[[list[Any]], Any],
    encode: Callable[[Any], Tensor],
    device: torch.device,
    num_workers: int | None = 1,
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Encode batches of inputs, which are prepared ahead.

    Args:
        inputs: Texts, tokenized or not, addresses of images, or images.
        plan: Rows of the inputs of each batch.
        prepare: Turns the inputs of a batch into what `encode` takes; runs in threads.
        encode: Computes (B, D) of any floating-point dtype.
        device: Where `encode` computes.
        num_workers: Threads that prepare batches; None for `default_num_workers`.

    Yields:
        Rows of a batch, and their embeddings, (B, D) float32 on the CPU.

    Raises:
        ValueError: An embedding has NaN or infinity; every such input of the batch is named.
    """
    parts = ([inputs[row] for row in rows] for rows in plan)
    in_threads = prepare_batches(parts, prepare, device=device, num_workers=num_workers)
    with closing(in_threads) as prepared, float32_as_such():
        for rows, batch in zip(plan, prepared, strict=True):
            embeds = encode(batch).float().cpu()
            require_finite(embeds, rows, inputs)
            yield rows, embeds


def pad_ids(processor: LLM2CLIPProcessor, texts: Sequence[TokenizedText]) -> tuple[Tensor, Tensor]:
    """Pad token ids on the right.

    Args:
        processor: The model's processor.
        texts: B tokenized texts.

    Returns:
        Ids and mask, each (B, L) int64.
    """
    longest = max(len(one.ids) for one in texts)
    input_ids = torch.full((len(texts), longest), processor.tokenizer.pad_token_id)
    attention_mask = torch.zeros(len(texts), longest, dtype=torch.long)
    for line, one in enumerate(texts):
        input_ids[line, : len(one.ids)] = torch.from_numpy(one.ids)
        attention_mask[line, : len(one.ids)] = 1
    return input_ids, attention_mask


def split_evenly(count: int, *, size: int) -> list[range]:
    """Split rows into batches in their order.

    Args:
        count: Number of rows.
        size: Rows per batch; the last one may have fewer.

    Returns:
        The rows of each batch.
    """
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def decode_images(processor: LLM2CLIPProcessor, images: Sequence[Any]) -> dict[str, Tensor]:
    """Open images and prepare them for a vision tower.

    Args:
        processor: The model's processor.
        images: As `encode_images` takes them.

    Returns:
        The processor's tensors by name.

    Raises:
        ValueError: An image is missing or broken.
    """
    return prepare_images(processor, map(open_image, images))


def prepare_images(processor: LLM2CLIPProcessor, images: Iterable[Any]) -> dict[str, Tensor]:
    """Prepare images for a vision tower, large ones one by one: few are in memory at a time.

    Args:
        processor: The model's processor.
        images: Images as the processor takes them, decoded when they are asked for.

    Returns:
        The processor's tensors by name; none where there is no image.

    Raises:
        ValueError: An image is missing or broken.
    """
    parts: list[Mapping[str, Tensor]] = []
    waiting: list[Any] = []
    num_pixels = 0
    for image in images:
        waiting.append(image)
        num_pixels += image.width * image.height if isinstance(image, Image.Image) else 0
        if num_pixels > _PIXELS_AT_ONCE:
            parts.append(processor(images=waiting))
            waiting, num_pixels = [], 0
    if waiting:
        parts.append(processor(images=waiting))
    return join_prepared(parts) if parts else {}


def join_prepared(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join what the processor made of some images each into one batch.

    Args:
        parts: Its tensors by name; at least one.
    """
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def require_finite(
    embeds: Tensor, rows: Sequence[int], inputs: Sequence[Any] | None = None
) -> None:
    """Refuse embeddings with NaN or infinity.

    Args:
        embeds: (B, D).
        rows: What the error calls each of them.
        inputs: All inputs, by row; None to name the rows alone.

    Raises:
        ValueError: There are some; the first inputs are named.
    """
    broken = (~embeds.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if not broken:
        return
    named = [
        f"number {row + 1}" + ("" if inputs is None else f" ({str(inputs[row])[:80]!r})")
        for row in (rows[place] for place in broken[:_SHOWN])
    ]
    more = f" and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
    raise ValueError(
        f"The model gives NaN or infinity for {len(broken)} of {len(rows)} inputs: "
        f"{', '.join(named)}{more}. Run it in float32 (--dtype float32); if they remain, its "
        "weights are damaged: check its folder with llm2clip doctor."
    )


def list_keys(inputs: Sequence[Any]) -> list[Hashable]:
    """Return for each input what equal inputs share, and no others.

    An image in memory is equal to itself alone. Inputs of a sequence that is not a list are all
    different: it may make them anew at each access, where an `id` says nothing.

    Args:
        inputs: Texts, tokenized or not, addresses of images, or images.
    """
    if not isinstance(inputs, list | tuple):
        return list(range(len(inputs)))
    by_value = (str, os.PathLike, TarImage, ParquetImage, ArrowImage)
    shared = [one.text if isinstance(one, TokenizedText) else one for one in inputs]
    keys: list[Any] = [one if isinstance(one, by_value) else ("id", id(one)) for one in shared]
    return keys
