"""Wrap models for evaluation: a common interface to encode with a model and to describe it.

N is the number of texts or images, D the width of the embeddings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Resampling
from torch import Tensor

from ...configs.evaluation_config import EncoderConfig
from ...encoding.batches import OnBatch, list_keys
from ...encoding.devices import find_device, has_float64
from ...encoding.encoder_interface import choose_batches
from ...encoding.tokenized_texts import TokenizedTexts

# Patch fields, which only some image processors have.
_PATCH_FIELDS = ("patch_size", "max_num_patches")
# How `load_images` opens an image for every model type. The papers' plain `convert("RGB")` ignores
# orientation and drops transparency.
OPENING = {"orientation": "EXIF applied", "transparency": "on white"}
ACTIVATIONS = ("gelu", "quick_gelu")
OF_ITS_TOWER = "of its tower"
_ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj")
_SAME_BUT_FOR_CASE = ["A Red Cat on Two Mats", "a red cat on two mats"]


@dataclass(frozen=True)
class EncodedTexts:
    """Embeddings of texts.

    Attributes:
        embeds: (N, D) float32 on the CPU, in the order of the texts, not normalized.
        is_truncated: (N,) bool, whether a text was truncated to the encoder's maximum length; None
            if that is unknown, for example for stored embeddings.
    """

    embeds: Tensor
    is_truncated: Tensor | None


@dataclass(frozen=True, kw_only=True)
class EncoderDescription:
    """Everything that determines an encoder's embeddings, known before its weights are loaded.

    Attributes:
        model_type: One of `ModelType`, or the family of a transformers model.
        source: Folder, Hub id or file, as passed by the user.
        fingerprint: Digests of the weights and everything else that identifies the model.
        text: Prompt, maximum tokens, padding, case; None if the model takes no texts.
        images: Resolution, mean, std, resizing, cropping; None if the model takes no images.
        dtype: Dtype the weights are run in.
        run: Device, batch sizes and float32 mode, which do not affect scores in float32; also the
            parts of an LLM2CLIP model that have random weights.
    """

    model_type: str
    source: str
    fingerprint: dict[str, str]
    text: dict[str, Any] | None
    images: dict[str, Any] | None
    dtype: str
    run: dict[str, Any] = field(default_factory=dict)


class EvaluationEncoder(ABC):
    """A model under evaluation: a description, and an encoder that is loaded when needed.

    Each text and image is encoded once and its embedding is cached; `encoded` counts them.
    `source` is the model as passed by the user, and `path` is the model's folder or file.
    """

    _processor: Any  # same as `Encoder.processor`
    _model: Any  # an `Encoder`, loaded by a cached property
    _on_batch: OnBatch | None = None  # called for each batch of images

    def __init__(self, path: Path, config: EncoderConfig, *, source: str) -> None:
        self._path = path
        self._run_config = config
        self._source = source
        self._device = find_device(config.device)
        self._token_budget, self._batch_size = choose_batches(self._device, config.batch_size)
        self.encoded = {"texts": 0, "images": 0}
        self._texts, self._images = KnownRows(), KnownRows()
        self._is_truncated: dict[str, bool] = {}
        self._held: list[Any] = []  # keeps images alive, so that their `id` is not reused

    @property
    def ranking_device(self) -> torch.device:
        """Device on which embeddings are compared: the encoder's, or the CPU instead of MPS."""
        return self._device if has_float64(self._device) else torch.device("cpu")

    @cached_property
    @abstractmethod
    def description(self) -> EncoderDescription:
        """Everything that determines the embeddings, read from the files if possible."""

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts, truncated to the model's maximum length."""
        new = self._texts.list_new(texts)
        if new:
            encoded = self._encode_new_texts(new)
            self._texts.add(new, encoded.embeds)
            self.encoded["texts"] += len(new)
            if encoded.is_truncated is not None:
                self._is_truncated.update(zip(new, encoded.is_truncated.tolist(), strict=True))
        is_truncated = [self._is_truncated.get(text) for text in texts]
        known = None if None in is_truncated else torch.tensor(is_truncated)
        return EncodedTexts(self._texts.take(texts), known)

    def encode_images(self, images: Sequence[Any], *, names: Sequence[str]) -> Tensor:
        """Encode `ImageSource` or PIL images: (N, D) float32 on the CPU, not normalized.

        The cache key of an image is its source (or the PIL object) and its name in the dataset.
        Stored embeddings are looked up by name.
        """
        images = list(images)
        keys = list(zip(list_keys(images), names, strict=True))
        image_of = dict(zip(keys, images, strict=True))
        new = self._images.list_new(keys)
        if new:
            held = [image_of[key] for key in new]
            self._images.add(new, self._encode_new_images(held, [name for _, name in new]))
            self._held += held
            self.encoded["images"] += len(new)
        return self._images.take(keys)

    def take_far_images(self) -> str | None:
        """Describe the images encoded since the last call if they differ from the training images.

        Only LLM2CLIP models store a summary of their training images.
        """
        return None

    def _encode_new_texts(self, texts: list[str]) -> EncodedTexts:
        tokens = TokenizedTexts(self._processor, texts)
        embeds = self._model.encode_texts(
            tokens, token_budget=self._token_budget, show_progress=self._run_config.show_progress
        )
        return EncodedTexts(embeds, torch.from_numpy(tokens.is_truncated))

    def _encode_new_images(self, images: list[Any], names: list[str]) -> Tensor:  # noqa: ARG002
        embeds: Tensor = self._model.encode_images(
            images,
            batch_size=self._batch_size,
            show_progress=self._run_config.show_progress,
            on_batch=self._on_batch,
        )
        return embeds

    def _describe_run(self) -> dict[str, Any]:
        return {
            "device": str(self._device),
            "tokens_per_batch": self._token_budget,
            "images_per_batch": self._batch_size,
            "float32_products": "ieee",  # never TF32; see `encoding.precision`
        }


