"""What the folder of a LoRA states about its base: by name, by weights, and by how it began."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

LORA_CONFIG = "adapter_config.json"
LORA_WEIGHTS = "adapter_model.safetensors"
# Values of peft's `init_lora_weights` that leave the base as it is; others take a part out of it.
PLAIN_STARTS = (True, False, None, "gaussian")
# In the metadata of a LoRA's weights: SHA-256 of the weights of the LLM that it was trained on.
BASE_WEIGHTS = "base_weights"


def read_lora_config(folder: Path) -> dict[str, Any]:
    """Read the `adapter_config.json` of a LoRA.

    Args:
        folder: Folder as peft saves it.

    Raises:
        ValueError: The folder has no such file.
    """
    path = folder / LORA_CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} has no {LORA_CONFIG}; it is not a LoRA that peft saved.")
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings


def require_base(
    lora_config: Mapping[str, Any],
    base: str,
    *,
    lora: str | Path,
    accepted_base: str | None = None,
) -> None:
    """Refuse a LoRA that names another base; owners and case are not compared.

    Args:
        lora_config: Content of its `adapter_config.json`.
        base: Name of the LLM.
        lora: How errors name the LoRA.
        accepted_base: Name that the LoRA has for this base, where both are the same weights.

    Raises:
        ValueError: The names differ.
    """
    stated = str(lora_config.get("base_model_name_or_path"))
    if accepted_base is not None and stated == accepted_base:
        return
    if not is_same_base(stated, base):
        raise ValueError(
            f"The LoRA {lora} is for the base {stated!r}, but the LLM is {base!r}. Give that "
            "base; if both names are of the same weights, pass "
            f"accept_lora_base={stated!r}."
        )


def is_same_base(stated: str, base: str) -> bool:
    """Return whether two names are of one LLM; owners and case are not compared.

    Args:
        stated: Name, path or Hub id.
        base: Another one.
    """
    return _last_part(stated) == _last_part(base)


def require_base_weights(file: Path, weights: str) -> None:
    """Refuse a LoRA that states that it was trained on other weights.

    The name does not show it: an LLM that a LoRA was merged into keeps its name.

    Args:
        file: The LoRA's weights; those that another package wrote do not state it.
        weights: SHA-256 of the LLM's weights, from `fingerprint_text`.

    Raises:
        ValueError: The weights differ.
    """
    with safe_open(file, framework="pt") as opened:
        trained_on = (opened.metadata() or {}).get(BASE_WEIGHTS)
    if trained_on is not None and trained_on != weights:
        raise ValueError(
            f"{file.parent} was trained on an LLM with other weights ({trained_on} then, {weights} "
            "now). Begin from it on that very model, which it must not be merged into."
        )


def _last_part(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].casefold()
