"""Makes an LLM2Vec folder the text tower of a new model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..building.build_model import build_model
from ..configs.build_config import BuildConfig
from ..configs.export_config import CardConfig
from ..data.sources.json_files import read_object
from ..model_folders.model_folder import LORA_CONFIG
from ..pooling_llm2clip import TEXT_POOLINGS

SETTINGS_FILE = "llm2vec_config.json"
_POOLINGS = {mode: name for name, pooling in TEXT_POOLINGS.items() for mode in pooling.llm2vec}


def build_from_llm2vec(
    vision: str | Path,
    folder: Path,
    output: str | Path,
    config: BuildConfig,
    *,
    base: str | Path | None = None,
    card: CardConfig | None = None,
) -> Path:
    """Build an untrained model whose text tower gives the embeddings that LLM2Vec gives.

    `folder` is one that `LLM2Vec.save` wrote, merged or a LoRA; a LoRA needs its base LLM. The
    folder's pooling and length replace those in the config.
    """
    config = replace(config, **_read_settings(folder))
    is_lora = (folder / LORA_CONFIG).is_file()
    if is_lora != (base is not None):
        raise ValueError(
            f"{folder} is a LoRA, so it needs its base LLM (text_model)."
            if is_lora
            else f"{folder} is a whole LLM, so leave {base} out."
        )
    if is_lora:
        config = replace(config, lora=folder)
    return build_model(vision, folder if base is None else base, output, config, card=card)


def _read_settings(folder: Path) -> dict[str, Any]:
    """Translate an LLM2Vec folder's settings into fields of `BuildConfig`.

    `doc_max_length`, by which LLM2Vec shortens a text word by word before it adds the prompt, has
    no equivalent: it empties texts without spaces.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {SETTINGS_FILE}, so it is not an LLM2Vec folder. Give one that "
            "LLM2Vec saved, or build from the bare LLM (llm2clip build)."
        )
    settings = read_object(path)
    errors = []
    pooling = settings.get("pooling_mode")
    if pooling not in [*_POOLINGS]:  # a list compares whatever came
        errors.append(f"pooling_mode={pooling!r}, expected one of {sorted(_POOLINGS)}")
    if settings.get("skip_instruction") is not True:
        errors.append(
            f"skip_instruction={settings.get('skip_instruction')}, expected true: prompt and "
            "instruction are never pooled here"
        )
    if not isinstance(settings.get("max_length"), int):
        errors.append(f"max_length={settings.get('max_length')!r}, expected a number of tokens")
    if errors:
        raise ValueError(
            f"{path}: {'; '.join(errors)}. Such a tower would get other embeddings here."
        )
    return {"text_pooling": _POOLINGS[str(pooling)], "max_text_length": settings["max_length"]}
