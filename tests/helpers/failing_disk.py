"""A file whose disk fails: what is there cannot be read, as the operating system says."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

_UNREADABLE = Path("/proc/self/mem")  # the kernel answers EIO where no memory is mapped


def make_failing_file(file: Path) -> Path:
    """Put a file of this name that exists, and gives EIO when it is read."""
    file.unlink(missing_ok=True)
    if not _UNREADABLE.exists():
        pytest.skip("only Linux has a file that fails")
    file.symlink_to(_UNREADABLE)
    with pytest.raises(OSError, match=r"\[Errno 5\]") as caught:
        file.read_bytes()
    assert caught.value.errno == errno.EIO
    return file
