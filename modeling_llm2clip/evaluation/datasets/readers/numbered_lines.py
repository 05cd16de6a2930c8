"""Reads lines `image#number caption`, with or without a kind: Flickr30k-CN and COCO-CN.

`1007129816#zhm#0 一个男人` is the first caption of `1007129816.jpg`, and
`COCO_val2014_000000000042#0 一只狗` of `COCO_val2014_000000000042.jpg`. Any white space ends the
first part. Where only some captions of an image count, the numbers say which, not the order of
the lines.

Of Flickr30k-CN two packages go round: that of `cross-lingual-cap` has the captions cut into words
with their parts of speech (`一个:m 男人:n`), for another task; Flickr30k-CNA has them whole.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..dataset_spec import ReadRequest
from ..retrieval_dataset import RawRecord
from ..validation import DatasetValidator
from .text_files import read_lines

# Every word has its part of speech: no caption that people read.
_CUT_INTO_WORDS = re.compile(r"\S+:[a-z]+\d*(\s+\S+:[a-z]+\d*)*\s*")


@dataclass(frozen=True)
class _Line:
    """A caption as it stands in the file, with its number as it is written."""

    place: str
    number: str
    text: str


def read_flickr30k_cn(request: ReadRequest, intake: DatasetValidator) -> Iterator[RawRecord]:
    """Yield the images of the test file, in the order in which they first come."""
    file = intake.find_file(
        request.folder,
        "flickr30k_cn_test.txt",
        "test/flickr30k_cn_test.txt",
        advice="Get it from the folder `test` of Flickr30k-CNA, zero.so.com/download.html.",
    )
    for stem, lines in _group_lines(file, intake).items():
        errors = _check_numbers(lines, intake) + _check_whole(lines, intake)
        intake.errors_of_samples += errors
        ordered = lines if errors else sorted(lines, key=lambda line: int(line.number))
        captions = tuple(line.text for line in ordered)
        yield RawRecord(lines[0].place, f"{stem}.jpg", captions, is_sound=not errors)


def read_coco_cn(request: ReadRequest, intake: DatasetValidator) -> Iterator[RawRecord]:
    """Yield the images of the test split with the captions that people wrote for them."""
    roots = ("", "coco-cn-version1805v1.1/")
    advice = "Unpack coco-cn-version1805v1.1.tar.gz of huggingface.co/datasets/AIMClab/COCO-CN."
    split = intake.find_file(
        request.folder, *(f"{root}coco-cn_test.txt" for root in roots), advice=advice
    )
    file = intake.find_file(
        request.folder,
        *(f"{root}imageid.human-written-caption.txt" for root in roots),
        advice=advice,
    )
    wanted = [line.strip() for line in read_lines(split) if line.strip()]
    grouped = _group_lines(file, intake, wanted=frozenset(wanted))
    for number, stem in enumerate(wanted, start=1):
        part = "train2014" if "train2014" in stem else "val2014"
        captions = tuple(line.text for line in grouped.get(stem, ()))
        yield RawRecord(f"{split.name} line {number}", f"{part}/{stem}.jpg", captions)


def _group_lines(
    file: Path, intake: DatasetValidator, *, wanted: Collection[str] | None = None
) -> dict[str, list[_Line]]:
    """The lines of each image; of the wanted ones alone where they are given.

    A line that cannot be read is an error.
    """
    lines: dict[str, list[_Line]] = {}
    for row, line in enumerate(read_lines(file), start=1):
        place = f"{file.name} line {row}"
        label, *text = line.split(maxsplit=1)
        stem, mark, rest = label.partition("#")
        if not mark or not stem:
            intake.errors.add("no 'image#number' at the start of the line", place)
            continue
        stem = stem.removesuffix(".jpg")
        if wanted is None or stem in wanted:
            number = rest.rpartition("#")[2]
            lines.setdefault(stem, []).append(_Line(place, number, text[0] if text else ""))
    return lines


def _check_whole(lines: Sequence[_Line], intake: DatasetValidator) -> int:
    """Tell captions that are cut into words; returns how many."""
    cut = [line for line in lines if _CUT_INTO_WORDS.fullmatch(line.text)]
    for line in cut:
        intake.errors.add("caption cut into words with parts of speech", line.place)
    return len(cut)


def _check_numbers(lines: Sequence[_Line], intake: DatasetValidator) -> int:
    """Tell numbers of one image that are none, or that stand there twice; returns how many."""
    before = intake.errors.total
    seen: set[int] = set()
    for line in lines:
        if not line.number.isdecimal():
            intake.errors.add("no number of the caption", line.place)
        elif int(line.number) in seen:
            intake.errors.add("number of a caption repeated", line.place)
        else:
            seen.add(int(line.number))
    return intake.errors.total - before
