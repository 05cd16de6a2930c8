"""Reads Multi30k's first task: line n of a language's file describes the image of line n."""

from __future__ import annotations

from collections.abc import Iterator

from ..dataset_spec import ReadRequest
from ..retrieval_dataset import RawRecord
from ..validation import DatasetValidator
from .text_files import read_lines

_ADVICE = "Give the folder `data/task1` of github.com/multi30k/dataset."


def read_multi30k(
    request: ReadRequest, intake: DatasetValidator, *, split: str
) -> Iterator[RawRecord]:
    """Yield one entry an image of the split, with its line in the asked language."""
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
    captions, images = read_lines(texts), read_lines(names)
    if len(captions) != len(images):
        # Which caption is missing cannot be told, so no line can be trusted.
        raise ValueError(
            f"{texts} has {len(captions)} lines, {names} has {len(images)}; line n of one must "
            "describe line n of the other. Get both anew from github.com/multi30k/dataset."
        )
    for number, (name, caption) in enumerate(zip(images, captions, strict=True), start=1):
        # The COCO split writes the number of the caption behind the image.
        yield RawRecord(f"{texts.name} line {number}", name.strip().partition("#")[0], (caption,))
