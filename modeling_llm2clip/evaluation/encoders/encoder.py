"""The encoder interface, the base of models from other packages, and their descriptions.

N is a number of texts or images, D the width of the embeddings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Resampling
from torch import Tensor

from ...configs.evaluation_config import EncoderConfig
from ...configuration_llm2clip import LLM2CLIPConfig
from ...data.images.image_sources import open_image
from ...encoding.batches import OnBatch, encode_distinct, list_keys, split_evenly
from ...encoding.devices import find_device
from ...encoding.tokenized_texts import TokenizedText, TokenizedTexts
from ...image_loading_llm2clip import load_images
from ...model_folders.model_loading import find_untrained_parts
from ...processing_llm2clip import check_texts

_ROWS_COPIED_AT_ONCE = 2**16
# transformers' families name the same things differently; null is what a model does not do.
_PATCH_FIELDS = ("patch_size", "max_num_patches")
# How `load_images` opens an image, for every model type. The plain `convert("RGB")` of the
# papers' code ignores the orientation and drops the transparency.
OPENING = {"orientation": "EXIF applied", "transparency": "on white"}
ACTIVATIONS = ("gelu", "quick_gelu")
OF_ITS_TOWER = "of its tower"
_ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj")
# A batch of texts is that many tokens per text.
_TOKENS_PER_TEXT = 64
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
        run: Device, batch size and kind of float32, which change no score in float32; and parts of
            a model of this package that have random weights.
    """

    model_type: str
    source: str
    fingerprint: dict[str, str]
    text: dict[str, Any] | None
    images: dict[str, Any] | None
    dtype: str
    run: dict[str, Any] = field(default_factory=dict)


