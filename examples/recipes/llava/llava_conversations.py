"""What a multimodal LLM is trained on: conversations about a picture.

Captioned pictures become conversations without a question; LLaVA's published instruction data are
read as they are: a JSON list of

    {"id": "7", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat …?"},
                                                     {"from": "gpt", "value": "A …"}, …]}

`image` is absent in a conversation about no picture. Such data have known faults (pictures that
cannot be fetched any more), so that what is faulty can be left out, counted by kind.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from modeling_llm2clip.data.captioned_images import CaptionedImage
from modeling_llm2clip.data.faults import FaultCollector
from modeling_llm2clip.data.pictures import Picture, load_picture
from modeling_llm2clip.processing_llm2clip import load_pictures

PLACEHOLDER = "<image>"  # where the picture stands in a question
_FIELDS = {"id", "image", "conversations", "model"}
_SPEAKERS = ("human", "gpt")


@dataclass(frozen=True)
class Conversation:
    """Questions and answers in turn.

    Attributes:
        name: for errors.
        picture: what it is about; None for a conversation in words alone.
        turns: questions and their answers. The first question holds the placeholder once where
            there is a picture. A question that is the placeholder alone is a caption's.
    """

    name: str
    picture: Picture | None
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
        Conversation(record.name, record.picture, ((PLACEHOLDER, caption),))
        for record in chosen
        for caption in (*record.captions, *record.long_captions)
    ]


def hash_conversations(conversations: Sequence[Conversation]) -> str:
    """SHA-256 of names, turns and pictures, in their order; says whether a run has the same data.

    A picture counts by its place below the folder that holds all of them, which may have been
    moved, and by the size of its file; its pixels are not read.
    """
    pictures = _describe_pictures([c.picture for c in conversations if c.picture is not None])
    digest = hashlib.sha256()
    for conversation in conversations:
        picture = None if conversation.picture is None else pictures[conversation.picture]
        line = json.dumps([conversation.name, conversation.turns, picture])
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _describe_pictures(pictures: Collection[Picture]) -> dict[Picture, list[str | int]]:
    """Place below the folder of all, bytes, and where in the file a packed picture is."""
    inside: dict[Picture, tuple[Path, list[str | int]]] = {}
    for picture in dict.fromkeys(pictures):
        file, *where = (picture,) if isinstance(picture, Path) else astuple(picture)
        inside[picture] = file.absolute(), where
    files = {file for file, _ in inside.values()}
    sizes = {file: file.stat().st_size for file in files}
    folder = os.path.commonpath([file.parent for file in files]) if files else ""
    return {
        picture: [file.relative_to(folder).as_posix(), sizes[file], *where]
        for picture, (file, where) in inside.items()
    }


def read_conversations(
    file: Path, images: Path, *, check_pictures: bool = False, leave_out_faulty: bool = False
) -> tuple[list[Conversation], dict[str, int]]:
    """Read LLaVA's instruction data, or raise once with every fault.

    Args:
        images: folder that the names of pictures are relative to.
        check_pictures: decode every picture too.
        leave_out_faulty: leave faulty conversations out and count their faults, instead of raising.
    Returns: the conversations in the file's order, at least one, and faults by kind.
    Raises:
        DataFaults: what is wrong, how many of each kind, and where first.
        ValueError: the file is no JSON list, the folder is missing, or nothing is left.
    """
    faults, counts = FaultCollector(), Counter[str]()
    conversations: list[Conversation] = []
    for number, entry in enumerate(_read_list(file, images)):
        found: list[str] = []
        conversation = _build(entry, number, images, found)
        conversations += [] if found else [conversation]
        _note(found, f"{file.name} number {number}", faults, counts)
    if check_pictures:
        broken = _find_broken(conversations)
        for conversation in conversations:
            if conversation.picture in broken:  # which several may be about
                _note(["picture unreadable"], broken[conversation.picture], faults, counts)
        conversations = [c for c in conversations if c.picture not in broken]
    if not leave_out_faulty:
        faults.raise_if_any(str(file))
    if not conversations:
        raise ValueError(f"{file}: no conversation is left of it ({dict(counts)}).")
    return conversations, dict(counts)


def _note(found: Sequence[str], place: str, faults: FaultCollector, counts: Counter[str]) -> None:
    counts.update(found)
    for kind in found:
        faults.add(kind, place)


def _read_list(file: Path, images: Path) -> list[Any]:
    if not images.is_dir():
        raise ValueError(f"images={str(images)!r} is no folder. Give the pictures' folder.")
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON ({error}). Give LLaVA's list.") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{file} holds no list of conversations. Give LLaVA's list.")
    return entries


def _build(entry: Any, number: int, images: Path, found: list[str]) -> Conversation:
    if not isinstance(entry, dict):
        found.append("not an object")
        entry = {"conversations": []}
    found += [f"unknown field {field!r}" for field in sorted(set(entry) - _FIELDS)]
    picture = None
    if entry.get("image") is not None:
        picture = _find_picture(entry["image"], images, found)
    turns = _read_turns(entry.get("conversations"), found)
    if not found:
        _check_placeholders(turns, found, has_picture=picture is not None)
    return Conversation(str(entry.get("id", number)), picture, tuple(turns))


def _find_picture(name: Any, images: Path, found: list[str]) -> Path | None:
    if not isinstance(name, str) or not name.strip():
        found.append("'image' is not a non-blank text")
    elif not (images / name).is_file():
        found.append("picture missing")
    else:
        return images / name
    return None


def _read_turns(lines: Any, found: list[str]) -> list[tuple[str, str]]:
    if not isinstance(lines, list) or not all(_is_line(line) for line in lines):
        found.append("'conversations' is not a list of {'from': …, 'value': …}")
        return []
    if not lines or len(lines) % 2:
        found.append("a question without an answer" if lines else "no turns")
    speakers = [line["from"] for line in lines]
    if any(speaker != _SPEAKERS[i % 2] for i, speaker in enumerate(speakers)):
        found.append("speakers are not 'human' and 'gpt' in turn")
    texts = [line["value"].strip() for line in lines]
    if not all(texts):
        found.append("blank turn")
    return list(zip(texts[::2], texts[1::2], strict=False))


def _is_line(line: Any) -> bool:
    return isinstance(line, dict) and all(isinstance(line.get(k), str) for k in ("from", "value"))


def _check_placeholders(
    turns: Sequence[tuple[str, str]], found: list[str], *, has_picture: bool
) -> None:
    if any(PLACEHOLDER in answer for _, answer in turns):
        found.append(f"{PLACEHOLDER} in an answer")
    counts = [question.count(PLACEHOLDER) for question, _ in turns]
    if counts != [int(has_picture)] + [0] * (len(turns) - 1):
        wanted = "once, in the first question" if has_picture else "nowhere without a picture"
        found.append(f"{PLACEHOLDER} wanted {wanted}")


def _find_broken(conversations: Sequence[Conversation]) -> dict[Any, str]:
    """Decode every picture once; returns those that fail, with what is wrong."""
    pictures = list(dict.fromkeys(c.picture for c in conversations if c.picture is not None))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        problems = pool.map(_try_picture, pictures)
        return {
            picture: problem
            for picture, problem in zip(pictures, problems, strict=True)
            if problem is not None
        }


def _try_picture(picture: Picture) -> str | None:
    try:
        load_pictures(load_picture(picture))
    except ValueError as error:
        return str(error)
    return None
