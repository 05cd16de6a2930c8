"""Which of a folder's images training never sees."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from .records import CaptionedImage

_MOST_HELD_OUT = 300


def split_records(records: Sequence[CaptionedImage], *, seed: int) -> set[str]:
    """Choose a fifth of the groups, 300 at most, whose images and captions training never sees.

    Raises: ValueError for fewer than ten groups, or a caption on both sides of the split.
    """
    group_ids = sorted({record.group_id for record in records})
    if len(group_ids) < 10:
        raise ValueError(
            f"{len(group_ids)} groups of images are too few to train and test on. Give at least 10."
        )
    random.Random(seed).shuffle(group_ids)
    held_out = set(group_ids[: min(_MOST_HELD_OUT, len(group_ids) // 5)])
    captions: dict[bool, set[str]] = {True: set(), False: set()}
    for record in records:
        captions[record.group_id in held_out].update(record.captions)
    leaked = sorted(captions[True] & captions[False])
    if leaked:
        raise ValueError(
            f"{len(leaked)} held-out captions are training captions too: {leaked[:5]}. Give "
            "images that show the same thing the same group_id."
        )
    return held_out


def choose_test_rows(records: Sequence[CaptionedImage], held_out: Collection[str]) -> list[int]:
    """Rows that test: of each held-out group its last record, in the order of the groups.

    So an image is asked for once, in whatever styles it was drawn.
    """
    rows = (row for row, record in enumerate(records) if record.group_id in held_out)
    return list({records[row].group_id: row for row in rows}.values())
