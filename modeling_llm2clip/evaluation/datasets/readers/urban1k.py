"""Reads Urban1k: `caption/17.txt` describes `image/17.jpg`; the first line is the caption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ....data.image_sources import IMAGE_SUFFIXES
from ..dataset_spec import ReadRequest
from ..retrieval_dataset import RawRecord
from ..validation import DatasetValidator
from .text_files import read_lines


def read_urban1k(request: ReadRequest, intake: DatasetValidator) -> Iterator[RawRecord]:
    """Yield one entry a name that has a caption or an image, in the order of the numbers."""
    root = next(
        (r for r in (request.folder, request.folder / "Urban1k") if (r / "caption").is_dir()), None
    )
    if root is None:
        raise ValueError(
            f"{intake.source}: {request.folder} has no folder 'caption'. Unpack Urban1k.zip from "
            "huggingface.co/datasets/BeichenZhang/Urban1k and give the folder that holds 'caption' "
            "and 'image'."
        )
    captions = {file.stem: file for file in (root / "caption").glob("*.txt")}
    image_dir = request.image_dir or root / "image"
    found = _list_images(image_dir)
    images = {name: files[0] for name, files in found.items()}
    num_longer = 0
    for name in sorted(captions.keys() | images.keys(), key=_number_first):
        place, lines, is_sound = f"caption/{name}.txt", [], True
        if name in captions:
            try:
                lines = read_lines(captions[name])
            except ValueError:
                intake.errors.add("not UTF-8", place)
                intake.errors_of_samples += 1
                is_sound = False
        if len(found.get(name, ())) > 1:
            shown = ", ".join(file.name for file in found[name])
            intake.errors.add("several images of one name", f"{place}: {shown}")
            intake.errors_of_samples += 1
            is_sound = False
        num_longer += any(line.strip() for line in lines[1:])
        yield RawRecord(
            place,
            f"{name}.jpg",
            tuple(lines[:1]),
            image=images.get(name),
            is_sound=is_sound,
        )
    intake.notes["captions_cut_to_their_first_line"] = num_longer


def _list_images(image_dir: Path) -> dict[str, list[Path]]:
    """The files of each name without its ending, in order."""
    found: dict[str, list[Path]] = {}
    for file in sorted(image_dir.iterdir()) if image_dir.is_dir() else []:
        if file.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES:
            found.setdefault(file.stem, []).append(file)
    return found


def _number_first(name: str) -> tuple[bool, int, str]:
    return (not name.isdigit(), int(name) if name.isdigit() else 0, name)
