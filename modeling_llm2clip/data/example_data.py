"""Finds the embedded pictures, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def find_example_data() -> Path:
    """Return the folder that holds `emoji` and `photographs`.

    Raises: FileNotFoundError when the installation lacks it.
    """
    # A wheel carries the folder inside the package; a checkout has it where people look for it.
    for folder in (_PACKAGE / "example_data", _PACKAGE.parent / "examples" / "data"):
        if (folder / "emoji").is_dir():
            return folder
    raise FileNotFoundError(
        f"The embedded pictures are not beside {_PACKAGE}. Install the package again, or give "
        "--pictures."
    )
