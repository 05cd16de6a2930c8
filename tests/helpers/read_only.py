"""Folders that this process may not write, also where root runs the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NOBODY = 65534


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """Take from this process the right to write into a folder.

    Nothing is forbidden to root. But the kernel answers `os.access` for the real user, and grants
    everything else to the effective one, which stays.
    """
    is_root = os.getuid() == 0
    folder.chmod(0o555)
    if is_root:
        os.setreuid(_NOBODY, 0)
    try:
        yield folder
    finally:
        if is_root:
            os.setreuid(0, 0)
        folder.chmod(0o755)
