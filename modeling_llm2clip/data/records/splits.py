"""Splits data into training and test parts that share no group."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from pyarrow import compute

from ..._suggestions import counted, list_first
from ..key_arrays import contains_keys
from .record_table import Array, RecordTable
from .records import CaptionedImage


def split_records(
    records: Sequence[CaptionedImage],
    *,
    test_size: float,
    seed: int,
    allow_shared_captions: bool = False,
) -> tuple[RecordTable, RecordTable]:
    """Split records at random by group: all images and languages of a group are in one part.

    Args:
        records: Records of a dataset; their order does not affect the split.
        test_size: Number of test groups, or the fraction of all groups if below 1.
        seed: Seed of the split.
        allow_shared_captions: Accept captions that occur in both parts.

    Returns:
        Training records and test records, each in the order of `records`.

    Raises:
        ValueError: A part would have fewer than two groups, or a caption is in both parts without
            `allow_shared_captions`.

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
            "side. Each side needs at least 2: choose another size, or add images."
        )
    random.Random(seed).shuffle(groups)  # type: ignore[arg-type]
    is_test = np.isin(keys, groups[:count])
    train, test = table.select(np.flatnonzero(~is_test)), table.select(np.flatnonzero(is_test))
    shared = () if allow_shared_captions else _list_texts(test, list_text_keys(train))
    if shared:
        raise ValueError(
            f"{counted(len(shared), 'caption')} on both sides of the split, such as "
            f"{list_first(map(repr, sorted(shared)))}. Give images of the same thing the same "
            "group_id, remove these captions, or pass allow_shared_captions=True."
        )
    return train, test


def _sort_groups(table: RecordTable, keys: Array) -> Array:
    """Return the distinct group keys, ordered by group id."""
    unique, firsts = np.unique(keys, return_index=True)
    ids = [batch.column(0) for batch in table.select(firsts).iterate_columns(["group_id"])]
    order: Array = compute.sort_indices(pa.chunked_array(ids, pa.string())).to_numpy()
    return unique[order]


def list_text_keys(table: RecordTable) -> Array:
    """List the hashes of all captions, short and long."""
    return np.concatenate([np.empty(0, np.int64), *table.iterate_numbers("text_keys")])


def count_shared_captions(table: RecordTable, others: RecordTable) -> int:
    """Count the captions of a table that are also captions of another table."""
    keys = np.unique(list_text_keys(others))
    return int(sum(contains_keys(keys, p).sum() for p in table.iterate_numbers("text_keys")))


def _list_texts(table: RecordTable, keys: Array) -> set[str]:
    """Return the texts of a table whose keys are among the given keys."""
    chosen: set[str] = set()
    for batch in table.iterate_columns(["text_keys", "captions", "long_captions"]):
        is_chosen = np.isin(np.asarray(batch.column(0).flatten()), keys)
        if is_chosen.any():
            rows = zip(*(batch.column(c).to_pylist() for c in (1, 2)), strict=True)
            texts = [text for short, long in rows for text in (*short, *long)]
            chosen.update(texts[number] for number in np.flatnonzero(is_chosen).tolist())
    return chosen


def choose_test_rows(records: Sequence[CaptionedImage], groups: Collection[str]) -> list[int]:
    """Choose one test record per group, so each group is queried once."""
    rows = (row for row, record in enumerate(records) if record.group_id in groups)
    return list({records[row].group_id: row for row in rows}.values())
