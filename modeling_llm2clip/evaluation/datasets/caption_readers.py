"""Read published captions: JSON, Parquet, and the text formats of three publishers.

`JsonCaptions` and `ParquetCaptions` are configured by their fields, so a new dataset in either
format needs no code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from ..._suggestions import counted
from ...data.records.record_loading import find_example_data, load_records
from ...data.records.splits import choose_test_rows, split_records
from ...data.sources.coco import read_coco
from ...data.sources.json_files import iterate_json_list, read_json, read_json_lines
from ...data.sources.parquet import read_parquet
from .dataset_spec import DatasetReading, is_image, read_lines
from .retrieval_dataset import PublishedRecord, RecordReader

COCO_FILES = ("captions_val2017.json", "annotations/captions_val2017.json")
COCO_ADVICE = (
    "Pass the folder that contains annotations/captions_val2017.json. It is in "
    "annotations_trainval2017.zip from cocodataset.org."
)
# Same split as `llm2clip demo` with its default seed.
EMOJI_SEED = 0
NUM_TEST_GROUPS = 300
# Matches a caption whose words are tagged with their parts of speech.
_SPLIT_INTO_WORDS = re.compile(r"\S+:[a-z]+\d*(\s+\S+:[a-z]+\d*)*\s*")


@dataclass(frozen=True, kw_only=True)
class JsonCaptions:
    """Reads captions from JSON or JSON Lines files.

    A path is a series of field names joined by dots. A number selects one element of a list, `*`
    selects all elements, and `{lang}` is replaced by the language.

    Attributes:
        files: Possible names of each file.
        advice: Where to get the files.
        image: Fields that may hold the image's name; the first non-empty one is used.
        captions: Paths of the captions; every path that exists is used.
        items: Field that holds the list of records, unless the file itself is a list.
        parent: Field that holds the image's folder.
        name: Template for the image's name; `{folder}` is the folder of the caption file.
        subfolder: Default folder of the images, if it exists.
        other_splits: Values of `split` other than `test`; empty if there are no splits. A file that
            is a list contains only the test split.
        first: Number of records to read from a list that is too large for memory.
        min_captions: Minimum number of captions; images with fewer are left out of the dataset.
        lacking: Error to report if a record has no name or no captions.
    """

    files: tuple[tuple[str, ...], ...]
    advice: str
    image: tuple[str, ...]
    captions: tuple[str, ...]
    items: str = ""
    parent: str = ""
    name: str = "{name}"
    subfolder: str = ""
    other_splits: tuple[str, ...] = ()
    first: int | None = None
    min_captions: int = 0
    lacking: str = "no image name, or captions that are not strings"

    def __call__(self, reading: DatasetReading) -> Iterator[PublishedRecord]:
        """Yield a record per image, in the order of the files."""
        paths = [path.format(lang=reading.lang).split(".") for path in self.captions]
        if reading.image_dir is None and (reading.data_folder / self.subfolder).is_dir():
            reading.image_dir = reading.data_folder / self.subfolder
        for names in self.files:
            file = reading.find_file(*names, advice=self.advice)
            folder = "".join(names[0].rpartition("/")[:2])
            for place, fields in self._iterate(file, reading):
                name = next((fields[field] for field in self.image if fields.get(field)), None)
                values_of_paths = [_find_values(fields, path) for path in paths]
                present = [values for values in values_of_paths if values != [None]]
                captions: list[Any] = list(chain(*present)) if present else [None]
                if not isinstance(name, str) or not all(isinstance(c, str) for c in captions):
                    reading.errors.add(self.lacking.format(lang=reading.lang), f"{folder}{place}")
                elif len(captions) >= self.min_captions:
                    if parent := fields.get(self.parent):
                        name = f"{parent}/{name}"
                    name = self.name.format(name=name, folder=folder)
                    yield PublishedRecord(f"{folder}{place}", name, tuple(captions))

    def _iterate(
        self, file: Path, reading: DatasetReading
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        records: Iterator[tuple[str, Mapping[str, Any]]]
        if file.suffix == ".json":
            content = read_json(file) if self.first is None else iterate_json_list(file)
            has_splits = bool(self.other_splits) and isinstance(content, dict)
            items = content.get(self.items) if isinstance(content, dict) else content
            if not isinstance(items, list | Iterator):
                raise ValueError(
                    f"{file} must contain a list or an object with {self.items!r}. {self.advice}"
                )
            records = (
                (f"{file.name} [{index}]", item if isinstance(item, dict) else {})
                for index, item in enumerate(islice(items, self.first))
            )
        else:
            has_splits = bool(self.other_splits)
            records = ((raw.place, raw.fields) for raw in read_json_lines(file, reading.errors))
        for place, fields in records:
            if not has_splits or fields.get("split") == "test":
                yield place, fields
            elif fields.get("split") not in self.other_splits:
                reading.errors.add("no split, or an unknown one", place)


def _find_values(fields: Mapping[str, Any], path: list[str]) -> list[Any]:
    """List the values at a path; a missing value, or one that should be a list, becomes None."""
    values: list[Any] = [fields]
    for step in path:
        if step == "*":
            lists = (value if isinstance(value, list) else [None] for value in values)
            values = list(chain(*lists))
        elif step.isdigit():
            index = int(step)
            values = [v[index] if isinstance(v, list) and index < len(v) else None for v in values]
        else:
            values = [value.get(step) if isinstance(value, dict) else None for value in values]
    return values


@dataclass(frozen=True, kw_only=True)
class ParquetCaptions:
    """Reads the Parquet files of a folder; if there are none, calls the `otherwise` reader.

    `columns` names the columns for `image`, `file_name` and `captions`. `only` holds the values a
    row must have; see `read_parquet`. In the pattern `files`, `{lang}` is the language.
    """

    columns: Mapping[str, str]
    otherwise: RecordReader
    only: Mapping[str, str] | None = None
    files: str = "**/*.parquet"

    def __call__(self, reading: DatasetReading) -> Iterator[PublishedRecord]:
        """Yield a record per row; raise ValueError if only other languages have files."""
        if not reading.list_parquet_files():
            yield from self.otherwise(reading)
            return
        files = reading.list_parquet_files(self.files)
        if not files:
            raise ValueError(
                f"{reading.source}: no {self.files.format(lang=reading.lang)} in "
                f"{reading.folder}. Download the files for this language."
            )
        errors = reading.errors
        columns, only = self.columns, self.only
        for raw in read_parquet(files, reading.data_folder, errors, columns=columns, only=only):
            name, captions = raw.fields.get("file_name"), raw.fields.get("captions")
            texts: list[Any] = captions if isinstance(captions, list) else [captions]
            if name is None or not all(isinstance(text, str) for text in texts):
                errors.add("no image name, or captions that are not strings", raw.place)
            else:
                yield PublishedRecord(raw.place, str(name), tuple(texts), raw.packed)


def read_coco_captions(reading: DatasetReading) -> Iterator[PublishedRecord]:
    """Yield a record per image in COCO's own caption file, in the order of its `images`."""
    file = reading.find_file(*COCO_FILES, advice=COCO_ADVICE)
    for raw in read_coco(file, reading.errors):
        name = raw.fields.get("file_name", raw.default_name)
        yield PublishedRecord(raw.place, str(name), tuple(raw.fields["captions"]))


