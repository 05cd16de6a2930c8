"""The dual encoders of transformers, such as CLIP and SigLIP, with their own text encoders.

`encoding/dual_encoder.py` has the form of texts that each family was trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from ...configs.evaluation_config import EncoderConfig
from ...encoding.dual_encoder import DualEncoder, DualEncoderProcessor
from ...loading_llm2clip import list_weight_files
from ...model_folders.fingerprint import fingerprint_weights, hash_model_files
from .encoder import (
    EncodedTexts,
    EncoderDescription,
    EvaluationEncoder,
    choose_dtype,
    describe_activation,
    describe_image_processor,
    is_uncased,
)


class TransformersEncoder(EvaluationEncoder):
    """A folder of a dual encoder in `DUAL_ENCODERS` as transformers saves it."""

    def __init__(self, folder: Path, config: EncoderConfig, *, source: str) -> None:
        super().__init__(folder, config, source=source)
        self._processor = DualEncoderProcessor(folder)

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts; those that differ only in what the model does not read are one."""
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
