"""Reads the caption files that COCO itself publishes, such as `captions_val2017.json`."""

from __future__ import annotations

from collections.abc import Iterator

from ....data.sources.coco import read_coco
from ..dataset_spec import ReadRequest
from ..retrieval_dataset import RawRecord
from ..validation import DatasetValidator

FILES = ("captions_val2017.json", "annotations/captions_val2017.json")
ADVICE = (
    "Give the folder that holds annotations/captions_val2017.json, from "
    "annotations_trainval2017.zip of cocodataset.org."
)


def read_coco_captions(request: ReadRequest, intake: DatasetValidator) -> Iterator[RawRecord]:
    """Yield one entry an image, in the order of the file's `images`."""
    file = intake.find_file(request.folder, *FILES, advice=ADVICE)
    for raw in read_coco(file, intake.errors):
        name = raw.fields.get("file_name", raw.default_name)
        yield RawRecord(raw.place, str(name), tuple(raw.fields["captions"]))
