"""Reads SugarCrepe: seven JSON files of a caption and a hard negative of a COCO image.

The text form has no image: another caption that people wrote for it stands in its place, the
first one in COCO's own file that is not the true caption itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ....data.records import clean_text
from ....data.sources.coco import read_coco
from ....data.sources.json_files import read_json
from ..choice_dataset import ChoiceEntry
from ..dataset_spec import ReadRequest
from ..validation import DatasetValidator
from .coco_captions import ADVICE, FILES

CATEGORIES = (
    "add_att",
    "add_obj",
    "replace_att",
    "replace_obj",
    "replace_rel",
    "swap_att",
    "swap_obj",
)


def read_sugarcrepe(request: ReadRequest, intake: DatasetValidator) -> Iterator[ChoiceEntry]:
    """Yield the items with their image's file name, category after category."""
    for category in CATEGORIES:
        file = intake.find_file(
            request.folder,
            f"{category}.json",
            f"data/{category}.json",
            advice="Give the folder `data` of github.com/RAIVNLab/sugar-crepe.",
        )
        items = read_json(file)
        if not isinstance(items, dict):
            raise ValueError(f"{file}: not an object of items. Get it anew.")
        for number, item in items.items():
            place = f"{file.name} {number}"
            fields: dict[str, Any] = item if isinstance(item, dict) else {}
            texts = [fields.get(name) for name in ("filename", "caption", "negative_caption")]
            if all(isinstance(text, str) for text in texts):
                image, true, false = map(str, texts)
                name = f"{category}/{number}"
                yield ChoiceEntry(place, name, category, (true, false), (image,))
            else:
                intake.errors.add("no 'filename', 'caption' and 'negative_caption'", place)


def read_sugarcrepe_text(request: ReadRequest, intake: DatasetValidator) -> Iterator[ChoiceEntry]:
    """Yield the items with another caption of the image in place of the image."""
    file = intake.find_file(request.folder, *FILES, advice=ADVICE)
    captions = {
        raw.fields.get("file_name"): raw.fields["captions"]
        for raw in read_coco(file, intake.errors)
    }
    for entry in read_sugarcrepe(request, intake):
        true = clean_text(entry.captions[0])
        others = (clean_text(caption) for caption in captions.get(entry.image_names[0], ()))
        anchor = next((text for text in others if text and text != true), None)
        if anchor is None:
            intake.errors.add("no other caption of the image", entry.place)
        else:
            yield ChoiceEntry(
                entry.place, entry.name, entry.category, entry.captions, anchor=anchor
            )
