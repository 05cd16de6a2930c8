"""Reads JSON lines: `captions.jsonl`, or `metadata.jsonl` as `datasets` has it beside images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..json_objects import iterate_lines, parse_object
from ..records import RawRecord
from ..validation_errors import ErrorCollector


def read_json_lines(file: Path, errors: ErrorCollector) -> Iterator[RawRecord]:
    """Yield one raw record a line; blank lines are none."""
    for number, line in iterate_lines(file):
        place = f"{file.name} line {number}"
        fields = parse_object(line)
        if isinstance(fields, str):
            errors.add(fields, place)
        else:
            yield RawRecord(place, {k: v for k, v in fields.items() if v is not None})
