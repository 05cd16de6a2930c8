"""Readers of JSON that several formats share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

_READ_AT_ONCE = 2**20


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises: ValueError naming the file when it is none.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error}). Get the file anew.") from error


def iterate_json_list(file: Path) -> Iterator[Any]:
    """Yield the objects of a JSON list one by one; what lies behind the last taken is not read.

    Raises: ValueError naming the file when it is no list of objects.
    """
    with file.open(encoding="utf-8-sig") as stream:
        text = _JsonStream(stream)
        try:
            text.take("[")
            while text.peek() != "]":
                yield text.decode()
                if text.peek() != "]":
                    text.take(",")
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: no JSON list, or cut off ({error}). Get it anew.") from error


class _JsonStream:
    """JSON that is read piece by piece."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._text = ""
        self._position = 0
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self._position < len(self._text) and self._text[self._position].isspace():
                self._position += 1
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_more():
                return ""

    def take(self, mark: str) -> None:
        """Pass over a mark that must come next."""
        if self.peek() != mark:
            raise json.JSONDecodeError(f"Expected {mark!r}", self._text, self._position)
        self._position += 1

    def decode(self) -> Any:
        """Decode the next object, which may not have been read to its end yet."""
        self.peek()
        while True:
            try:
                value, self._position = self._decoder.raw_decode(self._text, self._position)
                return value
            except json.JSONDecodeError:
                if not self._read_more():
                    raise

    def _read_more(self) -> bool:
        part = self._stream.read(_READ_AT_ONCE)
        self._text = self._text[self._position :] + part
        self._position = 0
        return bool(part)
