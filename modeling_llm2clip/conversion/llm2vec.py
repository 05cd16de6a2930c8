"""An LLM2Vec folder as the text tower of a new model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..building.build_model import BuildArguments, join_towers
from ..model_folders.lora_base import LORA_CONFIG
from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor

SETTINGS_FILE = "llm2vec_config.json"
_POOLINGS = {"mean": "mean", "eos_token": "last_token", "last_token": "last_token"}


def read_llm2vec_settings(folder: Path) -> dict[str, Any]:
    """Translate an LLM2Vec folder's settings into fields of `BuildArguments`.

    `doc_max_length`, by which LLM2Vec shortens a text word by word before it adds the prompt, has
    no counterpart: it empties texts without spaces.

    Returns: `text_pooling`, `max_text_length`.
    Raises: ValueError when the settings are not there, or are none that this package has.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {SETTINGS_FILE}, so it is not an LLM2Vec folder. Give one that "
            "LLM2Vec saved, or build from the bare LLM (llm2clip build)."
        )
    settings = json.loads(path.read_text(encoding="utf-8"))
    errors = []
    pooling = settings.get("pooling_mode")
    if pooling not in _POOLINGS:
        errors.append(f"pooling_mode={pooling!r}, wanted one of {sorted(_POOLINGS)}")
    if settings.get("skip_instruction") is not True:
        errors.append(
            f"skip_instruction={settings.get('skip_instruction')}, wanted true: prompt and "
            "instruction are never pooled here"
        )
    if not isinstance(settings.get("max_length"), int):
        errors.append(f"max_length={settings.get('max_length')!r}, wanted a number of tokens")
    if errors:
        raise ValueError(
            f"{path}: {'; '.join(errors)}. Such a tower would get other embeddings here."
        )
    return {"text_pooling": _POOLINGS[pooling], "max_text_length": settings["max_length"]}


def build_from_llm2vec(
    vision: str | Path,
    folder: Path,
    arguments: BuildArguments,
    *,
    base: str | Path | None = None,
    accept_lora_base: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[LLM2CLIPModel, LLM2CLIPProcessor]:
    """Build an untrained model whose text tower gives the embeddings that LLM2Vec gives.

    Args:
        vision: Hub id or folder of a vision tower.
        folder: what `LLM2Vec.save` wrote, merged or a LoRA.
        arguments: pooling and length in it give way to the folder's.
        base: LLM that a LoRA is for; None for a merged folder.
        accept_lora_base: what the LoRA calls its base, where that is `base` under another name.
    Raises: ValueError as `read_llm2vec_settings` and `join_towers`, and when a base is
        given to a merged folder or missing for a LoRA.
    """
    arguments = replace(arguments, **read_llm2vec_settings(folder))
    is_lora = (folder / LORA_CONFIG).is_file()
    if is_lora != (base is not None):
        raise ValueError(
            f"{folder} is a LoRA, so it needs its base LLM (llm)."
            if is_lora
            else f"{folder} is a whole LLM, so leave {base} out."
        )
    return join_towers(
        vision,
        folder if base is None else base,
        arguments,
        dtype=dtype,
        caption_lora=folder if is_lora else None,
        accept_lora_base=accept_lora_base,
    )
