"""Reads JSON lines: `captions.jsonl`, or `metadata.jsonl` as `datasets` has it beside pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ..captioned_images import RawRecord
from ..faults import FaultCollector


def read_json_lines(file: Path, faults: FaultCollector) -> Iterator[RawRecord]:
    """Yield one raw record a line; blank lines are none."""
    # Lines of bytes, because only a line feed ends one: a text may hold other separators.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{file.name} line {number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                fields = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                faults.add("not UTF-8", place)
                continue
            except json.JSONDecodeError:
                faults.add("not JSON", place)
                continue
            if not isinstance(fields, dict):
                faults.add("not an object", place)
                continue
            yield RawRecord(place, {k: v for k, v in fields.items() if v is not None})
