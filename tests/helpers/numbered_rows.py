"""A `datasets.Dataset` of numbered rows, and a check of records made from it."""

from __future__ import annotations

from typing import Any

import datasets
from captioned_files import encode

COLUMNS = {"image": "img", "captions": "texts", "group_id": "label"}


def make_dataset(count: int = 20) -> datasets.Dataset:
    rows = {
        "img": [{"bytes": encode("images/red.png") + b" " * n, "path": None} for n in range(count)],
        "texts": [[f"caption {n}", f"text {n}"] for n in range(count)],
        "label": list(range(count)),
    }
    return datasets.Dataset.from_dict(rows).cast_column("img", datasets.Image(decode=False))


def require_rows(records: Any, numbers: list[int]) -> None:
    """Require records to match these rows, in order."""
    assert [record.captions[0] for record in records] == [f"caption {n}" for n in numbers]
    assert [record.group_id for record in records] == [str(n) for n in numbers]
    for record, number in zip(records, numbers, strict=True):
        assert record.image.read_bytes() == encode("images/red.png") + b" " * number
