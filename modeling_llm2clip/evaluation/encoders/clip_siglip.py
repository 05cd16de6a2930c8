"""The dual encoders of transformers: CLIP, SigLIP, SigLIP2, with their own text towers.

What the families are trained with, and what their processors leave to the caller:

| family | texts |
| --- | --- |
| `clip` | 77 tokens, padded to the longest of the batch and masked |
| `siglip`, `siglip2` | lower case, 64 tokens, padded to 64 and **not** masked: the last token is
pooled, which is padding in most texts (arXiv:2303.15343, arXiv:2502.14786) |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor

from ...configs.evaluation_config import EncoderConfig
from ...encoding.devices import find_device
from ...loading_llm2clip import list_weight_files, load_without_code
from ...model_folders.fingerprint import fingerprint_weights, hash_model_files
from ...processing_llm2clip import check_texts
from .descriptions import describe_activation, describe_image_processor, is_uncased
from .encoder import (
    EncodedTexts,
    EncoderDescription,
    choose_dtype,
    describe_run,
    encode_batches,
    find_loading_dtype,
    load_rgb,
    require_images,
)


@dataclass(frozen=True)
class _TextRules:
    """How a family wants its texts, beyond what its tokenizer does."""

    lower_case: bool
    padding: str
    masked: bool


_SIGLIP_RULES = _TextRules(lower_case=True, padding="max_length", masked=False)
_RULES = {
    "clip": _TextRules(lower_case=False, padding="longest", masked=True),
    "siglip": _SIGLIP_RULES,
    "siglip2": _SIGLIP_RULES,
}
FAMILIES = tuple(_RULES)


class ClipSiglipEncoder:
    """A CLIP, SigLIP or SigLIP2 folder as transformers saves it.

    Args:
        folder: The folder.
        config: How the model is run.
        source: What the user gave.

    Raises:
        ValueError: The folder's `model_type` is another one.
    """

    def __init__(self, folder: Path, config: EncoderConfig, *, source: str) -> None:
        self._folder = folder
        self._run_config = config
        self._source = source
        self._config: Any = load_without_code(AutoConfig, folder)
        if self._config.model_type not in _RULES:
            raise ValueError(
                f"{source} is a {self._config.model_type!r} model; the model type transformers "
                f"takes {', '.join(FAMILIES)}."
            )
        self._rules = _RULES[self._config.model_type]
        self._processor: Any = load_without_code(AutoProcessor, folder)
        self._max_tokens = int(self._config.text_config.max_position_embeddings)

    def describe(self) -> EncoderDescription:
        """Say what decides the embeddings."""
        return self._description

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts as the family wants them.

        Args:
            texts: At least one.
        """
        check_texts(list(texts))
        chosen = [text.lower() for text in texts] if self._rules.lower_case else list(texts)
        lengths = self._count_tokens(list(dict.fromkeys(chosen)))
        embeds = encode_batches(
            chosen,
            self._tokenize,
            lambda inputs: self._find_pooled(self._model.get_text_features(**inputs)),
            self._run_config,
            unit="texts",
            size_of=lengths.__getitem__,
        )
        is_truncated = [lengths[text] > self._max_tokens for text in chosen]
        return EncodedTexts(embeds, torch.tensor(is_truncated))

    def encode_images(self, images: Sequence[Any], *, names: Sequence[str]) -> Tensor:  # noqa: ARG002
        """Encode images with the folder's own image processor.

        Args:
            images: At least one.
            names: Not used.
        """
        require_images(images)
        return encode_batches(
            images,
            self._prepare_images,
            lambda inputs: self._find_pooled(self._model.get_image_features(**inputs)),
            self._run_config,
            unit="images",
        )

    def _count_tokens(self, texts: list[str]) -> dict[str, int]:
        ids = self._processor.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        return {text: len(row) for text, row in zip(texts, ids, strict=True)}

    def _tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        inputs = self._processor.tokenizer(
            texts,
            padding=self._rules.padding,
            truncation=True,
            max_length=self._max_tokens,
            return_tensors="pt",
        )
        names = ("input_ids", "attention_mask") if self._rules.masked else ("input_ids",)
        return self._to_device({name: inputs[name] for name in names})

    def _prepare_images(self, images: list[Any]) -> dict[str, Tensor]:
        inputs = dict(self._processor.image_processor(load_rgb(images), return_tensors="pt"))
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        return self._to_device(inputs)

    def _to_device(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self._model.device) for name, value in inputs.items()}

    @staticmethod
    def _find_pooled(features: Any) -> Tensor:
        # A tensor before transformers 5.0, and since then an output with the projected embedding.
        pooled = features if isinstance(features, Tensor) else features.pooler_output
        assert isinstance(pooled, Tensor)
        return pooled

    @cached_property
    def _model(self) -> Any:
        dtype = find_loading_dtype(self._run_config)
        model, info = load_without_code(
            AutoModel, self._folder, dtype=dtype, output_loading_info=True
        )
        if info["missing_keys"] or info["mismatched_keys"]:
            lost = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
            raise ValueError(
                f"{self._source} lacks weights, which would be random: {lost[:5]}. Save the whole "
                "model again."
            )
        return model.to(find_device(self._run_config.device)).eval()

    @cached_property
    def _description(self) -> EncoderDescription:
        weights = fingerprint_weights(list_weight_files(self._folder))
        files = hash_model_files(self._folder, ("*.json", "*.txt", "*.model"))
        return EncoderDescription(
            model_type=self._config.model_type,
            source=self._source,
            fingerprint={"weights": weights["weights"], "files": files},
            text={
                "prompt": None,
                "max_tokens": self._max_tokens,
                "padding": self._rules.padding + (", masked" if self._rules.masked else ", seen"),
                "lower_case": self._rules.lower_case or is_uncased(self._processor.tokenizer),
                "activation": describe_activation(self._config.text_config),
            },
            images={
                **describe_image_processor(self._processor.image_processor),
                "activation": describe_activation(self._config.vision_config),
            },
            dtype=choose_dtype(self._run_config, weights["dtype"]),
            run=describe_run(self._run_config),
        )
