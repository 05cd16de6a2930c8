"""Reads Urban1k: `caption/17.txt` describes `image/17.jpg`; the first line is the caption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ....data.pictures import PICTURE_SUFFIXES
from ..card import ReadRequest
from ..intake import Intake
from ..retrieval import Entry
from .text_files import read_lines


def read_urban1k(request: ReadRequest, intake: Intake) -> Iterator[Entry]:
    """Yield one entry a name that has a caption or a picture, in the order of the numbers."""
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
    images = request.images or root / "image"
    found = _list_pictures(images)
    pictures = {name: files[0] for name, files in found.items()}
    num_longer = 0
    for name in sorted(captions.keys() | pictures.keys(), key=_number_first):
        place, lines, is_sound = f"caption/{name}.txt", [], True
        if name in captions:
            try:
                lines = read_lines(captions[name])
            except ValueError:
                intake.faults.add("not UTF-8", place)
                intake.faults_of_samples += 1
                is_sound = False
        if len(found.get(name, ())) > 1:
            shown = ", ".join(file.name for file in found[name])
            intake.faults.add("several pictures of one name", f"{place}: {shown}")
            intake.faults_of_samples += 1
            is_sound = False
        num_longer += any(line.strip() for line in lines[1:])
        yield Entry(
            place,
            f"{name}.jpg",
            tuple(lines[:1]),
            picture=pictures.get(name),
            is_sound=is_sound,
        )
    intake.notes["captions_cut_to_their_first_line"] = num_longer


def _list_pictures(images: Path) -> dict[str, list[Path]]:
    """The files of each name without its ending, in order."""
    found: dict[str, list[Path]] = {}
    for file in sorted(images.iterdir()) if images.is_dir() else []:
        if file.suffix.lower().removeprefix(".") in PICTURE_SUFFIXES:
            found.setdefault(file.stem, []).append(file)
    return found


def _number_first(name: str) -> tuple[bool, int, str]:
    return (not name.isdigit(), int(name) if name.isdigit() else 0, name)
