"""What optional packages a command needs for what it was given: told before anything else.

Only file names and `config.json` are read, and neither torch nor transformers is imported. What
cannot be told in this way, such as the kind of a model that is not downloaded yet, is told by the
same words where it is first needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._extras import (
    GGUF,
    LORA,
    OPEN_CLIP,
    PARQUET,
    SENTENCE_TRANSFORMERS,
    TIMM_TOWER,
    Need,
)

_TIMM_TYPE = "timm_wrapper"  # transformers' name for every network of timm
_LORA_FILE = "adapter_config.json"
_unreachable: set[str] = set()  # asked for once in a process


def list_needs_of_model(
    source: str | Path, *, revision: str | None = None, extra: str | None = None
) -> Iterator[Need]:
    """List what a vision tower, or a model that has one, needs.

    Args:
        source: folder or Hub id; only its `config.json` is read, and downloaded if need be.
        extra: to name instead of the smallest one.
    """
    config = _read_json(source, "config.json", revision) or {}
    tower = config.get("vision_config") or config
    # What timm itself publishes has no model type.
    if tower.get("model_type") == _TIMM_TYPE or "pretrained_cfg" in tower:
        yield TIMM_TOWER if extra is None else TIMM_TOWER._replace(extra=extra)


def list_needs_of_data(source: str | Path, *, extra: str | None = None) -> Iterator[Need]:
    """List what captioned data need."""
    path = Path(source)
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
        yield PARQUET if extra is None else PARQUET._replace(extra=extra)


def list_needs_of_llm(source: str | Path) -> Iterator[Need]:
    """List what a language model needs."""
    if Path(source).suffix == ".gguf":
        yield GGUF


def list_needs_of_lora(source: str | Path | None) -> Iterator[Need]:
    """List what merging a LoRA needs; a folder without one needs nothing."""
    if source is not None and (not Path(source).is_dir() or (Path(source) / _LORA_FILE).is_file()):
        yield LORA


def list_needs_of_evaluated(
    source: str, *, kind: str | None, revision: str | None
) -> Iterator[Need]:
    """List what a model of any kind that can be evaluated needs; its name may stand before it."""
    if not Path(source).exists() and "=" in source:
        source = source.partition("=")[2]
    if kind is None:
        kind = _guess_kind(source, revision)
    if kind == "open_clip":
        yield OPEN_CLIP
    elif kind == "sentence-transformers":
        yield SENTENCE_TRANSFORMERS
    else:
        yield from list_needs_of_model(source, revision=revision)


def _guess_kind(source: str, revision: str | None) -> str | None:
    """Guess the model type where it needs an extra; `detect_model_type` has the last word."""
    if Path(source).is_file():
        return "open_clip"
    config = _read_json(source, "config.json", revision)
    if (config or {}).get("model_type") == "llm2clip":
        return None
    if _find(source, "modules.json", revision) is not None:
        return "sentence-transformers"
    if config is None and _find(source, "open_clip_config.json", revision) is not None:
        return "open_clip"
    return None


def _read_json(source: str | Path, name: str, revision: str | None) -> dict[str, Any] | None:
    file = _find(source, name, revision)
    if file is None:
        return None
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # damaged, which is told with more words where the model is loaded
        return None
    return content if isinstance(content, dict) else None


def _find(source: str | Path, name: str, revision: str | None) -> Path | None:
    if Path(source).exists():
        file = Path(source) / name
        return file if file.is_file() else None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source) in _unreachable:
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), name, revision=revision))
    except LocalEntryNotFoundError:  # no Hub, which is found out after several tries
        _unreachable.add(str(source))
        return None
    except (OSError, ValueError):  # no such file or repository
        return None
