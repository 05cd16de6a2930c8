"""Reads Karpathy's split of Flickr30k and COCO, in the two forms that are passed around.

| form | file |
| --- | --- |
| a list of `{"image", "caption": […]}`, the test split alone (Salesforce, for ALBEF and BLIP; what
upstream downloads) | `flickr30k_test.json`, `coco_karpathy_test.json` | | `{"images": [{"split",
"filename", "filepath", "sentences": [{"raw"}]}]}`, all splits (Karpathy's own) |
`dataset_flickr30k.json`, `dataset_coco.json` |

COCO has more than five captions for some images: 25,010 for 5,000. They are kept with their
image, whatever their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ....data.sources.json_files import read_json
from ..dataset_spec import ReadRequest
from ..retrieval_dataset import RawRecord
from ..validation import DatasetValidator


def read_karpathy(
    request: ReadRequest, intake: DatasetValidator, *, files: tuple[str, ...], advice: str
) -> Iterator[RawRecord]:
    """Yield one entry an image of the test split, in the file's order."""
    file = intake.find_file(request.folder, *files, advice=advice)
    content = read_json(file)
    is_list = isinstance(content, list)
    items = content if is_list else content.get("images") if isinstance(content, dict) else None
    if not isinstance(items, list):
        raise ValueError(f"{file}: neither a list nor an object with 'images'. {advice}")
    for index, item in enumerate(items):
        place = f"{file.name} [{index}]"
        fields: dict[str, Any] = item if isinstance(item, dict) else {}
        if not is_list and fields.get("split") in ("train", "restval", "val"):
            continue
        if not is_list and fields.get("split") != "test":
            intake.errors.add("no split, or an unknown one", place)
            continue
        name, captions = _read_flat(fields) if is_list else _read_original(fields)
        if isinstance(name, str) and all(isinstance(caption, str) for caption in captions):
            yield RawRecord(place, name, tuple(captions))
        else:
            intake.errors.add("no name of an image, or captions that are no texts", place)


def _read_flat(fields: dict[str, Any]) -> tuple[Any, list[Any]]:
    captions = fields.get("caption")
    return fields.get("image"), captions if isinstance(captions, list) else [captions]


def _read_original(fields: dict[str, Any]) -> tuple[Any, list[Any]]:
    sentences = fields.get("sentences")
    captions = [
        sentence.get("raw") if isinstance(sentence, dict) else None
        for sentence in (sentences if isinstance(sentences, list) else [None])
    ]
    parts = [fields.get("filepath"), fields.get("filename")]
    name = "/".join(part for part in parts if isinstance(part, str) and part)
    return (name if isinstance(parts[1], str) and parts[1] else None), captions
