"""Reads JSON lines, JSON lists that are too large for memory, and whole JSON files.

`captions.jsonl` has one record per line. So does `metadata.jsonl`, the name that `datasets` uses
for such a file in a folder of images.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..record_fields import RawRecord
from ..remote.file_locations import FileLocation, name_file, open_buffered
from ..validation_errors import ErrorCollector

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors write it before UTF-8
_UNREADABLE = "JSON nested too deeply, or an integer of thousands of digits"
_SHOWN = 100  # characters of a name in an error
_READ_AT_ONCE = 2**20  # characters
_WHITESPACE = " \t\r\n"  # as JSON defines it
_NOT_BLANK = re.compile(r"[^ \t\r\n]")


def read_json_lines(
    file: FileLocation,
    errors: ErrorCollector,
    *,
    start: int = 0,
    stop: int | None = None,
    first_line: int = 1,
    name: str | None = None,
) -> Iterator[RawRecord]:
    """Yield a raw record per line that is not blank."""
    bare_name = name_file(file)
    name = name or bare_name
    for number, line in iterate_lines(file, start=start, stop=stop, first_line=first_line):
        place = f"{bare_name} line {number}"
        fields = parse_object(line)
        if isinstance(fields, str):
            errors.add(fields, place)
        else:
            if None in fields.values():
                fields = {field: value for field, value in fields.items() if value is not None}
            yield RawRecord(place, fields, text_name=f"{name}/{number}")


def iterate_lines(
    file: FileLocation, *, start: int = 0, stop: int | None = None, first_line: int = 1
) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1, and the bytes of each line that is not blank.

    Only a line feed ends a line, because texts may contain other separators.
    """
    with open_buffered(file) as opened:
        opened.seek(start)
        lines = opened if stop is None else io.BytesIO(opened.read(stop - start))
        yield from number_lines(lines, first_line)


def number_lines(lines: Iterable[bytes], first: int = 1) -> Iterator[tuple[int, bytes]]:
    """Number the lines of a file, leaving out blank lines."""
    for number, line in enumerate(lines, first):
        line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if line.strip():
            yield number, line


def find_line_starts(file: Path, bytes_apart: int) -> Iterator[tuple[int, int]]:
    """Yield byte offset and line number of the lines that split a file into similar ranges."""
    position, line = 0, 1
    with file.open("rb") as opened:
        yield position, line
        while content := opened.read(bytes_apart):
            rest = opened.readline()
            position += len(content) + len(rest)
            line += content.count(b"\n") + rest.count(b"\n")
            if opened.peek(1):
                yield position, line


def parse_object(content: bytes) -> dict[str, Any] | str:
    """Parse a JSON object; if it is invalid, return a string that describes the error."""
    try:
        text = content.decode("utf-8").strip(_WHITESPACE)
        fields, end = _DECODER.raw_decode(text)
    except UnicodeDecodeError:
        return "not UTF-8"
    except json.JSONDecodeError:
        return "not JSON"
    except (RecursionError, ValueError):
        return _UNREADABLE
    except RepeatedFieldError as error:
        return str(error)
    if end != len(text):
        return "not JSON"
    return fields if isinstance(fields, dict) else "not an object"


class RepeatedFieldError(Exception):
    """A field occurs twice; json would silently keep the last one."""


def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object from its members; raise RepeatedFieldError if a name occurs twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise RepeatedFieldError(f"field {twice[:_SHOWN]!r} occurs twice in one object")
    return fields


# json.loads would create a decoder per line.
_DECODER = json.JSONDecoder(object_pairs_hook=make_object)


def parse_json(text: str) -> Any:
    """Parse JSON; raise ValueError for any error, including excessive depth."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def read_json(file: Path) -> Any:
    try:
        return parse_json(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # nesting, digits, encoding or JSON
        raise ValueError(
            f"{file}: not JSON, or nested too deeply ({error}). Download it again."
        ) from error


def read_object(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} contains a {type(content).__name__}, not an object. Restore it.")
    return content


def iterate_json_list(file: Path) -> Iterator[Any]:
    """Yield the items of a JSON list one by one, reading no further than needed."""
    decoder = json.JSONDecoder()
    text, position, marks = "", 0, "["
    with file.open(encoding="utf-8-sig") as stream:
        while True:
            mark = _NOT_BLANK.search(text, position)
            if mark and mark[0] not in marks:
                raise ValueError(
                    f"{file}: not a JSON list, or truncated ({mark[0]!r} instead of {marks!r}). "
                    "Download it again."
                )
            first = mark and _NOT_BLANK.search(text, mark.end())
            if (mark and mark[0] == "]") or (first and first[0] == "]"):
                return
            try:
                start = first.start() if first else len(text)
                value, position = decoder.raw_decode(text, start)
            except json.JSONDecodeError as error:  # the item may continue in the next part
                part = stream.read(_READ_AT_ONCE)
                if not part:
                    raise ValueError(
                        f"{file}: not a JSON list, or truncated ({error}). Download it again."
                    ) from error
                text, position = text[position:] + part, 0
                continue
            except (RecursionError, ValueError) as error:
                raise ValueError(f"{file}: {_UNREADABLE}. Correct it.") from error
            marks = ",]"
            yield value
