"""Reads JSON lines: `captions.jsonl`, or `metadata.jsonl` as `datasets` has it beside pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..captioned_images import RawRecord
from ..faults import FaultCollector
from ..json_objects import iterate_lines, parse_object


def read_json_lines(file: Path, faults: FaultCollector) -> Iterator[RawRecord]:
    """Yield one raw record a line; blank lines are none."""
    for number, line in iterate_lines(file):
        place = f"{file.name} line {number}"
        fields = parse_object(line)
        if isinstance(fields, str):
            faults.add(fields, place)
        else:
            yield RawRecord(place, {k: v for k, v in fields.items() if v is not None})
