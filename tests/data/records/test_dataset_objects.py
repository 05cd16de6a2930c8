"""`datasets` objects read like their files, whatever was done to them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from captioned_files import LINES, RECORDS, encode, own_cache, write_images  # noqa: F401
from numbered_rows import COLUMNS, make_dataset, require_rows

from modeling_llm2clip.data.records.dataset_objects import records_from_dataset
from modeling_llm2clip.data.streams.dataset_streams import stream_dataset


@pytest.mark.parametrize("is_saved", [True, False])
def test_images_are_those_of_their_rows_also_after_pickling(
    is_saved: bool, saved: datasets.Dataset
) -> None:
    records = records_from_dataset(saved if is_saved else make_dataset(), columns=COLUMNS)
    require_rows(records, list(range(20)))
    require_rows(pickle.loads(pickle.dumps(records)), list(range(20)))
    assert records[3].name == "dataset/3"


def test_the_fields_of_records_need_no_names(tmp_path: Path) -> None:
    rows = [{**{k: line.get(k) for k in LINES[0]}, "image": {"bytes": encode(line["file_name"])}}
            for line in LINES]  # fmt: skip
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    records = records_from_dataset(datasets.load_from_disk(str(tmp_path / "saved")))
    assert [replace(record, image=None) for record in records] == RECORDS


def test_images_may_be_files_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    rows = [{"image": "images/red.png", "caption": "a"}]
    (record,) = records_from_dataset(datasets.Dataset.from_list(rows))
    assert record.path == Path("images/red.png")
    texts = datasets.Dataset.from_list([{"caption": "a", "group_id": "1"}])
    (record,) = records_from_dataset(texts, require_images=False)
    assert record.image is None


def number_image(number: int) -> bytes:
    """Make an image that has the same size for every number below 100."""
    return encode("images/red.png") + b"%02d" % number


def make_numbered(count: int = 20) -> datasets.Dataset:
    """Make a dataset whose images differ only in content."""
    rows = {
        "img": [{"bytes": number_image(n), "path": None} for n in range(count)],
        "other": [{"bytes": number_image(50 + n), "path": None} for n in range(count)],
        "texts": [[f"caption {n}"] for n in range(count)],
    }
    dataset = datasets.Dataset.from_dict(rows)
    for name in ("img", "other"):
        dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def is_even(row: dict[str, Any]) -> bool:
    return int(row["texts"][0].split()[1]) % 2 == 0


CHANGES: dict[str, Callable[[datasets.Dataset], datasets.Dataset]] = {
    "part of shuffled rows": lambda rows: rows.shuffle(seed=3).select(range(5, 15)),
    "filter": lambda rows: rows.select(range(3, 19)).filter(is_even),
    "train_test_split": lambda rows: rows.train_test_split(test_size=6, seed=1)["test"],
    "concatenated with order": lambda rows: datasets.concatenate_datasets(
        [rows.select([7, 1]), rows.select(range(12, 17))]
    ),
    "swapped columns": lambda rows: (
        rows.rename_columns({"img": "x", "other": "img"})
        .rename_columns({"x": "other"})
        .select(range(5, 15))
    ),
    "cast": lambda rows: rows.select(range(5, 15)).cast_column("img", datasets.Image()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_caption_keeps_its_image_through_changes_of_the_dataset(
    tmp_path: Path, change: str
) -> None:
    """All images have the same size, so only their rows tell them apart."""
    make_numbered().save_to_disk(str(tmp_path / "saved"), num_shards=2)
    changed = CHANGES[change](datasets.load_from_disk(str(tmp_path / "saved")))
    names = {"image": "img", "captions": "texts"}
    records = records_from_dataset(changed, columns=names)
    raw = changed.cast_column("img", datasets.Image(decode=False))
    expected = [(row["texts"][0], row["img"]["bytes"]) for row in raw]
    assert len(records) == len(expected) > 0
    found = [(record.captions[0], record.image.read_bytes()) for record in records]  # type: ignore[union-attr]
    assert found == expected


def test_a_transform_that_would_not_be_applied_is_refused(saved: datasets.Dataset) -> None:
    changed = saved.with_transform(lambda rows: {**rows, "texts": [["x"]] * len(rows["texts"])})
    with pytest.raises(ValueError, match=r"transform.*dataset\.map.*reset_format"):
        records_from_dataset(changed, columns=COLUMNS)
    require_rows(records_from_dataset(changed.with_format(None), columns=COLUMNS), list(range(20)))


def test_errors_are_reported_at_once(saved: datasets.Dataset) -> None:
    with pytest.raises(ValueError, match=r"unknown field 'label': 20 \(dataset row 0, "):
        records_from_dataset(saved, columns={"image": "img", "captions": "texts", "label": "label"})
    with pytest.raises(ValueError, match=r"Column name .*gone.* not in the dataset"):
        records_from_dataset(saved, columns={"captions": "gone"})
    with pytest.raises(ValueError, match="For an IterableDataset, use stream_dataset"):
        records_from_dataset(saved.to_iterable_dataset(), columns=COLUMNS)
    with pytest.raises(ValueError, match=r"DatasetDict is not a .* pass one split"):
        records_from_dataset(datasets.DatasetDict({"train": saved}))
    with pytest.raises(ValueError, match="For a Dataset, use records_from_dataset"):
        stream_dataset(saved)  # type: ignore[arg-type]


def test_rows_of_img2dataset_without_an_image_are_counted_and_no_name_moves() -> None:
    states = ["failed_to_download", "success", "failed_to_download", "success"]
    notes = {"key": "0", "url": "u", "error_message": None}
    rows = [{**notes, "status": state, "jpg": encode("images/red.png"), "caption": state[0]}
            for state in states]  # fmt: skip
    records = records_from_dataset(datasets.Dataset.from_list(rows))
    assert [record.name for record in records] == ["dataset/1", "dataset/3"]
    assert records.skipped == {"image not downloaded: failed_to_download": 2}
