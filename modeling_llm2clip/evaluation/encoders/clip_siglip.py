"""The dual encoders of transformers, such as CLIP and SigLIP, with their own text towers.

`encoding/clip_texts.py` has the form of texts that each family was trained with.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoProcessor

from ...configs.encoding_config import DUAL_ENCODERS
from ...configs.evaluation_config import EncoderConfig
from ...encoding.clip_texts import (
    count_tokens_read,
    find_pooled,
    is_unmasked,
    load_dual_encoder,
)
from ...encoding.devices import find_device
from ...encoding.tokenized_texts import TokenizedText
from ...loading_llm2clip import list_weight_files, load_without_code
from ...model_folders.fingerprint import fingerprint_weights, hash_model_files
from .encoder import (
    EncoderDescription,
    ModelEncoder,
    choose_dtype,
    describe_activation,
    describe_image_processor,
    describe_run,
    is_uncased,
)


class ClipSiglipEncoder(ModelEncoder):
    """A folder of a dual encoder in `DUAL_ENCODERS` as transformers saves it."""

    def __init__(self, folder: Path, config: EncoderConfig, *, source: str) -> None:
        super().__init__(folder, config, source=source)
        self._config: Any = load_without_code(AutoConfig, folder)
        if self._config.model_type not in DUAL_ENCODERS:
            raise ValueError(
                f"{source} is a {self._config.model_type!r} model; the model type transformers "
                f"takes {', '.join(DUAL_ENCODERS)}."
            )
        self._is_unmasked = is_unmasked(self._config)
        self._processor: Any = load_without_code(AutoProcessor, folder)

    @property
    def _max_tokens(self) -> int:
        return count_tokens_read(self._config, self._processor.tokenizer)

    def _spell(self, text: str) -> str:
        return text.lower() if self._is_unmasked else text

    def _list_ids(self, texts: list[str]) -> list[list[int]]:
        return list(self._processor.tokenizer(texts, truncation=False, verbose=False)["input_ids"])

    def _prepare_texts(self, texts: list[TokenizedText]) -> dict[str, Tensor]:
        tokenizer, limit = self._processor.tokenizer, self._max_tokens
        padding = "max_length" if self._is_unmasked else "longest"
        options = {"padding": padding, "max_length": limit, "return_tensors": "pt"}
        if max(len(one.ids) for one in texts) > limit:  # only the tokenizer knows what it keeps
            inputs = tokenizer([one.text for one in texts], truncation=True, **options)
        else:
            inputs = tokenizer.pad({"input_ids": [one.ids for one in texts]}, **options)
        names = ("input_ids",) if self._is_unmasked else ("input_ids", "attention_mask")
        return self._to_device({name: inputs[name] for name in names})

    def _embed_texts(self, prepared: dict[str, Tensor]) -> Tensor:
        return find_pooled(self._model.get_text_features(**prepared))

    def _prepare_images(self, images: list[Any]) -> dict[str, Tensor]:
        inputs = dict(self._processor.image_processor(images, return_tensors="pt"))
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        return self._to_device(inputs)

    def _embed_images(self, prepared: dict[str, Tensor]) -> Tensor:
        return find_pooled(self._model.get_image_features(**prepared))

    def _to_device(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self._model.device) for name, value in inputs.items()}

    @cached_property
    def _model(self) -> Any:
        model = load_dual_encoder(self._path, dtype=choose_dtype(self._run_config, "auto"))
        return model.to(find_device(self._run_config.device))

    @cached_property
    def description(self) -> EncoderDescription:
        weights = fingerprint_weights(list_weight_files(self._path))
        files = hash_model_files(self._path, ("*.json", "*.txt", "*.model"))
        return EncoderDescription(
            model_type=self._config.model_type,
            source=self._source,
            fingerprint={"weights": weights["weights"], "files": files},
            text={
                "prompt": None,
                "max_tokens": self._max_tokens,
                "padding": "max_length, seen" if self._is_unmasked else "longest, masked",
                "lower_case": self._is_unmasked or is_uncased(self._processor.tokenizer),
                "activation": describe_activation(self._config.text_config),
            },
            images={
                **describe_image_processor(self._processor.image_processor),
                "activation": describe_activation(self._config.vision_config),
            },
            dtype=choose_dtype(self._run_config, weights["dtype"]),
            run=describe_run(self._run_config),
        )
