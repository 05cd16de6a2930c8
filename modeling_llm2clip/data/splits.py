"""Which of a folder's images training never sees."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from .records import CaptionedImage

_MOST_HELD_OUT = 300


def split_records(records: Sequence[CaptionedImage], *, seed: int) -> set[str]:
    """Choose a fifth of the keys, 300 at most, whose images and captions training never sees.

    Raises: ValueError for fewer than ten keys, or a caption that two keys share across the split.
    """
    keys = sorted({record.key for record in records})
    if len(keys) < 10:
        raise ValueError(f"{len(keys)} different things are too few to train and test on; give 10.")
    random.Random(seed).shuffle(keys)
    held_out = set(keys[: min(_MOST_HELD_OUT, len(keys) // 5)])
    captions: dict[bool, set[str]] = {True: set(), False: set()}
    for record in records:
        captions[record.key in held_out].update(record.captions)
    leaked = sorted(captions[True] & captions[False])
    if leaked:
        raise ValueError(
            f"{len(leaked)} held-out captions are training captions too: {leaked[:5]}. Give "
            "images that show the same thing the same key."
        )
    return held_out


def choose_test_rows(records: Sequence[CaptionedImage], held_out: Collection[str]) -> list[int]:
    """Rows that test: of each held-out key its last record, in the order in which keys first come.

    So an image is asked for once, in whatever styles it was drawn.
    """
    rows = (row for row, record in enumerate(records) if record.key in held_out)
    return list({records[row].key: row for row in rows}.values())
