"""What img2dataset writes for three images, one of which could not be downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from captioned_files import encode, write_shard

URLS = ["https://a.example/red.png", "https://b.example/gone.png", "https://c.example/blue.png"]
IMAGES = [encode("images/red.png"), None, encode("images/blue.png")]
CAPTIONS = ["a red square", "what is gone", "a blue square"]
TEXT_COLUMNS = ("caption", "url", "key", "status", "error_message", "exif", "sha256")


def describe_rows() -> list[dict[str, Any]]:
    return [
        {
            "caption": CAPTIONS[row],
            "url": URLS[row],
            "key": f"{row:09d}",
            "status": "failed_to_download" if image is None else "success",
            "error_message": "HTTP Error 404: Not Found" if image is None else None,
            "width": None if image is None else 9,
            "height": None if image is None else 6,
            "original_width": None if image is None else 9,
            "original_height": None if image is None else 6,
            "exif": None if image is None else "{}",
            "sha256": None if image is None else "0" * 64,
        }
        for row, image in enumerate(IMAGES)
    ]


def write_notes(file: Path, rows: list[dict[str, Any]], *, column: str | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    fields = [(name, pa.string() if name in TEXT_COLUMNS else pa.int32()) for name in rows[0]]
    schema = pa.schema(fields)
    if column is not None:
        schema = schema.append(pa.field(column, pa.binary()))
        rows = [{**row, column: image} for row, image in zip(rows, IMAGES, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows, schema), file)


def write_downloaded_parquet(folder: Path, *, column: str = "jpg") -> Path:
    write_notes(folder / "00000.parquet", describe_rows(), column=column)
    (folder / "00000_stats.json").write_text("{}", encoding="utf-8")
    return folder


def write_downloaded_tar(folder: Path) -> Path:
    members: dict[str, bytes] = {}
    for row, image in zip(describe_rows(), IMAGES, strict=True):
        if image is not None:
            members[f"{row['key']}.jpg"] = image
            members[f"{row['key']}.txt"] = row["caption"].encode()
            members[f"{row['key']}.json"] = json.dumps(row, indent=4).encode()
    write_shard(folder / "00000.tar", members)
    write_notes(folder / "00000.parquet", describe_rows())
    (folder / "00000_stats.json").write_text("{}", encoding="utf-8")
    return folder
