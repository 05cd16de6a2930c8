"""Reads JSON lines with an image's name and texts: DOCCI, ImageInWords, Crossmodal-3600."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ....data.sources.json_files import read_json_lines
from ..dataset_spec import ReadRequest
from ..retrieval_dataset import RawRecord
from ..validation import DatasetValidator

IIW_SUBSETS = ("IIW-400", "DOCCI_Test", "DCI_Test", "CM_3600", "LocNar_Eval")
_IIW_KEYS = ("image/key", "image")


def read_docci(request: ReadRequest, intake: DatasetValidator) -> Iterator[RawRecord]:
    """Yield the test split of `docci_descriptions.jsonlines`; images lie in `images`."""
    file = intake.find_file(
        request.folder,
        "docci_descriptions.jsonlines",
        advice="Get it and docci_images.tar.gz from google.github.io/docci.",
    )
    for raw in read_json_lines(file, intake.errors):
        if raw.fields.get("split") in ("train", "qual_dev", "qual_test"):
            continue
        name, text = raw.fields.get("image_file"), raw.fields.get("description")
        if raw.fields.get("split") == "test" and isinstance(name, str) and isinstance(text, str):
            yield RawRecord(raw.place, name, (text,), find_under(request, "images", name))
        else:
            intake.errors.add("no 'split', 'image_file' and 'description'", raw.place)


def read_xm3600(request: ReadRequest, intake: DatasetValidator) -> Iterator[RawRecord]:
    """Yield every image of `captions.jsonl` with its captions in the asked language."""
    file = intake.find_file(
        request.folder,
        "captions.jsonl",
        advice="Unpack captions.zip and images.tgz from google.github.io/crossmodal-3600.",
    )
    for raw in read_json_lines(file, intake.errors):
        key, texts = raw.fields.get("image/key"), raw.fields.get(request.lang)
        captions = texts.get("caption") if isinstance(texts, Mapping) else None
        if isinstance(key, str) and captions is not None and _are_texts(captions):
            name = f"{key}.jpg"
            yield RawRecord(raw.place, name, tuple(captions), find_under(request, "images", name))
        else:
            intake.errors.add(f"no 'image/key', or no captions in {request.lang!r}", raw.place)


def read_iiw(
    request: ReadRequest,
    intake: DatasetValidator,
    *,
    subsets: tuple[str, ...] = IIW_SUBSETS,
    fields: tuple[str, ...] = ("IIW", "DOCCI", "IIW-P5B"),
    only_pairs: bool = False,
) -> Iterator[RawRecord]:
    """Yield ImageInWords' records, with the captions of these fields in their order.

    Args:
        only_pairs: pass over images with a single caption, which no other caption matches.
    """
    for subset in subsets:
        file = intake.find_file(
            request.folder,
            f"{subset}/data.jsonl",
            f"datasets/{subset}/data.jsonl",
            advice="Give the folder `datasets` of github.com/google/imageinwords.",
        )
        for raw in read_json_lines(file, intake.errors):
            place = f"{subset}/{raw.place}"
            key = next((raw.fields[name] for name in _IIW_KEYS if name in raw.fields), None)
            captions = [raw.fields[field] for field in fields if field in raw.fields]
            if not isinstance(key, str) or not _are_texts(captions):
                intake.errors.add("no 'image/key' or 'image', or captions that are none", place)
            elif len(captions) > 1 or not only_pairs:
                # One subset alone has images; the texts of several may use the same key.
                name = f"{key}.jpg" if len(subsets) == 1 else f"{subset}/{key}"
                yield RawRecord(place, name, tuple(captions))


def find_under(request: ReadRequest, default: str, name: str) -> Any:
    """The image in the publisher's own subfolder; None where the user named another folder."""
    image = request.folder / default / name
    return image if request.image_dir is None and image.is_file() else None


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