def read_urban1k(reading: DatasetReading) -> Iterator[PublishedRecord]:
    """Yield a record per name that has a caption or an image, in numeric order.

    `caption/17.txt` describes `image/17.jpg`; its first line is the caption.
    """
    folder = reading.data_folder
    root = next((r for r in (folder, folder / "Urban1k") if (r / "caption").is_dir()), None)
    if root is None:
        raise ValueError(
            f"{reading.source}: {folder} has no folder 'caption'. Unpack Urban1k.zip from "
            "huggingface.co/datasets/BeichenZhang/Urban1k and pass the folder that contains "
            "'caption' and 'image'."
        )
    captions = {file.stem: file for file in (root / "caption").glob("*.txt")}
    images: dict[str, list[Path | None]] = {}
    for file in sorted((reading.image_dir or root / "image").glob("*")):
        if is_image(file):
            images.setdefault(file.stem, []).append(file)
    num_longer = 0
    for name in sorted(captions.keys() | images.keys(), key=lambda name: name.zfill(9)):
        lines = read_lines(captions[name]) if name in captions else []
        num_longer += any(line.strip() for line in lines[1:])
        for image in images.get(name, [None]):
            yield PublishedRecord(
                f"caption/{name}.txt", f"{name}.jpg", tuple(lines[:1]), image=image
            )
    reading.notes["captions_truncated_to_first_line"] = num_longer


