"""The one interface of everything that is evaluated, and what its implementations share.

N texts or images, D width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ...configs.evaluation_config import EncoderConfig
from ...data.image_sources import open_image
from ...encoding.devices import find_device
from ...encoding.float32 import float32_as_such
from ...image_loading_llm2clip import load_images


@dataclass(frozen=True)
class EncodedTexts:
    """Embeddings of texts.

    Attributes:
        embeds: (N, D) float32 on the CPU, in the order of the texts, of any length.
        is_truncated: (N,) bool, which texts were cut at the encoder's maximum length; None when
            nothing is known of it, as with stored embeddings.
    """

    embeds: Tensor
    is_truncated: Tensor | None


@dataclass(frozen=True)
class EncoderDescription:
    """Everything that decides an encoder's embeddings, known before its weights are loaded.

    Attributes:
        kind: which implementation; a key of `kinds.KINDS`.
        source: what the user gave.
        fingerprint: digests of the weights and whatever else tells two models apart.
        text: prompt, maximum tokens, padding, letter case; None for images alone.
        images: resolution, mean, std, resizing, cropping; None for texts alone.
        dtype: of the weights as they are run.
        run: device, batch size and kind of float32, which do not move a score in float32.
        untrained_parts: of a model of this package, those with random weights.
    """

    kind: str
    source: str
    fingerprint: dict[str, str]
    text: dict[str, Any] | None
    images: dict[str, Any] | None
    dtype: str
    run: dict[str, Any] = field(default_factory=dict)
    untrained_parts: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As values that JSON can hold."""
        told = asdict(self)
        untrained = list(told.pop("untrained_parts"))
        return told | ({"untrained_parts": untrained} if untrained else {})


class Encoder(Protocol):
    """What is evaluated. Weights are loaded when the first embedding is asked for."""

    def describe(self) -> EncoderDescription:
        """Say what decides the embeddings, from files alone wherever they say it."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts; raises ValueError naming every blank one."""
        ...

    def encode_images(self, images: Sequence[Any], *, names: Sequence[str]) -> Tensor:
        """Encode images into (N, D) float32 on the CPU, of any length.

        Args:
            images: addresses as `data.images.ImageSource`, or PIL images.
            names: what their set calls them; stored embeddings are found by it.
        Raises: ValueError naming the image that is missing or broken.
        """
        ...


def choose_batch_size(config: EncoderConfig) -> int:
    """Return the batch size, or the default of the device.

    Args:
        config: How a model is run.
    """
    return config.batch_size or (16 if find_device(config.device).type == "cpu" else 128)


def choose_dtype(config: EncoderConfig, saved: str) -> str:
    """Return the name of the dtype in which a model runs.

    Args:
        config: How it is run.
        saved: Name of the dtype of its saved weights.
    """
    return saved if config.dtype == "saved" else config.dtype


def dtype_argument(config: EncoderConfig) -> str:
    """Return what `from_pretrained` takes as `dtype`.

    Args:
        config: How a model is run.
    """
    return "auto" if config.dtype == "saved" else config.dtype


def describe_run(config: EncoderConfig) -> dict[str, Any]:
    """Return what a description says of the run; it changes no score in float32.

    Args:
        config: How a model is run.
    """
    return {
        "device": str(find_device(config.device)),
        "batch_size": choose_batch_size(config),
        "float32_products": "ieee",  # never TF32; see `encoding.float32`
    }


@torch.inference_mode()
def encode_distinct(
    items: Sequence[Hashable],
    prepare: Callable[[list[Any]], Any],
    encode: Callable[[Any], Tensor],
    config: EncoderConfig,
    *,
    unit: str,
    size_of: Callable[[Any], int] | None = None,
) -> Tensor:
    """Encode every distinct item once, in batches, and give each item its embedding.

    Equal items get the same embedding, bit for bit: from two batches they would differ in the last
    bit, and no longer tie.

    Args:
        prepare: a batch of items into what `encode` takes; runs ahead in a thread.
        encode: to (B, D), on any device and of any float dtype.
        unit: what an item is called in the progress bar.
        size_of: items of about the same size share a batch, the largest first.
    Returns: (N, D) float32 on the CPU.
    """
    distinct = {item: row for row, item in enumerate(dict.fromkeys(items))}
    ordered = list(distinct)
    if size_of is not None:
        ordered.sort(key=size_of, reverse=True)
    size = choose_batch_size(config)
    batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    embeddings: Tensor | None = None
    progress = tqdm(total=len(ordered), unit=f" {unit}", disable=not config.show_progress)
    with ThreadPoolExecutor(1) as pool, float32_as_such():
        ahead = pool.submit(prepare, batches[0])
        for number, batch in enumerate(batches):
            prepared = ahead.result()
            if number + 1 < len(batches):
                ahead = pool.submit(prepare, batches[number + 1])
            embeds = encode(prepared).float().cpu()
            if embeddings is None:
                embeddings = torch.empty(len(ordered), embeds.shape[1])
            embeddings[[distinct[item] for item in batch]] = embeds
            progress.update(len(batch))
    progress.close()
    assert embeddings is not None
    return embeddings[[distinct[item] for item in items]]


def require_images(images: Sequence[Any]) -> None:
    """Raise ValueError for an empty list."""
    if not len(images):
        raise ValueError("Got no images; give at least one.")


def load_rgb(images: Sequence[Any]) -> list[Any]:
    """Open images the same way for every encoder: upright, on white, as RGB PIL images."""
    loaded = load_images([open_image(image) for image in images])
    assert isinstance(loaded, list)
    return loaded