class Encoder(ABC):
    """A model under evaluation; its weights are loaded when the first embedding is needed.

    `source` is what the user gave, and `path` the folder or file that it was found to be.
    """

    def __init__(self, path: Path, config: EncoderConfig, *, source: str) -> None:
        self._path = path
        self._run_config = config
        self._source = source

    @cached_property
    @abstractmethod
    def description(self) -> EncoderDescription:
        """Everything that decides the embeddings, from files alone if they say it."""

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts."""

    @abstractmethod
    def encode_images(self, images: Sequence[Any], *, names: Sequence[str]) -> Tensor:
        """Encode `ImageSource` addresses or PIL images: (N, D) float32 on the CPU, of any length.

        Stored embeddings are found by the names of the images in the dataset.
        """

    def take_far_images(self) -> str | None:
        """Describe the images since the last call, if they are unlike those of the training.

        Only a model of this package knows which these were.
        """
        return None


def choose_dtype(config: EncoderConfig, saved: str) -> str:
    """Name the dtype that the weights are run in; `from_pretrained` calls that of files "auto"."""
    return saved if config.dtype == "saved" else config.dtype


def describe_run(config: EncoderConfig) -> dict[str, Any]:
    return {
        "device": str(find_device(config.device)),
        "batch_size": _choose_batch_size(config),
        "float32_products": "ieee",  # never TF32; see `encoding.float32`
    }


def describe_untrained(config: LLM2CLIPConfig) -> dict[str, Any]:
    """Name the parts with random weights, for `EncoderDescription.run`."""
    parts = find_untrained_parts(config)
    return {"untrained_parts": list(parts)} if parts else {}


def _choose_batch_size(config: EncoderConfig) -> int:
    return config.batch_size or (16 if find_device(config.device).type == "cpu" else 128)


class ModelEncoder(Encoder):
    """Base of the encoders of other packages' models: checks, batches, truncated texts."""

    @property
    @abstractmethod
    def _max_tokens(self) -> int | None:
        """Longest text; None for no limit."""

    @abstractmethod
    def _list_ids(self, texts: list[str]) -> list[list[int]]:
        """Tokenize texts without truncation."""

    def _prepare_texts(self, texts: list[TokenizedText]) -> Any:
        """Make what `_embed_texts` takes of a batch; runs in threads."""
        return [one.text for one in texts]

    @abstractmethod
    def _embed_texts(self, prepared: Any) -> Tensor:
        """Encode a batch, (B, D) of any float dtype."""

    def _prepare_images(self, images: list[Any]) -> Any:
        """Make what `_embed_images` takes of a batch of RGB PIL images; runs in threads."""
        return images

    @abstractmethod
    def _embed_images(self, prepared: Any) -> Tensor:
        """Encode a batch, (B, D) of any float dtype."""

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts, truncated at the model's maximum length, the longest first."""
        check_texts(list(texts))
        distinct = list(dict.fromkeys(texts))
        limit = self._max_tokens
        ids: list[list[int]] = [[]] * len(distinct) if limit is None else self._list_ids(distinct)
        ids_of = dict(zip(distinct, map(np.array, ids), strict=True))
        items = [TokenizedText(text, ids_of[text]) for text in texts]
        sizes = [len(one.text if limit is None else one.ids) for one in items]
        prepare, embed = self._prepare_texts, self._embed_texts
        embeds = self._encode(items, prepare, embed, unit=" texts", sizes=sizes)
        is_truncated = None if limit is None else torch.tensor([size > limit for size in sizes])
        return EncodedTexts(embeds, is_truncated)

    def encode_images(self, images: Sequence[Any], *, names: Sequence[str]) -> Tensor:  # noqa: ARG002
        """Encode images with the model's own image processor: upright, on white, as RGB."""

        def prepare(batch: list[Any]) -> Any:
            return self._prepare_images(list(load_images([open_image(image) for image in batch])))

        images = list(images)
        return self._encode(
            images, prepare, self._embed_images, unit=" images", sizes=[0] * len(images)
        )

    def _encode(
        self,
        items: list[Any],
        prepare: Callable[[list[Any]], Any],
        encode: Callable[[Any], Tensor],
        *,
        unit: str,
        sizes: Sequence[int],
    ) -> Tensor:
        """Encode every distinct item once, in batches that are prepared ahead."""
        config = self._run_config

        def plan(rows: Sequence[int]) -> list[list[int]]:
            places = sorted(range(len(rows)), key=lambda place: -sizes[rows[place]])
            parts = split_evenly(len(rows), size=_choose_batch_size(config))
            return [places[part.start : part.stop] for part in parts]

        return encode_distinct(
            items,
            batches=plan,
            prepare=prepare,
            encode=encode,
            device=find_device(config.device),
            num_workers=config.num_workers,
            unit=unit,
            show_progress=config.show_progress,
        )


class PackageEncoder(Encoder):
    """Base of the models that this package runs through one interface, `_model`."""

    _processor: Any
    _model: Any
    _on_batch: OnBatch | None = None  # of images

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts, truncated at the model's maximum length, the longest first."""
        size = self._run_config.batch_size
        tokens = TokenizedTexts(self._processor, texts)
        embeds = self._model.encode_texts(
            tokens,
            token_budget=None if size is None else size * _TOKENS_PER_TEXT,
            show_progress=self._run_config.show_progress,
        )
        return EncodedTexts(embeds, torch.from_numpy(tokens.is_truncated))

    def encode_images(self, images: Sequence[Any], *, names: Sequence[str]) -> Tensor:  # noqa: ARG002
        """Encode images as the model's processor prepares them."""
        embeds: Tensor = self._model.encode_images(
            images,
            batch_size=self._run_config.batch_size,
            num_workers=self._run_config.num_workers,
            show_progress=self._run_config.show_progress,
            on_batch=self._on_batch,
        )
        return embeds


