"""A sentence-transformers model: texts, and images where it takes them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._extras import SENTENCE_TRANSFORMERS, require
from ...configs.evaluation_config import EncoderConfig
from ...encoding.devices import find_device
from ...loading_llm2clip import naming_code
from ...model_folders.fingerprint import fingerprint_weights
from ...processing_llm2clip import check_texts
from .encoder import (
    EncodedTexts,
    EncoderDescription,
    choose_dtype,
    describe_run,
    dtype_argument,
    encode_distinct,
    load_rgb,
    require_images,
)
from .files import hash_files
from .sentence_files import (
    SentenceFacts,
    ask_loaded_model,
    list_modules,
    read_sentence_files,
)


class SentenceTransformerEncoder:
    """A folder with `modules.json`.

    No prompt is added but the model's own default one. Only modules of sentence-transformers
    itself are loaded; code from the folder is never run.

    Raises: ValueError when sentence-transformers is not installed or `modules.json` is damaged.
    """

    def __init__(self, folder: Path, config: EncoderConfig, *, source: str) -> None:
        self._folder = folder
        self._config = config
        self._source = source
        _import_sentence_transformers()
        first = list_modules(folder)[:1]
        self._is_told_by_files = [module["class"] for module in first] == ["Transformer"]

    def describe(self) -> EncoderDescription:
        """Say what decides the embeddings."""
        return self._description

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts with `encode`."""
        check_texts(list(texts))
        embeds = encode_distinct(texts, list, self._encode, self._config, unit="texts", size_of=len)
        return EncodedTexts(embeds, self._find_cut(texts))

    def encode_images(self, images: Sequence[Any], *, names: Sequence[str]) -> Tensor:  # noqa: ARG002
        """Encode images with `encode`, where the model takes them."""
        require_images(images)
        if self._facts.images is None:
            raise ValueError(
                f"{self._source} is a sentence-transformers model for "
                f"{list(self._facts.modalities)}; it takes no images. Give it text tasks."
            )
        return encode_distinct(images, load_rgb, self._encode, self._config, unit="images")

    def _encode(self, batch: list[Any]) -> Tensor:
        embeddings: Tensor = self._model.encode(
            batch,
            batch_size=len(batch),
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        return embeddings

    def _find_cut(self, texts: Sequence[str]) -> Tensor | None:
        longest = self._facts.max_tokens
        if longest is None:
            return None
        prompt = self._facts.default_prompt or ""
        whole = [prompt + text for text in texts]
        if self._facts.lower_case:
            whole = [text.lower() for text in whole]
        ids = self._facts.tokenizer(whole, truncation=False, verbose=False)["input_ids"]
        return torch.tensor([len(row) > longest for row in ids])

    @cached_property
    def _facts(self) -> SentenceFacts:
        if self._is_told_by_files:
            return read_sentence_files(self._folder)
        return ask_loaded_model(self._model)

    @cached_property
    def _model(self) -> Any:
        dtype = dtype_argument(self._config)
        with naming_code(self._folder):
            model = _import_sentence_transformers().SentenceTransformer(
                str(self._folder),
                device=str(find_device(self._config.device)),
                model_kwargs={"dtype": dtype if dtype == "auto" else getattr(torch, dtype)},
                trust_remote_code=False,
                local_files_only=True,
            )
        return model.eval()

    @cached_property
    def _description(self) -> EncoderDescription:
        weights = fingerprint_weights(self._folder, pattern="**/*.safetensors")
        files = hash_files(self._folder, ("**/*.json", "**/*.txt", "**/*.model"))
        facts = self._facts
        return EncoderDescription(
            kind="sentence-transformers",
            source=self._source,
            fingerprint={"weights": weights["weights"], "files": files},
            text={
                "prompt": facts.default_prompt,
                "max_tokens": facts.max_tokens,
                "padding": "longest, masked",
                "lower_case": facts.lower_case,
                "modules": list(facts.modules),
                "activation": facts.activation,
            },
            images=facts.images,
            dtype=choose_dtype(self._config, weights["dtype"]),
            run=describe_run(self._config),
        )


def _import_sentence_transformers() -> Any:
    require(SENTENCE_TRANSFORMERS)
    import sentence_transformers

    return sentence_transformers
