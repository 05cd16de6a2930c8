"""Finds the folder of a model that is named by a path or by a Hub id."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

# Other formats of the same weights, which are read only where they are asked for by name.
_NOT_DOWNLOADED = [
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "onnx/*",
    "openvino/*",
]  # fmt: skip


def find_model_folder(
    source: str | Path, *, revision: str | None = None, only: Sequence[str] | None = None
) -> Path:
    """Return a local folder, or download a Hub repository and return where it lies.

    Args:
        only: names of files; nothing else is downloaded, and these in whatever format.
    Raises: ValueError when the source is neither; FileNotFoundError when it is not in the cache
        and the Hub cannot be reached; what else huggingface_hub raises on downloading.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(
                f"{source} is a folder, which has no revision {revision!r}; leave it out."
            )
        return Path(source)
    if not is_hub_id(source):
        raise ValueError(f"{source}: no such folder, and no Hub id like 'owner/name'. Correct it.")
    try:
        return Path(
            snapshot_download(
                str(source),
                revision=revision,
                allow_patterns=None if only is None else list(only),
                ignore_patterns=_NOT_DOWNLOADED if only is None else None,
            )
        )
    except LocalEntryNotFoundError as error:  # which names no repository
        raise FileNotFoundError(f"{source} cannot be downloaded: {error}") from error


def is_hub_id(source: str | Path) -> bool:
    """Whether this is named like a Hub repository; a `Path` never is."""
    return isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None