class OnceEncoder(Encoder):
    """Encodes each text and each image once and holds their embeddings; `encoded` counts them."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoded = {"texts": 0, "images": 0}
        self._encoder = encoder
        self._texts, self._images = KnownRows(), KnownRows()
        self._is_truncated: dict[str, bool] = {}
        self._held: list[Any] = []  # images, so that no other gets the `id` of one in memory

    @property
    def description(self) -> EncoderDescription:
        """The description of the encoder within."""
        return self._encoder.description

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts."""
        new = self._texts.list_new(texts)
        if new:
            encoded = self._encoder.encode_texts(new)
            self._texts.add(new, encoded.embeds)
            self.encoded["texts"] += len(new)
            if encoded.is_truncated is not None:
                self._is_truncated.update(zip(new, encoded.is_truncated.tolist(), strict=True))
        is_truncated = [self._is_truncated.get(text) for text in texts]
        known = None if None in is_truncated else torch.tensor(is_truncated)
        return EncodedTexts(self._texts.take(texts), known)

    def encode_images(self, images: Sequence[Any], *, names: Sequence[str]) -> Tensor:
        """Encode images, which are identified by their address, or themselves, and their name."""
        images = list(images)
        wanted = list(zip(list_keys(images), names, strict=True))
        image_of = dict(zip(wanted, images, strict=True))
        new = self._images.list_new(wanted)
        if new:
            embeds = self._encoder.encode_images(
                [image_of[key] for key in new], names=[name for _, name in new]
            )
            self._images.add(new, embeds)
            self._held += [image_of[key] for key in new]
            self.encoded["images"] += len(new)
        return self._images.take(wanted)

    def take_far_images(self) -> str | None:
        return self._encoder.take_far_images()


class KnownRows:
    """Embeddings of inputs, in the blocks in which they were encoded."""

    def __init__(self) -> None:
        self._row_of: dict[Hashable, int] = {}
        self._blocks: list[Tensor] = []

    def list_new(self, inputs: Sequence[Any]) -> list[Any]:
        return [item for item in dict.fromkeys(inputs) if item not in self._row_of]

    def add(self, inputs: Sequence[Any], embeds: Tensor) -> None:
        """Add embeddings, which are not copied."""
        first = len(self._row_of)
        self._row_of.update(zip(inputs, range(first, first + len(embeds)), strict=True))
        self._blocks.append(embeds)

    def take(self, inputs: Sequence[Any]) -> Tensor:
        """Return the embeddings of inputs, (N, D) in any order; a whole block is not copied."""
        rows = torch.tensor([self._row_of[item] for item in inputs])
        found: Tensor | None = None
        start = 0
        for block in self._blocks:
            stop = start + len(block)
            if len(rows) == len(block) and torch.equal(rows, torch.arange(start, stop)):
                return block
            if found is None:
                found = block.new_empty(len(rows), block.shape[1])
            inside = ((rows >= start) & (rows < stop)).nonzero().flatten()
            for part in inside.split(_ROWS_COPIED_AT_ONCE):
                found[part] = block[rows[part] - start]
            start = stop
        assert found is not None
        return found


def describe_image_processor(image_processor: Any) -> dict[str, Any]:
    fields: dict[str, Any] = image_processor.to_dict()
    resample = fields.get("resample")
    normalizes = fields.get("do_normalize", True)
    described = {
        **OPENING,
        "processor": type(image_processor).__name__,
        "resize": fields.get("size") if fields.get("do_resize", True) else None,
        "crop": fields.get("crop_size") if fields.get("do_center_crop") else None,
        "interpolation": None if resample is None else Resampling(int(resample)).name.lower(),
        "mean": _round(fields.get("image_mean")) if normalizes else None,
        "std": _round(fields.get("image_std")) if normalizes else None,
        "scale": fields.get("rescale_factor") if fields.get("do_rescale", True) else None,
    }
    return described | {name: fields[name] for name in _PATCH_FIELDS if name in fields}


def _round(values: Any) -> list[float] | None:
    return None if values is None else [round(float(value), 8) for value in values]


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
