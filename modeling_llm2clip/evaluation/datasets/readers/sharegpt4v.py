"""Reads ShareGPT4V's captions: a JSON list of conversations, of which the first ones are tested.

The file has 1.2 million records in 1.5 GB, so it is read record by record and left after the last
one that is wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from ....data.sources.json_files import iterate_json_list
from ..dataset_spec import ReadRequest
from ..retrieval_dataset import RawRecord
from ..validation import DatasetValidator

FILE = "share-captioner_coco_lcs_sam_1246k_1107.json"


def read_sharegpt4v(
    request: ReadRequest, intake: DatasetValidator, *, records: int
) -> Iterator[RawRecord]:
    """Yield the first records: the image, and the answer of the model that describes it."""
    file = intake.find_file(
        request.folder, FILE, advice="Get it from huggingface.co/datasets/Lin-Chen/ShareGPT4V."
    )
    for index, record in enumerate(islice(iterate_json_list(file), records)):
        place = f"{file.name} [{index}]"
        fields: dict[str, Any] = record if isinstance(record, dict) else {}
        turns = fields.get("conversations")
        answer = turns[1] if isinstance(turns, list) and len(turns) > 1 else None
        caption = answer.get("value") if isinstance(answer, dict) else None
        name = fields.get("image")
        if isinstance(name, str) and isinstance(caption, str):
            yield RawRecord(place, name, (caption,))
        else:
            intake.errors.add("no 'image', or no answer in 'conversations'", place)
