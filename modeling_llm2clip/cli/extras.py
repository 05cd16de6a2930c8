"""Optional packages that a command needs for its arguments, reported before anything else.

Only file names and `config.json` are read, and neither torch nor transformers is imported. Needs
that cannot be detected in this way, such as those of a model that is not downloaded yet, are
reported with the same words where they first arise.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._extras import (
    GGUF,
    LORA,
    OPEN_CLIP,
    SENTENCE_TRANSFORMERS,
    TIMM_TOWER,
    Need,
)

_TIMM_TYPE = "timm_wrapper"  # transformers' name for every network of timm
_LORA_FILE = "adapter_config.json"


def list_needs_of_model(
    source: str | Path, *, revision: str | None = None, extra: str | None = None
) -> Iterator[Need]:
    """List what a vision tower, or a model that has one, needs."""
    config = _fetch_json(source, "config.json", revision) or {}
    tower = config.get("vision_config") or config
    # What timm itself publishes has no model type.
    if tower.get("model_type") == _TIMM_TYPE or "pretrained_cfg" in tower:
        yield TIMM_TOWER if extra is None else TIMM_TOWER._replace(extra=extra)


def list_needs_of_llm(source: str | Path) -> Iterator[Need]:
    """List what a language model needs."""
    if Path(source).suffix == ".gguf":
        yield GGUF


def list_needs_of_lora(source: str | Path | None) -> Iterator[Need]:
    """List what merging a LoRA needs; a folder without one needs nothing."""
    if source is not None and (not Path(source).is_dir() or (Path(source) / _LORA_FILE).is_file()):
        yield LORA


def list_needs_of_evaluated(
    source: str, *, model_type: str | None, revision: str | None
) -> Iterator[Need]:
    """List what a model of any type that can be evaluated needs."""
    if not Path(source).exists() and "=" in source:
        source = source.partition("=")[2]
    if model_type is None:
        model_type = _guess_model_type(source, revision)
    if model_type == "open_clip":
        yield OPEN_CLIP
    elif model_type == "sentence-transformers":
        yield SENTENCE_TRANSFORMERS
    else:
        yield from list_needs_of_model(source, revision=revision)


def _guess_model_type(source: str, revision: str | None) -> str | None:
    """Guess the model type where it needs an extra; `detect_model_type` has the last word."""
    if Path(source).is_file():
        return "open_clip"
    config = _fetch_json(source, "config.json", revision)
    if (config or {}).get("model_type") == "llm2clip":
        return None
    if _find(source, "modules.json", revision) is not None:
        return "sentence-transformers"
    if config is None and _find(source, "open_clip_config.json", revision) is not None:
        return "open_clip"
    return None


def _fetch_json(source: str | Path, name: str, revision: str | None) -> dict[str, Any] | None:
    file = _find(source, name, revision)
    if file is None:
        return None
    from ..model_folders.model_types import read_json_object  # imports huggingface_hub

    return read_json_object(file)


def _find(source: str | Path, name: str, revision: str | None) -> Path | None:
    if Path(source).exists():
        file = Path(source) / name
        return file if file.is_file() else None
    from ..model_folders.model_folder import fetch_hub_file, is_hub_id  # imports huggingface_hub

    return fetch_hub_file(source, name, revision=revision) if is_hub_id(source) else None
