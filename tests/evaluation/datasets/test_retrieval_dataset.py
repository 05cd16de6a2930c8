"""Captions stay with their images, and every error is reported or counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_datasets import (
    COCO_NAMES,
    captions_of,
    errors_of,
    tiny_spec,
    write_coco_test,
    write_images,
    write_json,
)

from modeling_llm2clip.evaluation.datasets.dataset_registry import (
    load_dataset,
)
from modeling_llm2clip.evaluation.datasets.retrieval_dataset import (
    RetrievalDataset,
)

COCO = tiny_spec("coco", images=3, captions=15)


def rewrite_coco(folder: Path, change: Any) -> None:
    """Let a function change the items of `coco_karpathy_test.json` in place."""
    file = folder / "coco_karpathy_test.json"
    items = json.loads(file.read_text(encoding="utf-8"))
    change(items)
    write_json(file, items)


def spoil_coco(folder: Path) -> None:
    """One error of each kind that a downloaded COCO has had, in six images of seven."""

    def change(items: list[dict[str, Any]]) -> None:
        items[1]["caption"] = captions_of(1, 3)
        items.append({"image": items[2]["image"], "caption": captions_of(7)})
        items.append({"image": "val2014/gone.jpg", "caption": captions_of(8)})
        items.append({"image": "val2014/blank.jpg", "caption": [*captions_of(9, 4), " \n"]})
        items.append({"image": "val2014/none.jpg", "caption": []})
        items.append({"image": "val2014/broken.jpg", "caption": captions_of(10)})
        items.append({"file": "val2014/other.jpg", "caption": captions_of(11)})

    rewrite_coco(folder, change)
    write_images(folder / "val2014", ["blank.jpg", "none.jpg", "broken.jpg"])
    whole = (folder / "val2014" / "broken.jpg").read_bytes()
    (folder / "val2014" / "broken.jpg").write_bytes(whole[: len(whole) // 2])


SKIPPED = {
    "fewer than 5 captions": 1,
    "image repeated": 1,
    "image missing": 1,
    "blank caption": 1,
    "no caption": 1,
    "image unreadable": 1,
    "no name of an image, or captions that are not texts": 1,
}


def test_all_errors_of_a_dataset_are_reported_at_once(tmp_path: Path) -> None:
    folder = write_coco_test(tmp_path)
    spoil_coco(folder)
    wrong = {"wrong number of images": 1, "wrong number of captions": 1}
    assert errors_of(COCO, folder) == {**SKIPPED, **wrong}


def test_skipped_samples_are_counted_and_leave_the_others_in_place(
    tmp_path: Path,
) -> None:
    folder = write_coco_test(tmp_path)
    spoil_coco(folder)
    found = load_dataset(COCO, folder, skip_invalid=True)
    assert isinstance(found, RetrievalDataset)
    assert found.protocol["skipped"] == SKIPPED
    assert found.protocol["skipped_samples"] == 7
    assert found.image_names == (COCO_NAMES[0], COCO_NAMES[2])
    assert found.captions == (*captions_of(0), *captions_of(2))
    assert found.correspondence.image_of_pair.tolist() == [0] * 5 + [1] * 5
    assert (found.protocol["images"], found.protocol["captions"]) == (2, 10)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    missing=st.sets(st.integers(0, 7)), counts=st.lists(st.integers(5, 7), min_size=8, max_size=8)
)
def test_whatever_is_skipped_captions_stay_with_their_image(
    missing: set[int], counts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("coco")
    names = [f"{number}.jpg" for number in range(8)]
    write_images(folder, [name for n, name in enumerate(names) if n not in missing])
    items = [{"image": name, "caption": captions_of(n, counts[n])} for n, name in enumerate(names)]
    write_json(folder / "coco_karpathy_test.json", items)
    spec = tiny_spec("coco", images=8, captions=40)
    if len(missing) == 8:
        with pytest.raises(ValueError, match="no image is left"):
            load_dataset(spec, folder, skip_invalid=True)
        return
    found = load_dataset(spec, folder, skip_invalid=True)
    assert isinstance(found, RetrievalDataset)
    pairs = found.correspondence
    said = {
        (found.image_names[image], found.captions[text])
        for image, text in zip(
            pairs.image_of_pair.tolist(), pairs.text_of_pair.tolist(), strict=True
        )
    }
    kept = [n for n in range(8) if n not in missing]
    assert said == {(names[n], caption) for n in kept for caption in captions_of(n)}
    assert found.protocol["skipped"] == ({"image missing": len(missing)} if missing else {})
    assert "differences_from_published" not in found.protocol


def test_reading_only_captions_needs_no_images(tmp_path: Path) -> None:
    folder = write_coco_test(tmp_path)
    for name in COCO_NAMES:
        (folder / name).unlink()
    assert errors_of(COCO, folder) == {"image missing": 3}
    found = load_dataset(COCO, folder, require_images=False)
    assert isinstance(found, RetrievalDataset)
    assert found.images == ()
    assert [group.captions for group in found.group_captions()] == [
        tuple(captions_of(number)) for number in range(3)
    ]


def test_the_records_of_a_dataset_are_its_images_with_their_captions(tmp_path: Path) -> None:
    folder = write_coco_test(tmp_path)
    found = load_dataset(COCO, folder)
    assert isinstance(found, RetrievalDataset)
    assert [(r.name, r.image, r.captions, r.lang) for r in found.records] == [
        (name, folder / name, tuple(captions_of(number)), "en")
        for number, name in enumerate(COCO_NAMES)
    ]
    # What is loaded from them is the same dataset.
    again = load_dataset(found.records)
    assert isinstance(again, RetrievalDataset)
    assert again.list_content() == found.list_content()
