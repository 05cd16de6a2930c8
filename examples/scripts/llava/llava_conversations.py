"""Training data of a multimodal LLM: conversations about an image.

Captioned images become conversations without a question; LLaVA's published instruction data are
read as they are: a JSON list of

    {"id": "7", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat …?"},
                                                     {"from": "gpt", "value": "A …"}, …]}

`image` is absent in a conversation about no image. Such data have known errors (images that
cannot be fetched any more), so that invalid entries can be left out, counted by kind.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from modeling_llm2clip.data.images.image_sources import ImageSource, find_unreadable_images
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.validation_errors import ErrorCollector

PLACEHOLDER = "<image>"  # where the image is in a question
_FIELDS = {"id", "image", "conversations", "model"}
_SPEAKERS = ("human", "gpt")


@dataclass(frozen=True)
class Conversation:
    """Questions and answers in turn.

    Attributes:
        name: for errors.
        image: its subject; None for a conversation in words alone.
        turns: questions and their answers. With an image, the first question holds the placeholder
            once. For a caption, the question is the placeholder alone.
    """

    name: str
    image: ImageSource | None
    turns: tuple[tuple[str, str], ...]


def conversations_of_captions(
    records: Sequence[CaptionedImage], *, lang: str = "en"
) -> list[Conversation]:
    """Make one conversation of each caption in a language, short or long.

    Raises: ValueError when no record is in that language.
    """
    chosen = [record for record in records if record.lang == lang]
    if not chosen:
        known = sorted({record.lang for record in records})
        raise ValueError(f"No caption is in the language {lang!r}; there are {known}. Set --lang.")
    return [
        Conversation(record.name, record.image, ((PLACEHOLDER, caption),))
        for record in chosen
        for caption in (*record.captions, *record.long_captions)
    ]


def hash_conversations(conversations: Sequence[Conversation]) -> str:
    """SHA-256 of names, turns and images, in their order; says whether a run has the same data.

    An image counts by its place below the folder that holds all of them, which may have been
    moved, and by the size of its file; its pixels are not read.
    """
    images = _describe_images([c.image for c in conversations if c.image is not None])
    digest = hashlib.sha256()
    for conversation in conversations:
        image = None if conversation.image is None else images[conversation.image]
        line = json.dumps([conversation.name, conversation.turns, image])
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _describe_images(images: Collection[ImageSource]) -> dict[ImageSource, list[str | int]]:
    """Place below the folder of all, bytes, and where in the file a packed image is."""
    inside: dict[ImageSource, tuple[Path, list[str | int]]] = {}
    for image in dict.fromkeys(images):
        file, *where = (image,) if isinstance(image, Path) else astuple(image)
        inside[image] = file.absolute(), where
    files = {file for file, _ in inside.values()}
    sizes = {file: file.stat().st_size for file in files}
    folder = os.path.commonpath([file.parent for file in files]) if files else ""
    return {
        image: [file.relative_to(folder).as_posix(), sizes[file], *where]
        for image, (file, where) in inside.items()
    }


def read_conversations(
    file: Path, images: Path, *, check_images: bool = False, skip_invalid: bool = False
) -> tuple[list[Conversation], dict[str, int]]:
    """Read LLaVA's instruction data, or raise once with every error.

    Args:
        images: folder that the names of images are relative to.
        check_images: decode every image too.
        skip_invalid: leave invalid conversations out and count their errors, instead of raising.
    Returns: the conversations in the file's order, at least one, and errors by kind.
    Raises:
        DataValidationError: entries are invalid; names the kinds, their counts and first places.
        ValueError: the file is not a JSON list, the folder is missing, or nothing is left.
    """
    errors, counts = ErrorCollector(), Counter[str]()
    conversations: list[Conversation] = []
    for number, entry in enumerate(_read_list(file, images)):
        kinds: list[str] = []
        conversation = _build(entry, number, images, kinds)
        conversations += [] if kinds else [conversation]
        _note(kinds, f"{file.name} number {number}", errors, counts)
    if check_images:
        broken = find_unreadable_images(c.image for c in conversations if c.image is not None)
        for conversation in conversations:
            if conversation.image in broken:  # which several may be about
                _note(["image unreadable"], broken[conversation.image], errors, counts)
        conversations = [c for c in conversations if c.image not in broken]
    if not skip_invalid:
        errors.raise_if_any(str(file))
    if not conversations:
        raise ValueError(f"{file}: no conversation is left of it ({dict(counts)}).")
    return conversations, dict(counts)


def _note(kinds: Sequence[str], place: str, errors: ErrorCollector, counts: Counter[str]) -> None:
    counts.update(kinds)
    for kind in kinds:
        errors.add(kind, place)


def _read_list(file: Path, images: Path) -> list[Any]:
    if not images.is_dir():
        raise ValueError(f"images={str(images)!r} is not a folder. Give the images' folder.")
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}). Give LLaVA's list.") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{file} holds no list of conversations. Give LLaVA's list.")
    return entries


def _build(entry: Any, number: int, images: Path, kinds: list[str]) -> Conversation:
    if not isinstance(entry, dict):
        kinds.append("not an object")
        entry = {"conversations": []}
    kinds += [f"unknown field {field!r}" for field in sorted(set(entry) - _FIELDS)]
    image = None
    if entry.get("image") is not None:
        image = _find_image(entry["image"], images, kinds)
    turns = _read_turns(entry.get("conversations"), kinds)
    if not kinds:
        _check_placeholders(turns, kinds, has_image=image is not None)
    return Conversation(str(entry.get("id", number)), image, tuple(turns))


def _find_image(name: Any, images: Path, kinds: list[str]) -> Path | None:
    if not isinstance(name, str) or not name.strip():
        kinds.append("'image' is not a non-blank text")
    elif not (images / name).is_file():
        kinds.append("image missing")
    else:
        return images / name
    return None


def _read_turns(lines: Any, kinds: list[str]) -> list[tuple[str, str]]:
    if not isinstance(lines, list) or not all(_is_line(line) for line in lines):
        kinds.append("'conversations' is not a list of {'from': …, 'value': …}")
        return []
    if not lines or len(lines) % 2:
        kinds.append("a question without an answer" if lines else "no turns")
    speakers = [line["from"] for line in lines]
    if any(speaker != _SPEAKERS[i % 2] for i, speaker in enumerate(speakers)):
        kinds.append("speakers are not 'human' and 'gpt' in turn")
    texts = [line["value"].strip() for line in lines]
    if not all(texts):
        kinds.append("blank turn")
    return list(zip(texts[::2], texts[1::2], strict=False))


def _is_line(line: Any) -> bool:
    return isinstance(line, dict) and all(isinstance(line.get(k), str) for k in ("from", "value"))


def _check_placeholders(
    turns: Sequence[tuple[str, str]], kinds: list[str], *, has_image: bool
) -> None:
    if any(PLACEHOLDER in answer for _, answer in turns):
        kinds.append(f"{PLACEHOLDER} in an answer")
    counts = [question.count(PLACEHOLDER) for question, _ in turns]
    if counts != [int(has_image)] + [0] * (len(turns) - 1):
        place = "once, in the first question" if has_image else "nowhere without an image"
        kinds.append(f"{PLACEHOLDER} wanted {place}")
