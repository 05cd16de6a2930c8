"""A model of this package: the embeddings that `AutoModel` returns, computed on the fast paths."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...configs.evaluation_config import EncoderConfig
from ...configuration_llm2clip import LLM2CLIPConfig
from ...encoding.devices import find_device
from ...encoding.encode import TorchEncoder
from ...encoding.tokenized_texts import TokenizedTexts
from ...model_folders.fingerprint import (
    describe_prompt,
    fingerprint_model,
    fingerprint_text,
    fingerprint_vision,
)
from ...model_folders.model_loading import warn_of_untrained
from ...model_folders.training_images import ImageTally, read_training_images
from ...modeling_llm2clip import LLM2CLIPModel
from ...processing_llm2clip import LLM2CLIPProcessor
from .encoder import (
    EncodedTexts,
    Encoder,
    EncoderDescription,
    choose_dtype,
    describe_activation,
    describe_image_processor,
    describe_run,
    describe_untrained,
    is_uncased,
)

# A batch of texts is that many tokens per text.
_TOKENS_PER_TEXT = 64


class LLM2CLIPEncoder(Encoder):
    """A model folder of this package."""

    def __init__(self, folder: Path, config: EncoderConfig, *, source: str) -> None:
        super().__init__(folder, config, source=source)
        self._processor = LLM2CLIPProcessor.from_pretrained(folder)
        self._config = LLM2CLIPConfig.from_pretrained(folder)
        self._training_images = read_training_images(folder)
        self._tally = ImageTally()
        warn_of_untrained(self._config, source)

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        size = self._run_config.batch_size
        tokens = TokenizedTexts(self._processor, texts)
        embeds = self._model.encode_texts(
            tokens,
            token_budget=None if size is None else size * _TOKENS_PER_TEXT,
            show_progress=self._run_config.show_progress,
        )
        return EncodedTexts(embeds, torch.from_numpy(tokens.is_truncated))

    def encode_images(self, images: Sequence[Any], *, names: Sequence[str]) -> Tensor:  # noqa: ARG002
        return self._model.encode_images(
            images,
            batch_size=self._run_config.batch_size,
            num_workers=self._run_config.num_workers,
            show_progress=self._run_config.show_progress,
            on_batch=lambda _, vision_embeds: self._tally.add(vision_embeds),
        )

    def take_far_images(self) -> str | None:
        tally, self._tally = self._tally, ImageTally()
        return None if self._training_images is None else self._training_images.describe_far(tally)

    @cached_property
    def _model(self) -> TorchEncoder:
        model = LLM2CLIPModel.from_pretrained(
            self._path, dtype=choose_dtype(self._run_config, "auto")
        )
        device = find_device(self._run_config.device)
        return TorchEncoder(model.to(device).eval(), self._processor)

    @cached_property
    def description(self) -> EncoderDescription:
        config = self._config
        text, vision = fingerprint_text(self._path), fingerprint_vision(self._path)
        model = fingerprint_model(self._path)
        saved = model.pop("dtype")
        fingerprint = {
            **model,
            "tokenizer": text["tokenizer"],
            "text_architecture": text["architecture"],
            "vision_architecture": vision["architecture"],
            "image_processor": vision["image_processor"],
        }
        tokenizer = self._processor.tokenizer
        prompt = describe_prompt(tokenizer.backend_tokenizer, config)
        return EncoderDescription(
            model_type="llm2clip",
            source=self._source,
            fingerprint=fingerprint,
            text={
                "prompt": dict(zip(("before", "after"), prompt, strict=True)),
                "max_tokens": self._processor.longest_text,
                "padding": "none that is pooled",
                "lower_case": is_uncased(tokenizer),
                "pooling": text["pooling"],
                "direction": text["direction"],
                "activation": describe_activation(config.text_config),
            },
            images={
                **describe_image_processor(self._processor.image_processor),
                "pooling": vision["pooling"],
                "activation": describe_activation(config.vision_config),
            },
            dtype=choose_dtype(self._run_config, saved),
            run=describe_run(self._run_config) | describe_untrained(config),
        )
