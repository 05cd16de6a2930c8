"""Questions of a compositional dataset are whole, or reported and counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from published_datasets import (
    errors_of,
    tiny_spec,
    write_json,
    write_sugarcrepe,
)

from modeling_llm2clip.data.validation_errors import DataValidationError
from modeling_llm2clip.evaluation.datasets.choice_dataset import ChoiceDataset, ChoiceItem
from modeling_llm2clip.evaluation.datasets.dataset_registry import find_dataset, load_dataset


def test_errors_of_choices_are_reported_at_once_or_skipped(tmp_path: Path) -> None:
    folder = write_sugarcrepe(tmp_path)
    same = {"filename": "000000000139.jpg", "caption": "same. ", "negative_caption": "same."}
    gone = {"filename": "gone.jpg", "caption": "one", "negative_caption": "two"}
    write_json(folder / "data" / "add_att.json", {"0": same, "1": gone, "2": {"caption": "one"}})
    spec = tiny_spec("sugarcrepe", items=8)
    wanted = {
        "no 'filename', 'caption' and 'negative_caption'": 1,
        "the two captions are the same": 1,
        "image missing": 1,
    }
    options = {"image_dir": folder / "val2017"}
    assert errors_of(spec, folder, **options) == wanted
    found = load_dataset(spec, folder, skip_invalid=True, **options)
    assert isinstance(found, ChoiceDataset)
    assert (len(found.items), found.protocol["skipped"]) == (6, wanted)
    assert found.protocol["skipped_samples"] == 3


def test_items_of_one_name_are_an_error_because_embeddings_are_stored_by_name() -> None:
    items = [ChoiceItem("0", "all", ("one", text), anchor="uno") for text in ("two", "three")]
    spec = replace(
        find_dataset("sugarcrepe-text"), counts={}, origin="package", read=lambda _: iter(items)
    )
    with pytest.raises(DataValidationError) as error:
        load_dataset(spec)
    assert error.value.counts == {"item repeated": 1}
    found = load_dataset(spec, skip_invalid=True)
    assert isinstance(found, ChoiceDataset)
    assert [item.captions[1] for item in found.items] == ["two"]


def test_choices_with_images_cannot_be_read_without_them(tmp_path: Path) -> None:
    folder = write_sugarcrepe(tmp_path)
    with pytest.raises(ValueError, match="sugarcrepe-text"):
        load_dataset(tiny_spec("sugarcrepe", items=7), folder, require_images=False)
