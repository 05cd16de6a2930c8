"""Splits data into a part to train on and a part to test on, so that neither knows the other."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from pyarrow import compute

from ..._suggestions import counted, list_first
from .record_table import Array, RecordTable
from .records import CaptionedImage


def split_records(
    records: Sequence[CaptionedImage],
    *,
    test_size: float,
    seed: int,
    allow_shared_captions: bool = False,
) -> tuple[RecordTable, RecordTable]:
    """Split records at random, by group: all images and languages of a group are on one side.

    Args:
        records: Records of a dataset; their order does not matter to the split.
        test_size: Share of the groups to test on, below 1, or their number.
        seed: Another seed gives another split.
        allow_shared_captions: Accept captions that are on both sides.

    Returns:
        Records to train on and records to test on, each in the order of `records`.

    Raises:
        ValueError: A side would have fewer than two groups, or both have the same caption and may
            not.

    Examples:
        >>> records = load_records("my-images")
        >>> train, test = split_records(records, test_size=0.2, seed=0)
        >>> len(train), len(test)
        (16, 4)
    """
    table = RecordTable.from_records(records)
    keys = table.group_keys
    groups = _sort_groups(table, keys)
    count = round(test_size * len(groups)) if 0 < test_size < 1 else int(test_size)
    if not 2 <= count <= len(groups) - 2:
        raise ValueError(
            f"test_size={test_size!r} puts {count} of {len(groups)} groups of images on the test "
            "side. Each side needs at least 2: choose another size, or give more images."
        )
    random.Random(seed).shuffle(groups)  # type: ignore[arg-type]
    is_test = np.isin(keys, groups[:count])
    train, test = table.select(np.flatnonzero(~is_test)), table.select(np.flatnonzero(is_test))
    shared = () if allow_shared_captions else _list_texts(test, list_text_keys(train))
    if shared:
        raise ValueError(
            f"{counted(len(shared), 'caption')} on both sides of the split, such as "
            f"{list_first(map(repr, sorted(shared)))}. Give images of the same thing the same "
            "group_id, remove them, or give allow_shared_captions=True."
        )
    return train, test


def _sort_groups(table: RecordTable, keys: Array) -> Array:
    """Return the key of each group once, in the order of the group ids."""
    unique, firsts = np.unique(keys, return_index=True)
    ids = [batch.column(0) for batch in table.select(firsts).iterate_columns(["group_id"])]
    order: Array = compute.sort_indices(pa.chunked_array(ids, pa.string())).to_numpy()
    return unique[order]


def list_text_keys(table: RecordTable) -> Array:
    """List the hashes of all captions, long ones too."""
    parts = [np.asarray(b.column(0).flatten()) for b in table.iterate_columns(["text_keys"])]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _list_texts(table: RecordTable, keys: Array) -> set[str]:
    """Return the texts of a table that have one of the keys."""
    chosen: set[str] = set()
    for batch in table.iterate_columns(["text_keys", "captions", "long_captions"]):
        is_chosen = np.isin(np.asarray(batch.column(0).flatten()), keys)
        if is_chosen.any():
            rows = zip(*(batch.column(c).to_pylist() for c in (1, 2)), strict=True)
            texts = [text for short, long in rows for text in (*short, *long)]
            chosen.update(texts[number] for number in np.flatnonzero(is_chosen).tolist())
    return chosen


def choose_test_rows(records: Sequence[CaptionedImage], groups: Collection[str]) -> list[int]:
    """Choose one record per group to test with, so that each group is asked for once."""
    rows = (row for row, record in enumerate(records) if record.group_id in groups)
    return list({records[row].group_id: row for row in rows}.values())
