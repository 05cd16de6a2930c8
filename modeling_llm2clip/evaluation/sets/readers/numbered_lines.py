"""Reads lines `picture#kind#number caption`: Flickr30k-CN and COCO-CN.

`1007129816#zhm#0 一个男人` is the first caption of `1007129816.jpg`. Any white space ends the
first part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from ..card import ReadRequest
from ..intake import Intake
from ..retrieval import Entry
from .text_files import read_lines


def read_flickr30k_cn(request: ReadRequest, intake: Intake) -> Iterator[Entry]:
    """Yield the pictures of the test file, in the order in which they first come."""
    file = intake.find_file(
        request.folder,
        "flickr30k_cn_test.txt",
        "test/flickr30k_cn_test.txt",
        advice="It is the human-translated test file of Flickr30k-CN, also in Flickr30k-CNA.",
    )
    for place, name, captions in _group_lines(file, intake):
        yield Entry(place, name, captions)


def read_coco_cn(request: ReadRequest, intake: Intake) -> Iterator[Entry]:
    """Yield the pictures of the test split with the captions that people wrote for them."""
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
    grouped = {
        Path(name).stem: captions
        for _, name, captions in _group_lines(file, intake, wanted=frozenset(wanted))
    }
    for number, stem in enumerate(wanted, start=1):
        part = "train2014" if "train2014" in stem else "val2014"
        yield Entry(f"{split.name} line {number}", f"{part}/{stem}.jpg", grouped.get(stem, ()))


def _group_lines(
    file: Path, intake: Intake, *, wanted: Collection[str] | None = None
) -> list[tuple[str, str, tuple[str, ...]]]:
    """Place, picture and captions of each picture; of the wanted ones alone where they are given.

    A line that cannot be read is a fault.
    """
    captions: dict[str, list[str]] = {}
    places: dict[str, str] = {}
    for number, line in enumerate(read_lines(file), start=1):
        place = f"{file.name} line {number}"
        label, *text = line.split(maxsplit=1)
        stem, mark, _ = label.partition("#")
        if not mark or not stem:
            intake.faults.add("no 'picture#number' at the start of the line", place)
            continue
        stem = stem.removesuffix(".jpg")
        if wanted is None or stem in wanted:
            captions.setdefault(stem, []).append(text[0] if text else "")
            places.setdefault(stem, place)
    return [(places[stem], f"{stem}.jpg", tuple(texts)) for stem, texts in captions.items()]
