"""Reads a folder of pictures with a `captions.jsonl`.

One JSON object a line and picture (and language):

| field | meaning |
| --- | --- |
| `image` | path of the picture, relative to the folder; required |
| `captions` | one or several texts, each of which describes the picture; required |
| `keywords` | words that belong to the picture; optional |
| `key` | what is shown: pictures with the same key show the same thing; default: `image` |
| `lang` | language of the texts, BCP 47; default `en` |
| `style`, `group`, `license`, `source` | notes; optional, kept out of training |
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CAPTIONS_FILE = "captions.jsonl"
_FIELDS = {"image", "captions", "keywords", "key", "lang", "style", "group", "license", "source"}
_FAULTS_SHOWN = 5


@dataclass(frozen=True)
class CaptionedImage:
    """One picture and its texts in one language."""

    path: Path
    key: str
    captions: tuple[str, ...]
    keywords: tuple[str, ...]
    lang: str


def read_captioned_folder(folder: str | Path) -> list[CaptionedImage]:
    """Read every line, or raise once with every fault.

    Raises:
        ValueError: the file is missing or empty, or lines are broken: how many of each kind, and
            the first of them by line number.
    """
    file = Path(folder) / CAPTIONS_FILE
    if not file.is_file():
        raise ValueError(f"{folder} has no {CAPTIONS_FILE}. See data/captioned_images.py.")
    records: list[CaptionedImage] = []
    faults: dict[str, list[str]] = {}
    seen: set[tuple[str, str]] = set()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        fields, fault = _parse(line, Path(folder))
        if not fault and (pair := (fields["image"], fields.get("lang", "en"))) in seen:
            fault = "picture and language repeated"
        elif not fault:
            seen.add(pair)
            records.append(_to_record(fields, Path(folder)))
        if fault:
            faults.setdefault(fault, []).append(f"line {number}")
    _refuse(file, faults, len(records))
    return records


def _parse(line: str, folder: Path) -> tuple[dict[str, Any], str]:
    """Return the fields of a line and its fault, which is empty for a good line."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError:
        return {}, "not JSON"
    if not isinstance(fields, dict) or not isinstance(fields.get("image"), str):
        return {}, "no 'image'"
    if unknown := sorted(set(fields) - _FIELDS):
        return {}, f"unknown field {unknown[0]!r}"
    for name in ("captions", "keywords"):
        texts = fields.get(name, [])
        if not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
            return {}, f"{name!r} is not a list of non-blank texts"
    if not fields.get("captions"):
        return {}, "no caption"
    if not (folder / fields["image"]).is_file():
        return {}, "picture missing"
    return fields, ""


def _to_record(fields: dict[str, Any], folder: Path) -> CaptionedImage:
    return CaptionedImage(
        path=folder / fields["image"],
        key=str(fields.get("key", fields["image"])),
        captions=tuple(fields["captions"]),
        keywords=tuple(fields.get("keywords", ())),
        lang=fields.get("lang", "en"),
    )


def _refuse(file: Path, faults: dict[str, list[str]], num_records: int) -> None:
    if faults:
        listed = "; ".join(
            f"{kind}: {len(lines)} ({', '.join(lines[:_FAULTS_SHOWN])})"
            for kind, lines in faults.items()
        )
        raise ValueError(f"{file}: {listed}. Correct or remove these lines.")
    if not num_records:
        raise ValueError(f"{file} has no lines. Each picture needs one.")
