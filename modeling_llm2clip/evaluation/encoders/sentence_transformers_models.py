"""A sentence-transformers model: texts, and images if it takes them.

What it does to a text or an image is read from its files if its first module is that of
transformers, so that no weights are in memory for it. Only the loaded model knows what other first
modules do, such as static embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoProcessor

from ..._extras import SENTENCE_TRANSFORMERS, require
from ...configs.evaluation_config import EncoderConfig
from ...data.images.image_sources import open_image
from ...encoding.batches import PreparedImages
from ...encoding.encoder_interface import Encoder
from ...encoding.tokenized_texts import TokenizedText
from ...image_loading_llm2clip import load_images
from ...loading_llm2clip import load_without_code, naming_code
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

# Older files are named by the model's family: `sentence_roberta_config.json`.
_MODULE_FILES = "sentence_*_config.json"
_MODEL_FILE = "config_sentence_transformers.json"
# A tokenizer without a limit states one that no text reaches.
_NO_LIMIT = 10**9


class SentenceTransformerEncoder(EvaluationEncoder):
    """A folder with `modules.json`.

    No prompt is added but the model's own default one. Only modules of sentence-transformers
    itself are loaded; code from the folder is never run.
    """

    def __init__(self, folder: Path, config: EncoderConfig, *, source: str) -> None:
        super().__init__(folder, config, source=source)
        _import_sentence_transformers()
        first = _list_modules(folder)[:1]
        self._has_readable_files = [module["class"] for module in first] == ["Transformer"]

    def _encode_new_texts(self, texts: list[str]) -> EncodedTexts:
        encoded = super()._encode_new_texts(texts)
        return encoded if self._processor.longest_text else EncodedTexts(encoded.embeds, None)

    @cached_property
    def _processor(self) -> _SentenceProcessor:
        return _read_files(self._path) if self._has_readable_files else _ask_model(self._loaded)

    @cached_property
    def _model(self) -> _SentenceModel:
        return _SentenceModel(self._loaded, self._processor, self._device)

    @cached_property
    def _loaded(self) -> Any:
        dtype = choose_dtype(self._run_config, "auto")
        with naming_code(self._path):
            model = _import_sentence_transformers().SentenceTransformer(
                str(self._path),
                device=str(self._device),
                model_kwargs={"dtype": dtype if dtype == "auto" else getattr(torch, dtype)},
                trust_remote_code=False,
                local_files_only=True,
            )
        return model.eval()

    @cached_property
    def description(self) -> EncoderDescription:
        weights = fingerprint_weights(self._path.glob("**/*.safetensors"), base=self._path)
        files = hash_model_files(self._path, ("**/*.json", "**/*.txt", "**/*.model"))
        facts = self._processor
        return EncoderDescription(
            model_type="sentence-transformers",
            source=self._source,
            fingerprint={"weights": weights["weights"], "files": files},
            text={
                "prompt": facts.default_prompt,
                "max_tokens": facts.longest_text,
                "padding": "longest, masked",
                "lower_case": facts.lower_case,
                "modules": list(facts.modules),
                "activation": facts.activation,
            },
            images=facts.images,
            dtype=choose_dtype(self._run_config, weights["dtype"]),
            run=self._describe_run(),
        )


def _import_sentence_transformers() -> Any:
    require(SENTENCE_TRANSFORMERS)
    import sentence_transformers

    return sentence_transformers


@dataclass(frozen=True)
class _SentenceProcessor:
    """Facts that decide the embeddings besides the weights. None means no limit."""

    modules: tuple[str, ...]
    default_prompt: str | None
    longest_text: int | None
    lower_case: bool
    activation: str
    images: dict[str, Any] | None
    tokenizer: Any

    def list_ids(self, texts: list[str]) -> tuple[list[list[int]], list[bool]]:
        """List the ids of each text, and if it is truncated; characters if there is no limit."""
        if self.longest_text is None:
            return [[*map(ord, text)] for text in texts], [False] * len(texts)
        whole = [(self.default_prompt or "") + text for text in texts]
        if self.lower_case:
            whole = [text.lower() for text in whole]
        ids = list(self.tokenizer(whole, truncation=False, verbose=False)["input_ids"])
        return ids, [len(row) > self.longest_text for row in ids]


class _SentenceModel(Encoder):
    """A loaded model, which prepares texts and images itself."""

    projects_at_once = True

    def __init__(self, model: Any, processor: Any, device: torch.device) -> None:
        self._model, self.processor, self.device = model, processor, device
        self.modalities = ("text", "image") if processor.images else ("text",)

    def prepare_texts(self, texts: Sequence[TokenizedText]) -> dict[str, Any]:
        return {"inputs": [text.text for text in texts]}

    def prepare_images(self, images: Sequence[Any]) -> PreparedImages:
        loaded: Any = load_images([open_image(image) for image in images])
        return PreparedImages({"inputs": loaded}, list(range(len(images))), {})

    def encode_tokens(self, inputs: list[Any]) -> Tensor:  # type: ignore[override]
        embeds: Tensor = self._model.encode(
            inputs, batch_size=len(inputs), convert_to_tensor=True, show_progress_bar=False
        )
        return embeds

    encode_pixels = encode_tokens  # type: ignore[assignment]


def _list_modules(folder: Path) -> list[dict[str, Any]]:
    """List the modules of a folder in their order, each with its `path` and its `class`."""
    modules = sorted(_read_json(folder / "modules.json"), key=lambda module: module["idx"])
    return [{**module, "class": str(module["type"]).rpartition(".")[2]} for module in modules]


def _read_files(folder: Path) -> _SentenceProcessor:
    """Read the files of a model that begins with `Transformer`, as sentence-transformers does."""
    modules = _list_modules(folder)
    inside = folder / modules[0]["path"]
    found = sorted(inside.glob(_MODULE_FILES))
    written = _read_json(found[0]) if found else {}
    # A model that was saved before there were other modalities takes only texts.
    modalities = tuple(written.get("modality_config", ("text",)))
    if "text" not in modalities:
        raise ValueError(f"{folder} encodes {modalities} and no texts, which every task needs.")
    processor = load_without_code(AutoProcessor, inside)
    config = load_without_code(AutoConfig, inside)
    tokenizer = getattr(processor, "tokenizer", processor)
    prompts = _read_json(folder / _MODEL_FILE) if (folder / _MODEL_FILE).is_file() else {}
    images = None
    if "image" in modalities:
        images = {
            **describe_image_processor(getattr(processor, "image_processor", processor)),
            "activation": describe_activation(getattr(config, "vision_config", config)),
        }
    return _SentenceProcessor(
        modules=tuple(module["class"] for module in modules),
        default_prompt=prompts.get("prompts", {}).get(prompts.get("default_prompt_name")),
        longest_text=_find_limit(written, tokenizer, config),
        lower_case=bool(written.get("do_lower_case")) or is_uncased(tokenizer),
        activation=describe_activation(config.get_text_config()),
        images=images,
        tokenizer=tokenizer,
    )


def _ask_model(model: Any) -> _SentenceProcessor:
    limit = model.max_seq_length
    images = None
    if model.supports("image"):
        processor = model.processor
        image_processor = getattr(processor, "image_processor", processor)
        images = {**describe_image_processor(image_processor), "activation": OF_ITS_TOWER}
    return _SentenceProcessor(
        modules=tuple(type(module).__name__ for module in model),
        default_prompt=model.prompts.get(model.default_prompt_name),
        longest_text=int(limit) if limit is not None and limit < _NO_LIMIT else None,
        lower_case=bool(getattr(model[0], "do_lower_case", False)),
        activation=OF_ITS_TOWER,
        images=images,
        tokenizer=model.tokenizer,
    )


def _find_limit(written: dict[str, Any], tokenizer: Any, config: Any) -> int | None:
    """Find the most tokens of a text: what the file says, else the tokenizer or the positions."""
    of_texts = written.get("processing_kwargs", {}).get("text", {})
    of_tokenizer = written.get("processor_kwargs", written.get("tokenizer_args", {}))
    given = [
        of_texts.get("max_length"),
        of_tokenizer.get("model_max_length"),
        written.get("max_seq_length"),
    ]
    chosen = next((limit for limit in given if limit is not None), None)
    if chosen is None:
        positions = getattr(config, "max_position_embeddings", -1)
        chosen = min(tokenizer.model_max_length, positions if positions != -1 else _NO_LIMIT)
    return int(chosen) if chosen < _NO_LIMIT else None


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is missing or damaged ({error}). Get it again.") from error
