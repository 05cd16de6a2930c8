"""Refuses towers and LoRAs that cannot be there, before anything costly is imported or loaded."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from ..configs.build_config import EMBEDDED
from ..model_folders.hub_access import explain_missing, is_hub_id
from ..model_folders.lora_base import LORA_CONFIG


def require_sources(
    *,
    vision: str | Path | None = None,
    text: str | Path | None = None,
    lora: str | Path | None = None,
) -> None:
    """Refuse sources that are neither there nor named as on the Hub, before anything is loaded.

    Args:
        vision: Hub id or folder of a vision tower, or "embedded".
        text: Hub id, folder, or a `.gguf` file of a language model, also of a Hub repository
            (`owner/name/FILE.gguf`), or "embedded".
        lora: Hub id or folder of a LoRA.

    Raises:
        ValueError: It names every such source.
    """
    errors = []
    if vision is not None and vision != EMBEDDED:
        errors.append(_find_error("vision tower", vision, file="config.json"))
    if text is not None and Path(text).suffix == ".gguf":
        errors.append(_find_error_of_gguf(Path(text)))
    elif text is not None and text != EMBEDDED:
        errors.append(_find_error("language model", text, file="config.json"))
    if lora is not None:
        errors.append(_find_error("LoRA", lora, file=LORA_CONFIG))
    if found := [error for error in errors if error]:
        raise ValueError(f"{'; '.join(found)}. Correct the path or id.")


def _find_error(what: str, source: str | Path, *, file: str) -> str | None:
    path = Path(source)
    if path.is_dir():
        if (path / file).is_file():
            return None
        return f"{source}: the folder has no {file}, so it does not hold a {what}"
    if path.exists():
        return f"{source}: a file; the {what} must be a folder or a Hub id"
    if str(source) != EMBEDDED and get_close_matches(str(source), [EMBEDDED], cutoff=0.8):
        return f"{source}: no such {what}. Did you mean {EMBEDDED}?"
    missing = explain_missing(source, may_lack_owner=True)
    return f"{source}: no such {what}: {missing}" if missing else None


def _find_error_of_gguf(source: Path) -> str | None:
    if source.is_file() or is_hub_id(str(source.parent)):
        return None
    return f"{source}: no such .gguf file, and no file of a Hub repository like 'owner/name/FILE'"
