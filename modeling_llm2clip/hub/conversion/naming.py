"""What a written model may say of where it came from."""

from __future__ import annotations

from pathlib import Path


def public_name(source: str | Path) -> str:
    """Return a Hub id, or a file's or folder's name without its path, which would be published."""
    return Path(source).name if Path(source).exists() else str(source)
