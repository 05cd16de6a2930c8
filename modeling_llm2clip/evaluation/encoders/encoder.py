"""The one interface of everything that is evaluated, and what its implementations share.

N is a number of texts or images, D the width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from torch import Tensor
from tqdm import tqdm

from ...configs.evaluation_config import EncoderConfig
from ...data.images.image_sources import open_image
from ...encoding.batches import encode_distinct, list_keys
from ...encoding.devices import find_device
from ...image_loading_llm2clip import load_images


@dataclass(frozen=True)
class EncodedTexts:
    """Embeddings of texts.

    Attributes:
        embeds: (N, D) float32 on the CPU, in the order of the texts, of any length.
        is_truncated: (N,) bool, which texts were truncated at the encoder's maximum length; None if
            that is not known, as with stored embeddings.
    """

    embeds: Tensor
    is_truncated: Tensor | None


@dataclass(frozen=True, kw_only=True)
class EncoderDescription:
    """Everything that decides an encoder's embeddings, known before its weights are loaded.

    Attributes:
        model_type: One of `auto.MODEL_TYPES`, or the family of a transformers model.
        source: What the user gave.
        fingerprint: Digests of the weights and of whatever else distinguishes two models.
        text: Prompt, maximum tokens, padding, case; None if it takes no texts.
        images: Resolution, mean, std, resizing, cropping; None if it takes no images.
        dtype: Dtype of the weights as they are run.
        run: Device, batch size and kind of float32, which change no score in float32.
        untrained_parts: Parts of a model of this package that have random weights.
    """

    model_type: str
    source: str
    fingerprint: dict[str, str]
    text: dict[str, Any] | None
    images: dict[str, Any] | None
    dtype: str
    run: dict[str, Any] = field(default_factory=dict)
    untrained_parts: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the description as JSON values."""
        content = asdict(self)
        untrained = list(content.pop("untrained_parts"))
        return content | ({"untrained_parts": untrained} if untrained else {})


class Encoder(Protocol):
    """What is evaluated; its weights are loaded when the first embedding is needed."""

    def describe(self) -> EncoderDescription:
        """Say what decides the embeddings, from files alone if they say it."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts.

        Args:
            texts: At least one.

        Raises:
            ValueError: A text is blank.
        """
        ...

    def encode_images(self, images: Sequence[Any], *, names: Sequence[str]) -> Tensor:
        """Encode images.

        Args:
            images: `ImageSource` addresses, or PIL images; at least one.
            names: Their names in the dataset, by which stored embeddings are found.

        Returns:
            (N, D) float32 on the CPU, of any length.

        Raises:
            ValueError: An image is missing or broken.
        """
        ...


def choose_batch_size(config: EncoderConfig) -> int:
    """Return the batch size, or the default of the device.

    Args:
        config: How the model is run.
    """
    return config.batch_size or (16 if find_device(config.device).type == "cpu" else 128)


def choose_dtype(config: EncoderConfig, saved: str) -> str:
    """Name the dtype that the weights are run in.

    Args:
        config: How the model is run.
        saved: Dtype of the saved weights.
    """
    return saved if config.dtype == "saved" else config.dtype


def find_loading_dtype(config: EncoderConfig) -> str:
    """Return what `from_pretrained` takes as `dtype`.

    Args:
        config: How the model is run.
    """
    return "auto" if config.dtype == "saved" else config.dtype


def describe_run(config: EncoderConfig) -> dict[str, Any]:
    """Describe how a model is run, for `EncoderDescription.run`.

    Args:
        config: How the model is run.
    """
    return {
        "device": str(find_device(config.device)),
        "batch_size": choose_batch_size(config),
        "float32_products": "ieee",  # never TF32; see `encoding.float32`
    }


def encode_batches(
    items: Sequence[Any],
    prepare: Callable[[list[Any]], Any],
    encode: Callable[[Any], Tensor],
    config: EncoderConfig,
    *,
    unit: str,
    size_of: Callable[[Any], int] | None = None,
) -> Tensor:
    """Encode every distinct item once, in batches that are prepared ahead.

    Args:
        items: Texts or images; at least one.
        prepare: Makes what `encode` takes of a batch of items; runs in threads.
        encode: Makes (B, D) of any float dtype, on the device of `config`.
        config: How the model is run.
        unit: Name of the items in the progress bar.
        size_of: Items of similar size share a batch, the largest first. None keeps the order.

    Returns:
        (N, D) float32 on the CPU.

    Raises:
        ValueError: An embedding has NaN or infinity.
    """
    size = choose_batch_size(config)

    def plan(rows: Sequence[int]) -> list[list[int]]:
        places = list(range(len(rows)))
        if size_of is not None:
            places.sort(key=lambda place: size_of(items[rows[place]]), reverse=True)
        return [places[start : start + size] for start in range(0, len(places), size)]

    items = list(items)
    total = len(set(list_keys(items)))
    with tqdm(total=total, unit=f" {unit}", disable=not config.show_progress) as progress:
        return encode_distinct(
            items,
            batches=plan,
            prepare=prepare,
            encode=encode,
            device=find_device(config.device),
            num_workers=config.num_workers,
            on_batch=lambda rows, _: progress.update(len(rows)),
        )


def require_images(images: Sequence[Any]) -> None:
    """Raise ValueError for an empty list.

    Args:
        images: Images of any type.
    """
    if not len(images):
        raise ValueError("Got no images; give at least one.")


def load_rgb(images: Sequence[Any]) -> list[Any]:
    """Open images in the same way for every encoder: upright, on white, as RGB PIL images.

    Args:
        images: `ImageSource` addresses, or PIL images.
    """
    loaded = load_images([open_image(image) for image in images])
    assert isinstance(loaded, list)
    return loaded
