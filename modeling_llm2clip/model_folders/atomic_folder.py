"""Writes a folder that is complete or absent, and clears what killed writers of it left behind.

Everything is written into a hidden folder beside the target, `.NAME-` and eight characters. It also
holds a claim: a file with the target's name, under a lock of the kernel that ends with the process
that holds it, however that ends. So a claim that nobody locks belongs to a dead writer. Where the
file system has no `flock`, nothing is claimed and nothing is cleared.
"""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..data.atomic_files import lock_file, require_writable

_CLAIM = ".llm2clip-is-writing"


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes the target unless an error is raised inside."""
    require_new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    unfinished = scratch / folder.name
    try:
        with (scratch / _CLAIM).open("w", encoding="utf-8") as claim:
            if _lock(claim, shared=False):
                claim.write(folder.name)  # only now: an empty claim is ignored
                claim.flush()
            unfinished.mkdir()
            yield unfinished
            unfinished.chmod(0o755)
            for file in unfinished.glob("*.safetensors"):
                file.chmod(0o644)  # safetensors writes for its owner alone
            unfinished.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def require_new_folder(folder: Path) -> None:
    """Refuse a folder that exists and is not empty, or cannot be made."""
    require_writable(folder.parent)  # a temporary folder there gets the name at the end
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty. Name a new folder, or remove it.")


def clear_leftovers(folder: Path) -> None:
    """Remove what writers of this folder left when they were killed.

    Any other hidden folder beside it is kept: one without a claim, one claimed for another target,
    one whose writer is alive. Several processes may clear at once.
    """
    for claim in folder.parent.glob(f".{glob.escape(folder.name)}-*/{_CLAIM}"):
        if not claim.parent.is_symlink() and _is_abandoned(claim, folder.name):
            shutil.rmtree(claim.parent, ignore_errors=True)


def _is_abandoned(claim: Path, name: str) -> bool:
    try:
        with claim.open(encoding="utf-8") as opened:
            # Its writer may have finished in between; then it is gone.
            return opened.read() == name and _lock(opened, shared=True) and claim.exists()
    except (FileNotFoundError, PermissionError):  # gone in between, or another user's
        return False


def _lock(file: IO[str], *, shared: bool) -> bool:
    """Lock an open file; False if another process has locked it, or nothing can."""
    try:
        return lock_file(file, shared=shared, wait=False)
    except OSError:
        return False
