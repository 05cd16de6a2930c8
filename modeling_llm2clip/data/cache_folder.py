"""Where the package keeps files that it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_folder() -> Path:
    """`$XDG_CACHE_HOME/llm2clip`, usually `~/.cache/llm2clip`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm2clip"
