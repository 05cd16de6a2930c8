"""What every recorded result says of where it came from."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path


def read_commit() -> str:
    """Short name of the commit that is checked out."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def describe_processor() -> str:
    """Name of the processor, as Linux or else Python tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
