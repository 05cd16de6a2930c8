"""Every input: data of a user, images, configurations of models and towers, options in YAML."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import captioned_files
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from tiny import draw_noise, tiny_model
from tiny_folders import save_tiny_llm, save_tiny_vision

from faults.damage import Target, anything, call, repeat, run_targets
from modeling_llm2clip.data.images.image_sources import open_image
from modeling_llm2clip.data.record_fields import Modality
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.image_loading_llm2clip import load_images
from modeling_llm2clip.model_folders.model_card import CardData, read_card_data
from modeling_llm2clip.model_folders.model_loading import load_model
from modeling_llm2clip.model_folders.model_writing import save_model

_Fields = dict[str, Any]
_FORMATS = {"png": {}, "jpeg": {}, "webp": {"lossless": True}, "gif": {}, "bmp": {}, "tiff": {}}
# Modes whose conversion to RGB is Pillow's own.
_PLAIN_MODES = ("RGB", "L", "P", "1")


def hash_pixels(image: Any) -> tuple[Any, ...]:
    return image.size, hashlib.sha256(image.tobytes()).hexdigest()


# Records: each source is read by the parser of its format, written anew as lines of JSON, and read.


def read_records(path: Path, *, modality: Modality | None = None) -> object:
    records = load_records(path, cache=False, modality=modality)
    return [
        (r.captions, r.long_captions, r.keywords, r.lang, r.url,
         r.image and hash_pixels(load_images([open_image(r.image)])[0]))
        for r in records
    ]  # fmt: skip


def expect_records(
    path: Path,
    parse: Callable[[Path], Iterator[tuple[_Fields, bytes | None]]],
    *,
    modality: Modality | None = None,
) -> object:
    folder = path.parent / "expected"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    lines = []
    for number, (fields, image) in enumerate(parse(path)):
        if image is not None:
            (folder / f"{number}.png").write_bytes(image)
            fields = {n: v for n, v in fields.items() if n not in ("image", "file_name")}
            fields["image"] = f"{number}.png"
        lines.append(json.dumps(fields))
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return read_records(folder, modality=modality)


def parse_lines(path: Path) -> Iterator[tuple[_Fields, bytes | None]]:
    for line in (path / "captions.jsonl").read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if line.strip():
            fields = json.loads(line.decode())
            yield fields, (path / (fields.get("file_name") or fields["image"])).read_bytes()


def parse_shards(path: Path) -> Iterator[tuple[_Fields, bytes | None]]:
    for file in sorted(path.glob("*.tar")):
        with tarfile.open(file) as archive:
            members = [(m.name, archive.extractfile(m).read()) for m in archive if m.isfile()]  # type: ignore[union-attr]
        for _, sample in groupby(members, lambda member: member[0].partition(".")[0]):
            of_suffix = {name.partition(".")[2]: content for name, content in sample}
            yield json.loads(of_suffix["json"]), of_suffix["png"]


def parse_parquet(path: Path) -> Iterator[tuple[_Fields, bytes | None]]:
    for file in sorted(path.glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            yield row, row["image"] if isinstance(row["image"], bytes) else row["image"]["bytes"]


def parse_csv(path: Path) -> Iterator[tuple[_Fields, bytes | None]]:
    with path.open(encoding="utf-8-sig", newline="") as opened:
        header, *rows = [row for row in csv.reader(opened, strict=True) if row]
    for row in rows:
        yield {name: cell for name, cell in zip(header, row, strict=True) if cell}, None


def write_csv(folder: Path) -> Path:
    text = 'id,caption,lang\n1,"a dog, asleep",en\n2,"a ""red"" cat\non a mat",en\n3,ein Haus,de\n'
    (folder / "texts.csv").write_text(text, encoding="utf-8")
    return folder / "texts.csv"


def parse_coco(path: Path) -> Iterator[tuple[_Fields, bytes | None]]:
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    for image in content["images"]:
        captions = [(a["id"], a["caption"]) for a in content["annotations"]
                    if a["image_id"] == image["id"]]  # fmt: skip
        fields = {"captions": [caption for _, caption in sorted(captions)]}
        yield {**fields, "file_name": image.get("file_name") or str(image["id"])}, None


def write_coco(folder: Path) -> Path:
    return captioned_files.write_coco(
        folder / "captions_val.json",
        images=[captioned_files.coco_image(number) for number in (7, 3)],
        annotations=[
            captioned_files.coco_caption(image, number, f"caption {number}")
            for number, image in enumerate((7, 3, 7, 3, 3))
        ],
    )


def below(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """Write into a new folder, as some helpers expect it."""
    return lambda folder: write(folder / "data")


# Images: Pillow alone says which pixels they have.


def write_image(folder: Path, *, suffix: str, **settings: Any) -> Path:
    draw_noise().save(folder / f"image.{suffix}", **settings)
    return folder / f"image.{suffix}"


def read_image(path: Path) -> object:
    return hash_pixels(load_images([path])[0])


def expect_image(path: Path) -> object:
    with Image.open(path) as image:
        image.load()
        if image.mode not in _PLAIN_MODES or "transparency" in image.info:
            return anything
        return hash_pixels(ImageOps.exif_transpose(image).convert("RGB"))


# Models and towers: any number may be another model's, so that only refusals are judged.


def write_model(folder: Path) -> Path:
    card = CardData(license="mit", training_data=("hub:owner/name", "my images"))
    return save_model(*tiny_model(), folder / "model", instructions={"query": "Find: "}, card=card)


def use_model(path: Path) -> object:
    model, processor = load_model(path, device="cpu")
    batch = processor(text=["a dog"], images=[draw_noise()])
    return [tuple(embeds.shape) for embeds in model(**batch)[:2]]


def build_tower_model(path: Path) -> object:
    output = path.parent / "built"
    shutil.rmtree(output, ignore_errors=True)
    return call("build", path / "vision", path / "llm", output, "--prompt", "llama-3",
                "--max-text-length", 32, "--device", "cpu")  # fmt: skip


def write_towers(folder: Path) -> Path:
    (folder / "towers").mkdir()
    save_tiny_vision(folder / "towers" / "vision")
    save_tiny_llm(folder / "towers" / "llm")
    return folder / "towers"


TARGETS = (
    Target("lines", below(captioned_files.write_folder), read_records,
           partial(expect_records, parse=parse_lines)),
    Target("tar", below(captioned_files.write_shards), read_records,
           partial(expect_records, parse=parse_shards)),
    Target("parquet", below(captioned_files.write_parquet), read_records,
           partial(expect_records, parse=parse_parquet)),
    Target("coco", write_coco, partial(read_records, modality="text"),
           partial(expect_records, parse=parse_coco, modality="text")),
    Target("csv", write_csv, partial(read_records, modality="text"),
           partial(expect_records, parse=parse_csv, modality="text")),
    *(
        Target(suffix, partial(write_image, suffix=suffix, **settings), read_image, expect_image)
        for suffix, settings in _FORMATS.items()
    ),
    Target("model", write_model, use_model, anything, files=("*.json",)),
    Target("card", write_model, read_card_data, anything, files=("README.md",)),
    Target("checked model", write_model, partial(call, "doctor", codes=(0, 1)), anything),
    Target("towers", write_towers, build_tower_model, anything, files=("*.json",)),
)  # fmt: skip
run = partial(run_targets, TARGETS)

if __name__ == "__main__":
    repeat(TARGETS)
