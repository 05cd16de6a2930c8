"""Retrieval in other languages: Flickr30k-CN, COCO-CN, Crossmodal-3600, Multi30k.

The Chinese datasets have lines `image#number caption`, with or without a type in between:
`1007129816#zhm#0 一个男人` is the first caption of `1007129816.jpg`, and
`COCO_val2014_000000000042#0 一只狗` of `COCO_val2014_000000000042.jpg`. Any whitespace ends the
first part. If only some captions of an image are used, the numbers say which, not the order of the
lines.

There are two packages of Flickr30k-CN: in that of `cross-lingual-cap` the captions are split into
words with their parts of speech (`一个:m 男人:n`), for another task; Flickr30k-CNA has them whole.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ....data.sources.json_files import read_json_lines
from ..dataset_spec import CLEANED_TEXTS, DatasetSpec, ReadRequest
from ..retrieval_dataset import PublishedRecord, build_retrieval_dataset, read_parquet_or
from ..validation import DatasetValidator, read_lines
from .long_captions import are_texts, find_in_subfolder

_MULTI30K_ADVICE = "Give the folder `data/task1` of github.com/multi30k/dataset."
_MULTI30K_CITATION = "Elliott et al., Multi30K, VL 2016; French and Czech: WMT 2017 and 2018"
_MULTI30K_LICENSE = "Flickr terms of use; images for research only"
# Every word has its part of speech: not a caption that people read.
_SPLIT_INTO_WORDS = re.compile(r"\S+:[a-z]+\d*(\s+\S+:[a-z]+\d*)*\s*")
# Captions of each language, of 261,375 in all (Thapliyal et al., EMNLP 2022).
_XM3600_CAPTIONS = {
    "ar": 7367, "bn": 3600, "cs": 7207, "da": 7264, "de": 8643, "el": 7204, "en": 7200, "es": 8614,
    "fa": 7245, "fi": 7127, "fil": 7109, "fr": 8562, "he": 7200, "hi": 8503, "hr": 7280, "hu": 7216,
    "id": 7126, "it": 8471, "ja": 7185, "ko": 7650, "mi": 4732, "nl": 8059, "no": 7213, "pl": 7141,
    "pt": 7243, "quz": 7200, "ro": 7123, "ru": 7200, "sv": 7273, "sw": 7046, "te": 7200, "th": 7200,
    "tr": 7233, "uk": 7215, "vi": 7350, "zh": 7174,
}  # fmt: skip
_XM3600_COLUMNS = {"image": "image", "file_name": "image_id", "captions": "captions"}


def read_xm3600(request: ReadRequest, validator: DatasetValidator) -> Iterator[PublishedRecord]:
    """Yield every image of `captions.jsonl` with its captions in the requested language.

    Args:
        request: How the dataset is to be read.
        validator: Collects the errors.
    """
    file = validator.find_file(
        request.data_folder,
        "captions.jsonl",
        advice="Unpack captions.zip and images.tgz from google.github.io/crossmodal-3600.",
    )
    for raw in read_json_lines(file, validator.errors):
        stem, texts = raw.fields.get("image/key"), raw.fields.get(request.lang)
        captions = texts.get("caption") if isinstance(texts, Mapping) else None
        if isinstance(stem, str) and captions is not None and are_texts(captions):
            name = f"{stem}.jpg"
            image = find_in_subfolder(request, "images", name)
            yield PublishedRecord(raw.place, name, tuple(captions), image)
        else:
            validator.errors.add(f"no 'image/key', or no captions in {request.lang!r}", raw.place)


def read_multi30k(
    request: ReadRequest, validator: DatasetValidator, *, split: str
) -> Iterator[PublishedRecord]:
    """Yield a record per image of a split: line n of a language's file describes image n.

    Args:
        request: How the dataset is to be read.
        validator: Collects the errors.
        split: Name of the files.

    Raises:
        ValueError: The files have different numbers of lines.
    """
    texts = validator.find_file(
        request.data_folder,
        *(
            f"{root}raw/{split}.{request.lang}{suffix}"
            for root in ("", "data/task1/")
            for suffix in (".gz", "")
        ),
        advice=_MULTI30K_ADVICE,
    )
    names = validator.find_file(
        request.data_folder,
        f"image_splits/{split}.txt",
        f"data/task1/image_splits/{split}.txt",
        advice=_MULTI30K_ADVICE,
    )
    captions, images = read_lines(texts), read_lines(names)
    if len(captions) != len(images):
        # Nobody knows which caption is missing, so no line can be trusted.
        raise ValueError(
            f"{texts} has {len(captions)} lines, {names} has {len(images)}; line n of one must "
            "describe line n of the other. Download both again from github.com/multi30k/dataset."
        )
    for number, (name, caption) in enumerate(zip(images, captions, strict=True), start=1):
        # The COCO split has the number of the caption after the image.
        place = f"{texts.name} line {number}"
        yield PublishedRecord(place, name.strip().partition("#")[0], (caption,))


@dataclass(frozen=True)
class _Line:
    """A caption as the file has it, with its number as it is written."""

    place: str
    number: str
    text: str


def read_flickr30k_cn(
    request: ReadRequest, validator: DatasetValidator
) -> Iterator[PublishedRecord]:
    """Yield the images of the test file, in the order of their first lines.

    Args:
        request: How the dataset is to be read.
        validator: Collects the errors.
    """
    file = validator.find_file(
        request.data_folder,
        "flickr30k_cn_test.txt",
        "test/flickr30k_cn_test.txt",
        advice="Get it from the folder `test` of Flickr30k-CNA, zero.so.com/download.html.",
    )
    for stem, lines in _group_lines(file, validator).items():
        num_errors = _check_numbers(lines, validator) + _check_whole(lines, validator)
        validator.num_errors_of_yielded += num_errors
        ordered = lines if num_errors else sorted(lines, key=lambda line: int(line.number))
        captions = tuple(line.text for line in ordered)
        yield PublishedRecord(lines[0].place, f"{stem}.jpg", captions, is_valid=not num_errors)


def read_coco_cn(request: ReadRequest, validator: DatasetValidator) -> Iterator[PublishedRecord]:
    """Yield the images of the test split with the captions that people wrote for them.

    Args:
        request: How the dataset is to be read.
        validator: Collects the errors.
    """
    roots = ("", "coco-cn-version1805v1.1/")
    advice = "Unpack coco-cn-version1805v1.1.tar.gz of huggingface.co/datasets/AIMClab/COCO-CN."
    split, file = (
        validator.find_file(
            request.data_folder, *(f"{root}{name}" for root in roots), advice=advice
        )
        for name in ("coco-cn_test.txt", "imageid.human-written-caption.txt")
    )
    wanted = [line.strip() for line in read_lines(split) if line.strip()]
    grouped = _group_lines(file, validator, wanted=frozenset(wanted))
    for number, stem in enumerate(wanted, start=1):
        part = "train2014" if "train2014" in stem else "val2014"
        captions = tuple(line.text for line in grouped.get(stem, ()))
        yield PublishedRecord(f"{split.name} line {number}", f"{part}/{stem}.jpg", captions)


def _group_lines(
    file: Path, validator: DatasetValidator, *, wanted: Collection[str] | None = None
) -> dict[str, list[_Line]]:
    """Group the lines by image, or only those of the wanted images; unreadable ones are errors."""
    lines: dict[str, list[_Line]] = {}
    for row, line in enumerate(read_lines(file), start=1):
        place = f"{file.name} line {row}"
        label, *text = line.split(maxsplit=1)
        stem, mark, rest = label.partition("#")
        if not mark or not stem:
            validator.errors.add("no 'image#number' at the start of the line", place)
            continue
        stem = stem.removesuffix(".jpg")
        if wanted is None or stem in wanted:
            number = rest.rpartition("#")[2]
            lines.setdefault(stem, []).append(_Line(place, number, text[0] if text else ""))
    return lines


def _check_whole(lines: Sequence[_Line], validator: DatasetValidator) -> int:
    """Report captions that are split into words; return how many."""
    split = [line for line in lines if _SPLIT_INTO_WORDS.fullmatch(line.text)]
    for line in split:
        validator.errors.add("caption split into words with parts of speech", line.place)
    return len(split)


def _check_numbers(lines: Sequence[_Line], validator: DatasetValidator) -> int:
    """Report captions of one image without a number, or with a repeated one; return how many."""
    before = validator.errors.total
    seen: set[int] = set()
    for line in lines:
        if not line.number.isdecimal():
            validator.errors.add("caption without a number", line.place)
        elif int(line.number) in seen:
            validator.errors.add("number of a caption repeated", line.place)
        else:
            seen.add(int(line.number))
    return validator.errors.total - before


def _make_multi30k(split: str, year: int, languages: tuple[str, ...]) -> DatasetSpec:
    return DatasetSpec(
        name="multi30k" if year == 2016 else f"multi30k-{year}",
        title=f"Multi30k, task 1, test of {year} (Flickr)",
        dataset_type="retrieval",
        languages=languages,
        counts={"images": 1000, "captions": 1000},
        license=_MULTI30K_LICENSE,
        citation=_MULTI30K_CITATION,
        source="github.com/multi30k/dataset, folder data/task1; images as its README says",
        files=f"raw/{split}.<lang>.gz and image_splits/{split}.txt; name the folder of images",
        protocol={"split": split, **CLEANED_TEXTS},
        build=partial(build_retrieval_dataset, read=partial(read_multi30k, split=split)),
    )


DATASETS = (
    DatasetSpec(
        name="flickr30k-cn",
        title="Flickr30k-CN, test split, translated by people",
        dataset_type="retrieval",
        languages=("zh",),
        counts={"images": 1000, "captions": 5000},
        license="captions MIT (repository of Flickr30k-CN), research only (Flickr30k-CNA); "
        "images: Flickr terms of use, research only",
        citation="Lan, Li, Dong, Fluency-Guided Cross-Lingual Image Captioning, ACM MM 2017",
        source="Flickr30k-CNA of zero.so.com/download.html, folder test (the captions of "
        "github.com/li-xirong/cross-lingual-cap, not split into words); images: as flickr30k",
        files="flickr30k_cn_test.txt; name flickr30k-images as the folder of images",
        # 29,783 images to train on, where Karpathy's split has 29,000.
        protocol={"split": "test (its own, not Karpathy's)", **CLEANED_TEXTS},
        captions_per_image=5,
        build=partial(build_retrieval_dataset, read=read_flickr30k_cn),
    ),
    DatasetSpec(
        name="coco-cn",
        title="COCO-CN, test split, captions written by people",
        dataset_type="retrieval",
        languages=("zh",),
        counts={"images": 1000, "captions": 1053},
        license="captions MIT; images: Flickr terms of use",
        citation="Li et al., COCO-CN, IEEE T-MM 2019, arXiv:1805.08661",
        source="huggingface.co/datasets/AIMClab/COCO-CN; images: COCO 2014",
        files="coco-cn_test.txt and imageid.human-written-caption.txt, train2014/*.jpg and "
        "val2014/*.jpg",
        protocol={"split": "test", "fields": "human-written-caption", **CLEANED_TEXTS},
        build=partial(build_retrieval_dataset, read=read_coco_cn),
    ),
    DatasetSpec(
        name="xm3600",
        title="Crossmodal-3600, all captions of a language",
        dataset_type="retrieval",
        languages=tuple(_XM3600_CAPTIONS),
        counts={"images": 3600},
        counts_of_language={
            lang: {"captions": captions} for lang, captions in _XM3600_CAPTIONS.items()
        },
        license="captions CC BY 4.0; images CC BY 2.0, as their attribution file says",
        citation="Thapliyal et al., Crossmodal-3600, EMNLP 2022, arXiv:2205.12522",
        source="google.github.io/crossmodal-3600; "
        "hub:mteb/xm3600@536cd45bbfe53de9b08c0483bb4a76a4bd3673fa",
        files="captions.jsonl and images/*.jpg, or Parquet files <lang>-*.parquet",
        protocol={"split": "all", **CLEANED_TEXTS},
        build=partial(
            build_retrieval_dataset,
            read=partial(
                read_parquet_or,
                columns=_XM3600_COLUMNS,
                files="**/{lang}-*.parquet",
                otherwise=read_xm3600,
            ),
        ),
        # The files of each language contain the images once more.
        hub_files="*/{lang}-*.parquet",
    ),
    _make_multi30k("test_2016_flickr", 2016, ("en", "de", "fr", "cs")),
    _make_multi30k("test_2017_flickr", 2017, ("en", "de", "fr")),
)
