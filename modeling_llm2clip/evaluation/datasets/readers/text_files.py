"""Reads the lines of text files, compressed or not."""

from __future__ import annotations

import gzip
from pathlib import Path


def read_lines(file: Path) -> list[str]:
    """Read the lines of a text file, `.gz` or not, without blank ones at its end.

    Only a line feed ends a line: a caption may hold other separators.

    Raises: ValueError naming the file when it is not UTF-8, or not gzip.
    """
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8-sig")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}: cannot be read as text ({error}). Get it anew.") from error
    lines = [line.rstrip("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines
