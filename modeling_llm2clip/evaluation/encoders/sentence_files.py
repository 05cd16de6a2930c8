"""What a sentence-transformers model does to a text or an image, told by its files.

No weight is in memory for it, where the first module is that of transformers. Only the loaded model
can tell what other first modules do, such as static embeddings.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor

from ...loading_llm2clip import load_without_code
from .activations import OF_ITS_TOWER, describe_activation
from .descriptions import describe_image_processor
from .letter_case import is_uncased

# Older ones are called by the model's family: `sentence_roberta_config.json`.
_SETTINGS_FILES = "sentence_*_config.json"
_MODEL_FILE = "config_sentence_transformers.json"
# A tokenizer without a limit states one that no text reaches.
_NO_LIMIT = 10**9


@dataclass(frozen=True)
class SentenceFacts:
    """What decides the embeddings beside the weights.

    Attributes:
        modules: names of their classes, in their order.
        default_prompt: put in front of every text; None for none.
        max_tokens: longer texts are cut; None for no limit.
        lower_case: whether texts lose their capitals.
        activation: of the text tower.
        modalities: what is encoded: `text`, `image` and others.
        images: how they are prepared; None where they are not encoded.
        tokenizer: for counting tokens, where there is a limit.
    """

    modules: tuple[str, ...]
    default_prompt: str | None
    max_tokens: int | None
    lower_case: bool
    activation: str
    modalities: tuple[str, ...]
    images: dict[str, Any] | None
    tokenizer: Any


def list_modules(folder: Path) -> list[dict[str, Any]]:
    """The modules of a folder, in their order, each with its `path` and the name of its `class`.

    Raises: ValueError when `modules.json` is missing or damaged.
    """
    modules = sorted(_read_json(folder / "modules.json"), key=lambda module: module["idx"])
    return [{**module, "class": str(module["type"]).rpartition(".")[2]} for module in modules]


def read_sentence_files(folder: Path) -> SentenceFacts:
    """Read the files of a model that begins with `Transformer`, as sentence-transformers does.

    Raises: ValueError when a file is damaged, or the model takes no texts.
    """
    modules = list_modules(folder)
    inside = folder / modules[0]["path"]
    found = sorted(inside.glob(_SETTINGS_FILES))
    settings = _read_json(found[0]) if found else {}
    # Saved before there were other modalities, a model has texts alone.
    modalities = tuple(settings.get("modality_config", ("text",)))
    if "text" not in modalities:
        raise ValueError(f"{folder} encodes {modalities} and no texts, which every task needs.")
    processor = load_without_code(AutoProcessor, inside)
    config = load_without_code(AutoConfig, inside)
    tokenizer = getattr(processor, "tokenizer", processor)
    images = None
    if "image" in modalities:
        images = {
            **describe_image_processor(getattr(processor, "image_processor", processor)),
            "activation": describe_activation(getattr(config, "vision_config", config)),
        }
    return SentenceFacts(
        modules=tuple(module["class"] for module in modules),
        default_prompt=_find_prompt(folder),
        max_tokens=_find_limit(settings, tokenizer, config),
        lower_case=bool(settings.get("do_lower_case")) or is_uncased(tokenizer),
        activation=describe_activation(config.get_text_config()),
        modalities=modalities,
        images=images,
        tokenizer=tokenizer,
    )


def ask_loaded_model(model: Any) -> SentenceFacts:
    """Ask a loaded `SentenceTransformer`."""
    limit = model.max_seq_length
    images = None
    if model.supports("image"):
        processor = model.processor
        image_processor = getattr(processor, "image_processor", processor)
        images = {**describe_image_processor(image_processor), "activation": OF_ITS_TOWER}
    return SentenceFacts(
        modules=tuple(type(module).__name__ for module in model),
        default_prompt=model.prompts.get(model.default_prompt_name),
        max_tokens=int(limit) if limit is not None and limit < _NO_LIMIT else None,
        lower_case=bool(getattr(model[0], "do_lower_case", False)),
        activation=OF_ITS_TOWER,
        modalities=tuple(map(str, model.modalities)),
        images=images,
        tokenizer=model.tokenizer,
    )


def _find_limit(settings: dict[str, Any], tokenizer: Any, config: Any) -> int | None:
    """Most tokens of a text: what the settings say, else the tokenizer or the positions."""
    of_texts = settings.get("processing_kwargs", {}).get("text", {})
    arguments = settings.get("processor_kwargs", settings.get("tokenizer_args", {}))
    given = [
        of_texts.get("max_length"),
        arguments.get("model_max_length"),
        settings.get("max_seq_length"),
    ]
    chosen = next((limit for limit in given if limit is not None), None)
    if chosen is None:
        positions = getattr(config, "max_position_embeddings", -1)
        chosen = min(tokenizer.model_max_length, positions if positions != -1 else _NO_LIMIT)
    return int(chosen) if chosen < _NO_LIMIT else None


def _find_prompt(folder: Path) -> str | None:
    if not (folder / _MODEL_FILE).is_file():
        return None
    settings = _read_json(folder / _MODEL_FILE)
    prompt: str | None = settings.get("prompts", {}).get(settings.get("default_prompt_name"))
    return prompt


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is missing or damaged ({error}). Get it again.") from error
