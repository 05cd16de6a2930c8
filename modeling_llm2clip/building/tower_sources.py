"""Refuses towers and LoRAs that cannot be there, before anything costly is imported or loaded."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

from ..configs.build_config import EMBEDDED
from ..model_folders.lora_base import LORA_CONFIG

# Older Hub repositories have no owner ("gpt2").
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def require_sources(
    *,
    vision: str | Path | None = None,
    text: str | Path | None = None,
    lora: str | Path | None = None,
) -> None:
    """Refuse sources that are neither there nor named as on the Hub, before anything is loaded.

    Args:
        vision: Hub id or folder of a vision tower.
        text: Hub id, folder, or a `.gguf` file of a language model, also of a Hub repository
            (`owner/name/FILE.gguf`).
        lora: Hub id or folder of a LoRA.

    Raises:
        ValueError: It names every such source.
    """
    errors = []
    if vision is not None:
        errors.append(_find_error("vision tower", Path(vision), file="config.json"))
    if text is not None and Path(text).suffix == ".gguf":
        errors.append(_find_error_of_gguf(Path(text)))
    elif text is not None:
        errors.append(_find_error("language model", Path(text), file="config.json"))
    if lora is not None:
        errors.append(_find_error("LoRA", Path(lora), file=LORA_CONFIG))
    if found := [error for error in errors if error]:
        raise ValueError(f"{'; '.join(found)}. Correct the path or id.")


def _find_error(what: str, source: Path, *, file: str) -> str | None:
    if source.is_dir():
        if (source / file).is_file():
            return None
        return f"{source}: the folder has no {file}, so it does not hold a {what}"
    if source.exists():
        return f"{source}: a file; the {what} must be a folder or a Hub id"
    if str(source) != EMBEDDED and get_close_matches(str(source), [EMBEDDED], cutoff=0.8):
        return f"{source}: no such {what}. Did you mean {EMBEDDED}?"
    if _HUB_ID.fullmatch(str(source)):
        return None
    return f"{source}: no such {what}: no folder of this name, and no Hub id like 'owner/name'"


def _find_error_of_gguf(source: Path) -> str | None:
    if source.is_file() or (_HUB_ID.fullmatch(str(source.parent)) and "/" in str(source.parent)):
        return None
    return f"{source}: no such .gguf file, and no file of a Hub repository like 'owner/name/FILE'"
