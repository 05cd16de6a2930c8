"""Captioned images in every format, written by its own tools: json, tarfile, `datasets`."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.validation_errors import DataValidationError

# The lines to write, and the records that every format must give back.
LINES: list[dict[str, Any]] = [
    {"file_name": "images/red.png", "captions": ["a red square", "a square  of red"],
     "long_captions": ["A red square, and nothing beside it."], "keywords": ["red"],
     "group_id": "square", "lang": "en"},
    {"file_name": "images/red.png", "captions": ["ein rotes Quadrat"], "group_id": "square",
     "lang": "de"},
    {"file_name": "images/blue.png", "captions": [" a blue\nsquare \n"], "license": "CC0 1.0"},
]  # fmt: skip
RECORDS = [
    CaptionedImage(
        None, "images/red.png", "square", ("a red square", "a square  of red"),
        ("A red square, and nothing beside it.",), ("red",), "en",
    ),
    CaptionedImage(None, "images/red.png", "square", ("ein rotes Quadrat",), (), (), "de"),
    CaptionedImage(None, "images/blue.png", "images/blue.png", ("a blue square",), (), (), "en"),
]  # fmt: skip
COLORS = {"images/red.png": (250, 5, 40), "images/blue.png": (0, 30, 200)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in every file that imports it, so that no test reads the `datasets` cache of another."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def errors_of(source: Path | str, **options: Any) -> DataValidationError:
    with pytest.raises(DataValidationError) as caught:
        load_records(source, **options)
    return caught.value


def make_image(name: str) -> Image.Image:
    """Make an image whose rows all differ, so a wrong byte shows."""
    pixels = np.zeros((6, 9, 3), dtype=np.uint8) + np.array(COLORS[name], dtype=np.uint8)
    pixels[:, :, 1] = np.arange(6)[:, None] * 20
    return Image.fromarray(pixels)


def encode(name: str) -> bytes:
    stream = io.BytesIO()
    make_image(name).save(stream, "PNG")
    return stream.getvalue()


def write_images(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    for name in COLORS:
        (folder / name).write_bytes(encode(name))


def write_lines(folder: Path, lines: list[Any], name: str = "captions.jsonl") -> Path:
    """Write each line as JSON, or unchanged if it is text or bytes."""
    folder.mkdir(exist_ok=True)
    raw = [line if isinstance(line, str | bytes) else json.dumps(line) for line in lines]
    (folder / name).write_bytes(
        b"\n".join(line if isinstance(line, bytes) else line.encode() for line in raw)
    )
    return folder


def write_folder(folder: Path) -> Path:
    write_images(folder)
    return write_lines(folder, LINES)


def write_image_folder(folder: Path) -> Path:
    write_images(folder)
    return write_lines(folder, LINES, "metadata.jsonl")


def write_parquet(folder: Path, *, image: Callable[[str], Any] | None = None) -> Path:
    """Write two files, with images as `datasets` packs them or as `image` returns them."""
    folder.mkdir()
    for number, lines in enumerate((LINES[:2], LINES[2:])):
        columns: dict[str, list[Any]] = {
            name: [line.get(name) for line in lines]
            for name in sorted({field for line in LINES for field in line})
        }
        if image is None:
            columns["image"] = [
                {"bytes": encode(line["file_name"]), "path": "any.png"} for line in lines
            ]
        else:
            columns["image"] = [image(line["file_name"]) for line in lines]
        table = datasets.Dataset.from_dict(columns)
        if image is None:
            table = table.cast_column("image", datasets.Image(decode=False))
        table.to_parquet(str(folder / f"part-{number}.parquet"))
    return folder


def write_parquet_of_paths(folder: Path) -> Path:
    write_images(folder)
    for file in write_parquet(folder.parent / "paths", image=str).iterdir():
        file.rename(folder / file.name)
    return folder


def write_parquet_of_bytes(folder: Path) -> Path:
    return write_parquet(folder, image=encode)


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_shard(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            add_member(archive, name, content)
    return file


def write_shards(folder: Path) -> Path:
    for number, lines in enumerate((LINES[:2], LINES[2:])):
        members = {}
        for row, line in enumerate(lines):
            members[f"{row:04d}.png"] = encode(line["file_name"])
            members[f"{row:04d}.json"] = json.dumps(line).encode()
        write_shard(folder / f"{number:05d}.tar", members)
    return folder


def write_coco(file: Path, *, images: list[Any], annotations: list[Any]) -> Path:
    content = {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": annotations}
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def coco_image(number: int) -> dict[str, Any]:
    """Make an image entry as COCO publishes it, including unused fields."""
    return {"license": 4, "file_name": f"{number:012d}.jpg", "coco_url": "x", "height": 6,
            "width": 9, "date_captured": "2013-11-14 17:02:52", "flickr_url": "x",
            "id": number}  # fmt: skip


def coco_caption(image: int, number: int, caption: Any) -> dict[str, Any]:
    return {"image_id": image, "id": number, "caption": caption}