def choose_dtype(config: EncoderConfig, saved: str) -> str:
    """Return the dtype to run the weights in: the config's dtype, or `saved` if it names none."""
    return saved if config.dtype in ("auto", "saved") else config.dtype


class KnownRows:
    """Cache of the embeddings of inputs that were already encoded."""

    _embeds: Tensor

    def __init__(self) -> None:
        self._row_of: dict[Hashable, int] = {}

    def list_new(self, inputs: Sequence[Any]) -> list[Any]:
        return [item for item in dict.fromkeys(inputs) if item not in self._row_of]

    def add(self, inputs: Sequence[Any], embeds: Tensor) -> None:
        self._embeds = torch.cat([self._embeds, embeds]) if self._row_of else embeds
        self._row_of.update(zip(inputs, range(len(self._row_of), len(self._embeds)), strict=True))

    def take(self, inputs: Sequence[Any]) -> Tensor:
        """Return the embeddings of inputs, (N, D); not copied if the inputs are the whole cache."""
        rows = torch.tensor([self._row_of[item] for item in inputs])
        is_whole = torch.equal(rows, torch.arange(len(self._embeds)))
        return self._embeds if is_whole else self._embeds[rows]


def describe_image_processor(image_processor: Any) -> dict[str, Any]:
    fields: dict[str, Any] = image_processor.to_dict()
    resample = fields.get("resample")
    normalizes = fields.get("do_normalize", True)
    moments = (
        [round(float(value), 8) for value in fields[name]]
        if normalizes and fields.get(name) is not None
        else None
        for name in ("image_mean", "image_std")
    )
    # None means that the processor skips the step.
    described = {
        **OPENING,
        "processor": type(image_processor).__name__,
        "resize": fields.get("size") if fields.get("do_resize", True) else None,
        "crop": fields.get("crop_size") if fields.get("do_center_crop") else None,
        "interpolation": None if resample is None else Resampling(int(resample)).name.lower(),
        **dict(zip(("mean", "std"), moments, strict=True)),
        "scale": fields.get("rescale_factor") if fields.get("do_rescale", True) else None,
    }
    return described | {name: fields[name] for name in _PATCH_FIELDS if name in fields}


def describe_activation(config: Any) -> str:
    """Return the activation named in a transformers configuration.

    The activation cannot be inferred from the weights, and a wrong activation lowers the scores.
    """
    fields = config if isinstance(config, Mapping) else config.to_dict()
    stated = (fields[name] for name in _ACTIVATION_FIELDS if isinstance(fields.get(name), str))
    return str(next(stated, OF_ITS_TOWER))


def is_uncased(tokenizer: Any) -> bool:
    mixed, lower = tokenizer(_SAME_BUT_FOR_CASE, verbose=False)["input_ids"]
    return bool(mixed == lower)
