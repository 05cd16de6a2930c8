"""Evaluate sentence-transformers models on texts, and on images if the model supports images.

Only a loaded model can report how it prepares texts and images. Each model is loaded once to be
described and then released, so models that are evaluated later do not occupy memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..._extras import SENTENCE_TRANSFORMERS, require
from ...data.images.image_sources import UnreadableImagesError, open_image
from ...encoding.batches import PreparedImages
from ...encoding.encoder_interface import Encoder
from ...encoding.tokenized_texts import TokenizedText
from ...image_loading_llm2clip import load_images
from ...loading_llm2clip import naming_code
from ...model_folders.fingerprint import fingerprint_weights, hash_model_files
from .encoder import (
    OF_ITS_TOWER,
    EncodedTexts,
    EncoderDescription,
    EvaluationEncoder,
    choose_dtype,
    describe_activation,
    describe_image_processor,
    is_uncased,
)

# Tokenizers without a limit report a huge one.
_NO_LIMIT = 10**9


class SentenceTransformerEncoder(EvaluationEncoder):
    """Encodes with a folder that has `modules.json`.

    The only prompt added is the model's own default. Only sentence-transformers' built-in modules
    are loaded; code from the folder is never run.
    """

    def _encode_new_texts(self, texts: list[str]) -> EncodedTexts:
        encoded = super()._encode_new_texts(texts)
        return encoded if self._processor.longest_text else EncodedTexts(encoded.embeds, None)

    @cached_property
    def _processor(self) -> _SentenceProcessor:
        return _SentenceProcessor(self._load("cpu"))

    @cached_property
    def _model(self) -> _SentenceModel:
        return _SentenceModel(self._load(str(self._device)), self._processor, self._device)

    def _load(self, device: str) -> Any:
        require(SENTENCE_TRANSFORMERS)
        from sentence_transformers import SentenceTransformer

        dtype = choose_dtype(self._run_config, "auto")
        with naming_code(self._path):
            model = SentenceTransformer(
                str(self._path),
                device=device,
                model_kwargs={"dtype": dtype if dtype == "auto" else getattr(torch, dtype)},
                trust_remote_code=False,
                local_files_only=True,
            )
        if not model.supports("text"):
            raise ValueError(
                f"{self._path} encodes only {model.modalities}, but every task needs texts."
            )
        return model.eval()

    @cached_property
    def description(self) -> EncoderDescription:
        weights = fingerprint_weights(self._path.glob("**/*.safetensors"), base=self._path)
        files = hash_model_files(self._path, ("**/*.json", "**/*.txt", "**/*.model"))
        return EncoderDescription(
            model_type="sentence-transformers",
            source=self._source,
            fingerprint={"weights": weights["weights"], "files": files},
            text=self._processor.text,
            images=self._processor.images,
            dtype=choose_dtype(self._run_config, weights["dtype"]),
            run=self._describe_run(),
        )


class _SentenceProcessor:
    """Settings of a loaded model that determine its embeddings; does not keep the weights."""

    def __init__(self, model: Any) -> None:
        limit = model.max_seq_length
        self.longest_text = int(limit) if limit is not None and limit < _NO_LIMIT else None
        self.tokenizer = model.tokenizer
        self._prompt = model.prompts.get(model.default_prompt_name)
        self._lower_case = bool(getattr(model[0], "do_lower_case", False))
        config = getattr(getattr(model[0], "auto_model", None), "config", None)
        self.text = {
            "prompt": self._prompt,
            "max_tokens": self.longest_text,
            "padding": "longest, masked",
            "lower_case": self._lower_case or (config is not None and is_uncased(self.tokenizer)),
            "modules": [type(module).__name__ for module in model],
            "activation": OF_ITS_TOWER
            if config is None
            else describe_activation(config.get_text_config()),
        }
        self.images = None
        if model.supports("image"):
            processor = getattr(model.processor, "image_processor", model.processor)
            self.images = {
                **describe_image_processor(processor),
                "activation": describe_activation(getattr(config, "vision_config", config or {})),
            }

    def list_ids(self, texts: list[str]) -> tuple[list[list[int]], list[bool]]:
        """List each text's ids, or characters if there is no limit, and whether it is truncated."""
        if self.longest_text is None:
            return [[*map(ord, text)] for text in texts], [False] * len(texts)
        whole = [(self._prompt or "") + text for text in texts]
        if self._lower_case:
            whole = [text.lower() for text in whole]
        ids = list(self.tokenizer(whole, truncation=False, verbose=False)["input_ids"])
        return ids, [len(row) > self.longest_text for row in ids]


class _SentenceModel(Encoder):
    """A loaded model that prepares texts and images itself."""

    projects_at_once = True

    def __init__(self, model: Any, processor: Any, device: torch.device) -> None:
        self._model, self.processor, self.device = model, processor, device
        self.modalities = ("text", "image") if processor.images else ("text",)

    def prepare_texts(self, texts: Sequence[TokenizedText]) -> dict[str, Any]:
        return {"inputs": [text.text for text in texts]}

    def prepare_images(self, images: Sequence[Any]) -> PreparedImages:
        try:
            loaded: Any = load_images([open_image(image) for image in images])
        except ValueError as error:
            raise UnreadableImagesError(str(error)) from error
        return PreparedImages({"inputs": loaded}, list(range(len(images))), {})

    def encode_tokens(self, inputs: list[Any]) -> Tensor:  # type: ignore[override]
        embeds: Tensor = self._model.encode(
            inputs, batch_size=len(inputs), convert_to_tensor=True, show_progress_bar=False
        )
        return embeds

    encode_pixels = encode_tokens  # type: ignore[assignment]
