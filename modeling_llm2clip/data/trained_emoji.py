"""Which of the package's own emoji a model was aligned with, as they are no test of it then.

The demo and the set `emoji` hold out the same things for one seed alone, and anyone may align with
the whole folder. So a model's folder says which things it has seen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .record_loading import find_example_data, load_records
from .records import CaptionedImage

TRAINED_FILE = "trained_emoji.json"
_FORMAT_VERSION = 1
# Code points of an emoji, as its key and its files are called.
_KEY = re.compile(r"[0-9a-f]{4,6}(-[0-9a-f]{4,6})*")


@dataclass(frozen=True)
class TrainedEmoji:
    """What alignments by this package have seen of its emoji.

    Attributes:
        keys: of the things, in whatever style or language.
        is_complete: whether nothing else was seen; not, where an earlier training is unknown.
    """

    keys: frozenset[str] = frozenset()
    is_complete: bool = True

    def add(self, other: TrainedEmoji) -> TrainedEmoji:
        """What both have seen."""
        return TrainedEmoji(self.keys | other.keys, self.is_complete and other.is_complete)


def find_trained_emoji(records: Iterable[CaptionedImage]) -> TrainedEmoji:
    """The emoji among the records of a training."""
    found = (
        match_emoji((record.group_id, record.name), (*record.captions, *record.long_captions))
        for record in records
    )
    return TrainedEmoji(frozenset(key for key in found if key is not None))


def match_emoji(names: Sequence[str], captions: Collection[str]) -> str | None:
    """The key of the emoji that an image is, if it is one.

    A name alone may be that of any numbered image, so a caption must be the emoji's too.

    Args:
        names: its key, its file.
        captions: in any of the languages.
    """
    for name in names:
        key = Path(name).stem
        if _KEY.fullmatch(key) and not _captions_of_emoji().get(key, set()).isdisjoint(captions):
            return key
    return None


def write_trained_emoji(folder: Path, trained: TrainedEmoji) -> None:
    """Write it beside the weights."""
    content = {
        "format_version": _FORMAT_VERSION,
        "is_complete": trained.is_complete,
        "keys": sorted(trained.keys),
    }
    (folder / TRAINED_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_trained_emoji(folder: Path) -> TrainedEmoji | None:
    """Read what a model's folder says; None where it says nothing.

    Raises: ValueError when the file is damaged.
    """
    file = folder / TRAINED_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format_version"] != _FORMAT_VERSION:
            raise ValueError(f"format_version {content['format_version']!r}")
        return TrainedEmoji(frozenset(map(str, content["keys"])), bool(content["is_complete"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged ({error!r}), and nothing else says what the model was trained on. "
            "Write the model's folder again."
        ) from error


@cache
def _captions_of_emoji() -> dict[str, set[str]]:
    captions: dict[str, set[str]] = {}
    for record in load_records(find_example_data() / "emoji", require_images=False):
        captions.setdefault(record.group_id, set()).update(record.captions)
    return captions
