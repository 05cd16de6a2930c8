"""Models under evaluation, each described and around an encoder, and their descriptions.

N is a number of texts or images, D the width of the embeddings.
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

# Families of transformers differ in these names; null is a step that a model lacks.
_PATCH_FIELDS = ("patch_size", "max_num_patches")
# How `load_images` opens an image, for every model type. The plain `convert("RGB")` of the
# papers' code ignores the orientation and drops the transparency.
OPENING = {"orientation": "EXIF applied", "transparency": "on white"}
ACTIVATIONS = ("gelu", "quick_gelu")
OF_ITS_TOWER = "of its tower"
_ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj")
_SAME_BUT_FOR_CASE = ["A Red Cat on Two Mats", "a red cat on two mats"]


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
        model_type: One of `ModelType`, or the family of a transformers model.
        source: Folder, Hub id or file as the user gave it.
        fingerprint: Digests of the weights and of whatever else distinguishes two models.
        text: Prompt, maximum tokens, padding, case; None if it takes no texts.
        images: Resolution, mean, std, resizing, cropping; None if it takes no images.
        dtype: Dtype of the weights as they are run.
        run: Device, batch sizes and kind of float32, which change no score in float32; and parts of
            a model of this package that have random weights.
    """

    model_type: str
    source: str
    fingerprint: dict[str, str]
    text: dict[str, Any] | None
    images: dict[str, Any] | None
    dtype: str
    run: dict[str, Any] = field(default_factory=dict)


class EvaluationEncoder(ABC):
    """A model under evaluation: its description, and an encoder that is loaded when it is needed.

    Each text and each image is encoded once, and its embedding held; `encoded` counts them.
    `source` is the user's name for the model, and `path` its folder or file.
    """

    _processor: Any  # as `Encoder.processor`
    _model: Any  # an `Encoder`, a cached property
    _on_batch: OnBatch | None = None  # of images

    def __init__(self, path: Path, config: EncoderConfig, *, source: str) -> None:
        self._path = path
        self._run_config = config
        self._source = source
        self._device = find_device(config.device)
        self._token_budget, self._batch_size = choose_batches(self._device, config.batch_size)
        self.encoded = {"texts": 0, "images": 0}
        self._texts, self._images = KnownRows(), KnownRows()
        self._is_truncated: dict[str, bool] = {}
        self._held: list[Any] = []  # images, so that no other gets the `id` of one in memory

    @property
    def ranking_device(self) -> torch.device:
        """Where embeddings are compared: the encoder's device, or the CPU in place of MPS."""
        return self._device if has_float64(self._device) else torch.device("cpu")

    @cached_property
    @abstractmethod
    def description(self) -> EncoderDescription:
        """Everything that decides the embeddings, from files alone if they say it."""

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts, truncated at the model's maximum length."""
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
        """Encode `ImageSource` addresses or PIL images: (N, D) float32 on the CPU, of any length.

        Images are identified by their address, or themselves, and their name in the dataset, by
        which stored embeddings are found.
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
        """Describe the images since the last call, if they are unlike those of the training.

        Only a model of this package knows which these were.
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
            "float32_products": "ieee",  # never TF32; see `encoding.float32`
        }


def choose_dtype(config: EncoderConfig, saved: str) -> str:
    """Name the dtype that the weights are run in; `from_pretrained` calls that of files "auto"."""
    return saved if config.dtype in ("auto", "saved") else config.dtype


class KnownRows:
    """Embeddings of inputs that were encoded already."""

    _embeds: Tensor

    def __init__(self) -> None:
        self._row_of: dict[Hashable, int] = {}

    def list_new(self, inputs: Sequence[Any]) -> list[Any]:
        return [item for item in dict.fromkeys(inputs) if item not in self._row_of]

    def add(self, inputs: Sequence[Any], embeds: Tensor) -> None:
        self._embeds = torch.cat([self._embeds, embeds]) if self._row_of else embeds
        self._row_of.update(zip(inputs, range(len(self._row_of), len(self._embeds)), strict=True))

    def take(self, inputs: Sequence[Any]) -> Tensor:
        """Return the embeddings of inputs, (N, D); all of them, in their order, are not copied."""
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
    """Name the activation that a configuration of transformers states.

    The weights do not show it, and a wrong one lowers the scores.
    """
    fields = config if isinstance(config, Mapping) else config.to_dict()
    stated = (fields[name] for name in _ACTIVATION_FIELDS if isinstance(fields.get(name), str))
    return str(next(stated, OF_ITS_TOWER))


def is_uncased(tokenizer: Any) -> bool:
    mixed, lower = tokenizer(_SAME_BUT_FOR_CASE, verbose=False)["input_ids"]
    return bool(mixed == lower)
