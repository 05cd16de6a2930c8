"""Reads what a folder of LLM2Vec says of its embeddings, so that a text tower gives the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..configs.build_config import BuildConfig
from ..data.sources.json_files import read_object
from ..model_folders.model_folder import fetch_hub_file
from ..pooling_llm2clip import TEXT_POOLINGS

SETTINGS_FILE = "llm2vec_config.json"
_POOLINGS: dict[str, Any] = {
    mode: name for name, pooling in TEXT_POOLINGS.items() for mode in pooling.llm2vec
}


def take_settings(source: str | Path, config: BuildConfig) -> BuildConfig:
    """Return the config with pooling and length of an LLM or LoRA of LLM2Vec, unless it has them.

    `doc_max_length`, by which LLM2Vec shortens a text word by word before it adds the prompt, has
    no equivalent: it empties texts without spaces.
    """
    path = find_file(source, SETTINGS_FILE)
    if path is None:
        return config
    settings = read_object(path)
    errors = []
    pooling, length = settings.get("pooling_mode"), settings.get("max_length")
    if pooling not in [*_POOLINGS]:  # a list compares whatever came
        errors.append(f"pooling_mode={pooling!r}, expected one of {sorted(_POOLINGS)}")
    if settings.get("skip_instruction") is not True:
        errors.append(
            f"skip_instruction={settings.get('skip_instruction')}, expected true: prompt and "
            "instruction are never pooled here"
        )
    if not isinstance(length, int):
        errors.append(f"max_length={length!r}, expected a number of tokens")
    if errors:
        raise ValueError(
            f"{path}: {'; '.join(errors)}. Such a tower would get other embeddings here."
        )
    return replace(
        config,
        text_pooling=config.text_pooling or _POOLINGS[str(pooling)],
        max_text_length=config.max_text_length or length,
    )


def find_file(source: str | Path, name: str) -> Path | None:
    """Return a file of a folder or Hub repository; None if there is none."""
    if Path(source).is_dir():
        path: Path | None = Path(source) / name
    else:
        path = None if Path(source).suffix == ".gguf" else fetch_hub_file(source, name)
    return path if path is not None and path.is_file() else None
