"""What a written model may say of where it came from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def public_name(source: str | Path) -> str:
    """Return a Hub id, or a file's or folder's name without its path, which would be published."""
    return Path(source).name if Path(source).exists() else str(source)


def require_no_revision(source: str | Path, revision: str | None) -> None:
    """Raise ValueError when a local source is given a revision, which it would not have."""
    if revision is not None and Path(source).exists():
        raise ValueError(
            f"{source} is a local file or folder, which has no revision {revision!r}; leave it out."
        )


def split_revision(source: str | Path) -> tuple[str | Path, str | None]:
    """Split `owner/name@revision`; what exists locally is taken as it is.

    Raises: ValueError when nothing stands behind the `@`.
    """
    if isinstance(source, Path) or "@" not in source or Path(source).exists():
        return source, None
    name, _, revision = source.partition("@")
    if not revision:
        raise ValueError(f"{source} has no revision behind its '@'. Write one, or leave it out.")
    require_no_revision(name, revision)
    return name, revision


def find_commit(source: str | Path, paths: Iterable[Path]) -> str | None:
    """Return the commit that files of a Hub repository were downloaded at.

    Args:
        paths: files and folders, some of them in the snapshot of the repository in
            huggingface_hub's cache: `models--owner--name/snapshots/COMMIT`.
    Returns: None where none lies in one, as of local sources.
    """
    cache = f"models--{str(source).replace('/', '--')}"
    for path in paths:
        parts = path.parts
        if cache in parts:
            kind, *rest = parts[parts.index(cache) + 1 :]
            if kind == "snapshots" and rest:
                return rest[0]
    return None