def read_multi30k(reading: DatasetReading, *, split: str) -> Iterator[PublishedRecord]:
    """Yield a record per image of a split; line n of a language's file describes image n."""
    caption_files = [f"raw/{split}.{reading.lang}.gz", f"raw/{split}.{reading.lang}"]
    texts, names = (
        reading.find_file(
            *(f"{root}{file}" for root in ("", "data/task1/") for file in files),
            advice="Pass the folder `data/task1` of github.com/multi30k/dataset.",
        )
        for files in (caption_files, [f"image_splits/{split}.txt"])
    )
    captions, images = read_lines(texts), read_lines(names)
    if len(captions) != len(images):
        # There is no way to know which caption is missing, so no line can be trusted.
        raise ValueError(
            f"{texts} has {counted(len(captions), 'line')} but {names} has {len(images)}; line n "
            "of one must describe line n of the other. Download both again from "
            "github.com/multi30k/dataset."
        )
    for number, (name, caption) in enumerate(zip(images, captions, strict=True), start=1):
        # In the COCO split, the image's name is followed by the number of the caption.
        place = f"{texts.name} line {number}"
        yield PublishedRecord(place, name.strip().partition("#")[0], (caption,))


class _Line(NamedTuple):
    """A caption and its number within the image, both as written in the file."""

    place: str
    number: str
    text: str


def read_flickr30k_cn(reading: DatasetReading) -> Iterator[PublishedRecord]:
    """Yield the images of the test file in order of first occurrence."""
    file = reading.find_file(
        "flickr30k_cn_test.txt",
        "test/flickr30k_cn_test.txt",
        advice="Get it from the folder `test` of Flickr30k-CNA (zero.so.com/download.html).",
    )
    for stem, lines in _group_lines(file, reading).items():
        place = lines[0].place
        texts = {int(line.number): line.text for line in lines}
        if len(texts) < len(lines):
            reading.errors.add("number of a caption repeated", place)
        elif any(map(_SPLIT_INTO_WORDS.fullmatch, texts.values())):
            reading.errors.add("caption split into words with parts of speech", place)
        else:
            captions = tuple(texts[number] for number in sorted(texts))
            yield PublishedRecord(place, f"{stem}.jpg", captions)


def read_coco_cn(reading: DatasetReading) -> Iterator[PublishedRecord]:
    """Yield the images of the test split with their human-written captions."""
    split, file = (
        reading.find_file(
            name,
            f"coco-cn-version1805v1.1/{name}",
            advice="Unpack coco-cn-version1805v1.1.tar.gz from "
            "huggingface.co/datasets/AIMClab/COCO-CN.",
        )
        for name in ("coco-cn_test.txt", "imageid.human-written-caption.txt")
    )
    test_stems = [line.strip() for line in read_lines(split) if line.strip()]
    grouped = _group_lines(file, reading)
    for number, stem in enumerate(test_stems, start=1):
        part = "train2014" if "train2014" in stem else "val2014"
        captions = tuple(line.text for line in grouped.get(stem, ()))
        yield PublishedRecord(f"{split.name} line {number}", f"{part}/{stem}.jpg", captions)


def _group_lines(file: Path, reading: DatasetReading) -> dict[str, list[_Line]]:
    """Group `image#number caption` lines by image; a type may precede the number.

    `1007129816#zhm#0 一个男人` is the first caption of `1007129816.jpg`, and
    `COCO_val2014_000000000042#0 一只狗` is the first caption of `COCO_val2014_000000000042.jpg`.
    The caption starts after the first whitespace.
    """
    lines: dict[str, list[_Line]] = {}
    for row, line in enumerate(read_lines(file), start=1):
        place = f"{file.name} line {row}"
        label, text = (*line.split(maxsplit=1), "", "")[:2]
        stem, _, rest = label.partition("#")
        number = rest.rpartition("#")[2]
        if not stem or not number.isdecimal():
            reading.errors.add("no 'image#number' at the start of the line", place)
            continue
        caption = _Line(place, number, text)
        lines.setdefault(stem.removesuffix(".jpg"), []).append(caption)
    return lines


def read_emoji(reading: DatasetReading) -> Iterator[PublishedRecord]:
    """Yield one image per emoji in the test split, with its name in one language."""
    if "emoji" not in reading.cache.records:
        records = load_records(find_example_data() / "emoji")
        english = [record for record in records if record.lang == "en"]
        _, held_out = split_records(english, test_size=NUM_TEST_GROUPS, seed=EMOJI_SEED)
        rows = choose_test_rows(english, {record.group_id for record in held_out})
        captions = {(record.name, record.lang): record.captions[:1] for record in records}
        reading.cache.records["emoji"] = [english[row] for row in rows], captions
    tested, captions = reading.cache.records["emoji"]
    reading.notes["seed"] = EMOJI_SEED
    for record in tested:
        yield PublishedRecord(
            place="captions.jsonl",
            name=record.name,
            captions=captions[record.name, reading.lang],
            image=record.image,
            group_id=record.group_id,
        )
