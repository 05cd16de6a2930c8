"""What every recorded result says of where it came from."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

_UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def read_commit(checkout: Path | None = None) -> str:
    """Short name of the commit of a checkout.

    Args:
        checkout: Its folder; None for the one that this file is in.
    """
    folder = checkout or Path(__file__).parent
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def describe_processor() -> str:
    """Return the name of the CPU, from Linux or else Python, and its units for matrix products.

    The name alone does not distinguish a CPU with units for bfloat16 from one without.
    """
    lines = dict(_split_line(line) for line in Path("/proc/cpuinfo").read_text().splitlines())
    name = lines.get("model name") or platform.processor() or "unknown"
    units = [unit for unit in _UNITS if unit in lines.get("flags", "").split()]
    return f"{name} ({', '.join(units)})" if units else name


def _split_line(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()
