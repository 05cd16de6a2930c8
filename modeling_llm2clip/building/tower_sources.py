"""Tells of towers and adapters before they are loaded: that they cannot be there, what they say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..model_folders.lora_base import LORA_CONFIG

# Older Hub repositories have no owner ("gpt2").
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def require_sources(
    *,
    vision: str | Path | None = None,
    llm: str | Path | None = None,
    caption_lora: str | Path | None = None,
) -> None:
    """Raise ValueError that names every source which is neither there nor named as on the Hub.

    Args:
        vision: Hub id or folder.
        llm: Hub id, folder, or a `.gguf` file, also of a Hub repository (`owner/name/FILE.gguf`).
        caption_lora: Hub id or folder of a LoRA.
    """
    errors = []
    if vision is not None:
        errors.append(_find_error("vision tower", Path(vision), file="config.json"))
    if llm is not None and Path(llm).suffix == ".gguf":
        errors.append(_find_error_of_gguf(Path(llm)))
    elif llm is not None:
        errors.append(_find_error("language model", Path(llm), file="config.json"))
    if caption_lora is not None:
        adapter = Path(caption_lora)
        errors.append(_find_error("caption adapter", adapter, file=LORA_CONFIG))
    if found := [error for error in errors if error]:
        raise ValueError(f"{'; '.join(found)}. Correct the path or id.")


@contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """Say in transformers' errors about what is not there which source it was."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{source} cannot be loaded: {error}") from error


def _find_error(what: str, source: Path, *, file: str) -> str | None:
    if source.is_dir():
        there = (source / file).is_file()
        return None if there else f"{source}: the folder has no {file}, so it holds no {what}"
    if source.exists():
        return f"{source}: a file; the {what} must be a folder or a Hub id"
    if _HUB_ID.fullmatch(str(source)):
        return None
    return f"{source}: no such {what}: no folder of this name, and no Hub id like 'owner/name'"


def _find_error_of_gguf(source: Path) -> str | None:
    if source.is_file() or (_HUB_ID.fullmatch(str(source.parent)) and "/" in str(source.parent)):
        return None
    return f"{source}: no such .gguf file, and no file of a Hub repository like 'owner/name/FILE'"
