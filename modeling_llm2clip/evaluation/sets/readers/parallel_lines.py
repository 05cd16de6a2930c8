"""Reads Multi30k's first task: line n of a language's file describes the picture of line n."""

from __future__ import annotations

from collections.abc import Iterator

from ..card import ReadRequest
from ..intake import Intake
from ..retrieval import Entry
from .text_files import read_lines

_ADVICE = "Give the folder `data/task1` of github.com/multi30k/dataset."


def read_multi30k(request: ReadRequest, intake: Intake, *, split: str) -> Iterator[Entry]:
    """Yield one entry a picture of the split, with its line in the asked language."""
    texts = intake.find_file(
        request.folder,
        *(
            f"{root}raw/{split}.{request.lang}{suffix}"
            for root in ("", "data/task1/")
            for suffix in (".gz", "")
        ),
        advice=_ADVICE,
    )
    names = intake.find_file(
        request.folder,
        f"image_splits/{split}.txt",
        f"data/task1/image_splits/{split}.txt",
        advice=_ADVICE,
    )
    captions, pictures = read_lines(texts), read_lines(names)
    if len(captions) != len(pictures):
        # Which caption is missing cannot be told, so no line can be trusted.
        raise ValueError(
            f"{texts} has {len(captions)} lines, {names} has {len(pictures)}; line n of one must "
            "describe line n of the other. Get both anew from github.com/multi30k/dataset."
        )
    for number, (name, caption) in enumerate(zip(pictures, captions, strict=True), start=1):
        # The COCO split writes the number of the caption behind the picture.
        yield Entry(f"{texts.name} line {number}", name.strip().partition("#")[0], (caption,))
