"""Splits data into a part to train on and a part to test on, so that neither knows the other."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from .records import CaptionedImage

_SHOWN = 5


def split_records(
    records: Sequence[CaptionedImage], *, test_size: float, seed: int
) -> tuple[list[CaptionedImage], list[CaptionedImage]]:
    """Split records at random, by group: all images and languages of a group are on one side.

    Args:
        records: records of a dataset; their order does not matter to the split.
        test_size: share of the groups to test on, below 1, or their number.
        seed: another seed gives another split.

    Returns:
        Records to train on and records to test on, each in the order of `records`.

    Raises:
        ValueError: a side would have fewer than two groups, or both have the same caption.

    Examples:
        >>> records = load_records("my-images")
        >>> train, test = split_records(records, test_size=0.2, seed=0)
        >>> len(train), len(test)
        (16, 4)
    """
    groups = sorted({record.group_id for record in records})
    count = round(test_size * len(groups)) if 0 < test_size < 1 else int(test_size)
    if not 2 <= count <= len(groups) - 2:
        raise ValueError(
            f"test_size={test_size!r} puts {count} of {len(groups)} groups of images on the test "
            "side. Each side needs at least 2: choose another size, or give more images."
        )
    random.Random(seed).shuffle(groups)
    chosen = set(groups[:count])
    train = [record for record in records if record.group_id not in chosen]
    test = [record for record in records if record.group_id in chosen]
    if shared := sorted(_list_texts(train) & _list_texts(test)):
        raise ValueError(
            f"{len(shared)} captions are on both sides of the split, such as {shared[:_SHOWN]}. "
            "Give images that show the same thing the same group_id, or remove these captions."
        )
    return train, test


def _list_texts(records: Sequence[CaptionedImage]) -> set[str]:
    return {text for record in records for text in (*record.captions, *record.long_captions)}


def choose_test_rows(records: Sequence[CaptionedImage], groups: Collection[str]) -> list[int]:
    """Choose one record per group to test with, so that each group is asked for once.

    Args:
        records: all records.
        groups: ids of the groups to test with.

    Returns:
        Row of the last record of each group, in the order in which the groups first occur.
    """
    rows = (row for row, record in enumerate(records) if record.group_id in groups)
    return list({records[row].group_id: row for row in rows}.values())
