"""Rows of data: records, captions of others, labels, pairs, images, datasets of benchmarks."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import captioned_files
import published_datasets as published
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from tiny import draw_noise

from faults.damage import Target, anything
from modeling_llm2clip.data.captions.text_pairs import read_text_pairs
from modeling_llm2clip.data.images.image_sources import open_image
from modeling_llm2clip.data.labels import read_labels
from modeling_llm2clip.data.record_fields import Modality
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.remote.remote_access import RetryPolicy
from modeling_llm2clip.data.streams.record_streams import stream_records
from modeling_llm2clip.embedding.score_file import read_pairs
from modeling_llm2clip.evaluation.datasets.dataset_registry import load_dataset
from modeling_llm2clip.image_loading_llm2clip import load_images

_Fields = dict[str, Any]
_Parse = Callable[[Path], Iterator[tuple[_Fields, bytes | None]]]
_FORMATS: dict[str, _Fields] = {
    "png": {}, "jpeg": {}, "webp": {"lossless": True}, "gif": {}, "bmp": {}, "tiff": {},
}  # fmt: skip
_PLAIN_MODES = ("RGB", "L", "P", "1")  # whose conversion to RGB is Pillow's own


def hash_pixels(image: Any) -> tuple[Any, ...]:
    (loaded,) = load_images([image])
    return loaded.size, hashlib.sha256(loaded.tobytes()).hexdigest()


def describe_record(r: Any) -> tuple[Any, ...]:
    pixels = r.image and hash_pixels(open_image(r.image))
    return r.captions, r.long_captions, r.keywords, r.lang, r.url, pixels


# Records: each source is read by the parser of its format, written anew as lines of JSON, and read.


def read_records(path: Path, *, modality: Modality | None = None) -> object:
    return [*map(describe_record, load_records(path, cache=False, modality=modality))]


def read_stream(path: Path) -> object:
    once = RetryPolicy(attempts=1)  # no waits
    stream = stream_records(path, buffer_size=1, max_lost_share=0.0, retry=once)
    return [*map(describe_record, stream)]


def expect_records(path: Path, parse: _Parse, *, modality: Modality | None = None) -> object:
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


def iterate_objects(file: Path) -> Iterator[_Fields]:
    for line in file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if line.strip():
            yield json.loads(line.decode())


def parse_lines(path: Path) -> Iterator[tuple[_Fields, bytes | None]]:
    for fields in iterate_objects(path / "captions.jsonl"):
        yield fields, (path / (fields.get("file_name") or fields["image"])).read_bytes()


def parse_shards(path: Path) -> Iterator[tuple[_Fields, bytes | None]]:
    for file in sorted(path.glob("*.tar")):
        with tarfile.open(file) as archive:
            opened = ((member.name, archive.extractfile(member)) for member in archive)
            members = [(name, stream.read()) for name, stream in opened if stream]
        for _, sample in groupby(members, lambda member: member[0].partition(".")[0]):
            of_suffix = {name.partition(".")[2]: content for name, content in sample}
            yield json.loads(of_suffix["json"]), of_suffix["png"]


def parse_parquet(path: Path) -> Iterator[tuple[_Fields, bytes | None]]:
    for file in sorted(path.glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            yield row, row["image"] if isinstance(row["image"], bytes) else row["image"]["bytes"]


def iterate_csv(file: Path, *, fill: bool = False) -> Iterator[_Fields]:
    csv.field_size_limit(1 << 26)
    text = io.StringIO(file.read_bytes().decode("utf-8-sig"), newline="")
    yield from name_cells([row for row in csv.reader(text, strict=True) if row], fill=fill)


def name_cells(rows: list[list[str]], *, fill: bool = False) -> Iterator[_Fields]:
    for row in rows[1:]:
        cells = [*row, *[""] * (len(rows[0]) - len(row) if fill else 0)]
        yield dict(zip(rows[0], cells, strict=True))


def parse_csv(path: Path) -> Iterator[tuple[_Fields, bytes | None]]:
    for fields in iterate_csv(path):
        yield {name: cell for name, cell in fields.items() if cell}, None


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
    owners = (7, 3, 7, 3, 3)
    return captioned_files.write_coco(
        folder / "captions_val.json",
        images=[captioned_files.coco_image(number) for number in (7, 3)],
        annotations=[
            captioned_files.coco_caption(image, number, f"caption {number}")
            for number, image in enumerate(owners)
        ],
    )


def below(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """Write into a new folder, as some helpers expect it."""
    return lambda folder: write(folder / "data")


# Labels and pairs.


def write_text(folder: Path, *, name: str, text: str) -> Path:
    draw_noise().save(folder / "a.png")
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def expect_labels(path: Path) -> object:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".txt":
        pairs = [(line.strip(), []) for line in text.split("\n") if line.strip()]
    elif path.suffix == ".csv":
        rows = [*iterate_csv(path, fill=True)]
        names = dict.fromkeys(row["label"].strip() for row in rows)
        pairs = [(n, [r["prompt"].strip() for r in rows
                      if r["label"].strip() == n and r.get("prompt", "").strip()])
                 for n in names]  # fmt: skip
    else:
        content = json.loads(text)
        items = content.items() if isinstance(content, dict) else ((n, []) for n in content)
        pairs = [(n.strip(), [p] if isinstance(p, str) else p) for n, p in items]
    return [(name, tuple(text.strip() for text in prompts) or (name,)) for name, prompts in pairs]


def list_labels(path: Path) -> object:
    return [(label.name, label.prompts) for label in read_labels(path)]


# Images: Pillow alone says which pixels they have.


def write_image(folder: Path, *, suffix: str, **settings: Any) -> Path:
    draw_noise().save(folder / f"image.{suffix}", **settings)
    return folder / f"image.{suffix}"


def expect_image(path: Path) -> object:
    with Image.open(path) as image:
        image.load()
        if image.mode not in _PLAIN_MODES or "transparency" in image.info:
            return anything
        return hash_pixels(ImageOps.exif_transpose(image).convert("RGB"))


# Datasets of benchmarks: their counts are stated, and what a caption says is theirs.


def read_dataset(
    path: Path, *, name: str, image_dir: str | None = None, lang: str | None = None, **counts: int
) -> object:
    folder = None if image_dir is None else path / image_dir
    dataset = load_dataset(published.tiny_spec(name, **counts), path, image_dir=folder, lang=lang)
    return len(dataset.list_content())


_DATASETS: tuple[tuple[Callable[[Path], Path], dict[str, Any]], ...] = (
    (published.write_coco_test, {"name": "coco", "images": 3, "captions": 15}),
    (published.write_multi30k, {"name": "multi30k", "image_dir": "flickr30k-images",
                                "lang": "en", "images": 2, "captions": 2}),
    (published.write_coco_cn, {"name": "coco-cn", "images": 2, "captions": 3}),
    (published.write_iiw, {"name": "iiw", "images": 6, "captions": 8}),
    (published.write_sugarcrepe, {"name": "sugarcrepe-text", "items": 7}),
    (published.write_winoground, {"name": "winoground", "items": 2}),
    (published.write_imagenet, {"name": "imagenet", "images": 6, "classes": 3}),
)  # fmt: skip
_PAIR = '{"image": "a.png", "text": "a dog"}\n{"image": "a.png", "text": "two cats"}\n'
_TEXTS = '{"query": "a dog", "positive": "one dog", "negatives": ["a cat"]}\n'
_LABELS = {
    "labels.txt": "dog\ncat\nred apple\n",
    "labels.csv": 'label,prompt\ndog,a dog\ndog,"a big, old dog"\ncat,\n',
    "labels.json": '{"dog": ["a dog", "one dog"], "cat": "a cat"}',
}

TARGETS = (
    Target("lines", below(captioned_files.write_folder), read_records,
           partial(expect_records, parse=parse_lines)),
    Target("tar", below(captioned_files.write_shards), read_records,
           partial(expect_records, parse=parse_shards)),
    Target("parquet", below(captioned_files.write_parquet), read_records,
           partial(expect_records, parse=parse_parquet)),
    Target("streamed tar", below(captioned_files.write_shards), read_stream,
           partial(expect_records, parse=parse_shards)),
    Target("streamed parquet", below(captioned_files.write_parquet), read_stream,
           partial(expect_records, parse=parse_parquet)),
    Target("coco", write_coco, partial(read_records, modality="text"),
           partial(expect_records, parse=parse_coco, modality="text")),
    Target("csv", write_csv, partial(read_records, modality="text"),
           partial(expect_records, parse=parse_csv, modality="text")),
    *(Target(name, partial(write_text, name=name, text=text), list_labels, expect_labels)
      for name, text in _LABELS.items()),
    Target("pairs", partial(write_text, name="pairs.jsonl", text=_PAIR),
           lambda path: [tuple(pair) for pair in read_pairs(path)],
           lambda path: [(row["image"], row["text"]) for row in iterate_objects(path)]),
    Target("text pairs", partial(write_text, name="pairs.jsonl", text=_TEXTS),
           lambda path: [*read_text_pairs(path)], anything),
    *(Target(suffix, partial(write_image, suffix=suffix, **settings), hash_pixels, expect_image)
      for suffix, settings in _FORMATS.items()),
    *(Target(f"dataset {options['name']}", below(write), partial(read_dataset, **options), anything)
      for write, options in _DATASETS),
)  # fmt: skip
