"""Digests of the small files that decide a model's embeddings beside its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

# Where a model was saved by whom changes no embedding.
_IGNORED_FIELDS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
# Of this package's and of downloads: says nothing of how a text or an image is read.
_IGNORED_FILES = ("model.safetensors.index.json", "README.md")


def hash_files(folder: Path, patterns: Iterable[str]) -> str:
    """SHA-256 over names and contents of the files that fit, JSON without what changes nothing.

    Args:
        patterns: as `Path.glob` takes them.
    """
    digest = hashlib.sha256()
    found = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    for file in found:
        if file.name not in _IGNORED_FILES:
            digest.update(f"{file.relative_to(folder)}\n".encode())
            digest.update(_read_relevant(file))
    return digest.hexdigest()


def _read_relevant(file: Path) -> bytes:
    if file.suffix != ".json":
        return file.read_bytes()
    content = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if name not in _IGNORED_FIELDS}
    return json.dumps(content, sort_keys=True).encode()
