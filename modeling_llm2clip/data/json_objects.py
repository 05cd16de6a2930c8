"""Reads JSON objects out of text files, one a line or one a text, and tells what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MARK = b"\xef\xbb\xbf"  # which some editors write in front of UTF-8


def iterate_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number, from 1, and bytes of every line that is not blank.

    Lines of bytes, because only a line feed ends one: a text may hold other separators.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(_MARK) if number == 1 else line
            if line.strip():
                yield number, line


def parse_object(content: bytes) -> dict[str, Any] | str:
    """An object, or what is wrong with it."""
    try:
        fields = json.loads(content.decode("utf-8"), object_pairs_hook=_make_object)
    except UnicodeDecodeError:
        return "not UTF-8"
    except json.JSONDecodeError:
        return "not JSON"
    except _RepeatedFieldError as error:
        return str(error)
    return fields if isinstance(fields, dict) else "not an object"


class _RepeatedFieldError(Exception):
    """A field stands twice, and json would keep the last one without a word."""


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _RepeatedFieldError(f"field {twice!r} twice in one object")
    return fields
