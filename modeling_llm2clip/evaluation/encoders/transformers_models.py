"""Evaluate transformers models: LLM2CLIP, and dual encoders such as CLIP and SigLIP.

LLM2CLIP models return the same embeddings as `AutoModel`, computed on the fast paths. Dual encoders
have their own text encoders; `encoding/dual_encoder.py` formats texts as in each family's training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from ...configs.evaluation_config import EncoderConfig
from ...configuration_llm2clip import LLM2CLIPConfig
from ...encoding.dual_encoder import DualEncoder, DualEncoderProcessor
from ...encoding.encode import TorchEncoder
from ...encoding.precision import (
    DeviceTraits,
    choose_tower_dtype,
    describe_precision,
    load_on_device,
)
from ...loading_llm2clip import list_weight_files
from ...model_folders.fingerprint import (
    describe_prompt,
    fingerprint_model,
    fingerprint_text,
    fingerprint_vision,
    fingerprint_weights,
    hash_model_files,
)
from ...model_folders.guarded_loading import find_stored_dtype, load_in_precision
from ...model_folders.model_loading import warn_of_untrained
from ...model_folders.training_images import ImageTally, read_training_images
from ...modeling_llm2clip import LLM2CLIPModel
from ...processing_llm2clip import LLM2CLIPProcessor
from .encoder import (
    EncodedTexts,
    EncoderDescription,
    EvaluationEncoder,
    choose_dtype,
    describe_activation,
    describe_image_processor,
    is_uncased,
)


class LLM2CLIPEncoder(EvaluationEncoder):
    """Encodes with an LLM2CLIP model folder."""

    def __init__(self, folder: Path, config: EncoderConfig, *, source: str) -> None:
        super().__init__(folder, config, source=source)
        self._processor = LLM2CLIPProcessor.from_pretrained(folder)
        self._config = LLM2CLIPConfig.from_pretrained(folder)
        self._training_images = read_training_images(folder)
        self._tally = ImageTally()
        self._on_batch = lambda _, tower_embeds: self._tally.add(tower_embeds)
        warn_of_untrained(self._config, source)

    def take_far_images(self) -> str | None:
        tally, self._tally = self._tally, ImageTally()
        return None if self._training_images is None else self._training_images.describe_far(tally)

    @cached_property
    def _model(self) -> TorchEncoder:
        where, dtype = (LLM2CLIPModel, self._path, self._device), self._run_config.dtype
        chosen = self._precision.get("precision")
        # If each tower has its own, they are compared again.
        model = (
            load_in_precision(*where, chosen if chosen in ("float32", "bfloat16") else "auto")
            if dtype == "auto"
            else load_on_device(*where, dtype=choose_dtype(self._run_config, "auto"))
        )
        return TorchEncoder(model, self._processor)

    @cached_property
    def _precision(self) -> dict[str, str]:
        """Precision of the towers if it is chosen by comparing embeddings; otherwise empty.

        The model is loaded for the comparison and then released, so models that are evaluated later
        do not occupy memory.
        """
        traits, stored = DeviceTraits.read(self._device), find_stored_dtype(self._path)
        if self._run_config.dtype != "auto" or not choose_tower_dtype("auto", traits, stored)[1]:
            return {}
        return describe_precision(
            load_in_precision(LLM2CLIPModel, self._path, self._device), stored
        )

    @cached_property
    def description(self) -> EncoderDescription:
        config = self._config
        parts = config.random_heads
        text = fingerprint_text(self._path, self._processor)
        vision = fingerprint_vision(self._path, self._processor)
        model = fingerprint_model(self._path)
        saved = model.pop("dtype")
        precision = self._precision.get("precision", saved)
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
            dtype=choose_dtype(self._run_config, saved)
            if precision == saved
            else f"{precision} towers",
            run={
                **self._describe_run(),
                **({"untrained_parts": parts} if parts else {}),
                **({"towers": self._precision} if self._precision else {}),
            },
        )


class TransformersEncoder(EvaluationEncoder):
    """Encodes with the transformers folder of a dual encoder in `DUAL_ENCODERS`."""

    def __init__(self, folder: Path, config: EncoderConfig, *, source: str) -> None:
        super().__init__(folder, config, source=source)
        self._processor = DualEncoderProcessor(folder)

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts; if the model lowercases them, texts that differ only in case count once."""
        return super().encode_texts([self._processor.spell(text) for text in texts])

    @cached_property
    def _model(self) -> DualEncoder:
        dtype = choose_dtype(self._run_config, "auto")
        return DualEncoder(self._path, self._processor, self._device, dtype=dtype)

    @cached_property
    def description(self) -> EncoderDescription:
        config, is_unmasked = self._processor.config, self._processor.is_unmasked
        weights = fingerprint_weights(list_weight_files(self._path))
        files = hash_model_files(self._path, ("*.json", "*.txt", "*.model"))
        return EncoderDescription(
            model_type=config.model_type,
            source=self._source,
            fingerprint={"weights": weights["weights"], "files": files},
            text={
                "prompt": None,
                "max_tokens": self._processor.longest_text,
                "padding": "max_length, seen" if is_unmasked else "longest, masked",
                "lower_case": is_unmasked or is_uncased(self._processor.tokenizer),
                "activation": describe_activation(config.text_config),
            },
            images={
                **describe_image_processor(self._processor.image_processor),
                "activation": describe_activation(config.vision_config),
            },
            dtype=choose_dtype(self._run_config, weights["dtype"]),
            run=self._describe_run(),
        )
