"""Captions stay with their images, and every error or difference from the published is reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_datasets import (
    COCO_NAMES,
    captions_by_image,
    captions_of,
    errors_of,
    load_retrieval,
    tiny_spec,
    write_coco_test,
    write_iiw,
    write_images,
    write_json,
)

from modeling_llm2clip.data.atomic_files import hash_file
from modeling_llm2clip.data.validation_errors import DataValidationError
from modeling_llm2clip.evaluation.datasets.dataset_registry import load_dataset

COCO = tiny_spec("coco", images=3, captions=15)


def spoil_coco(folder: Path) -> None:
    """One error of each kind that a downloaded COCO has had, in six images of seven."""
    file = folder / "coco_karpathy_test.json"
    items = json.loads(file.read_text(encoding="utf-8"))
    items[1]["caption"] = captions_of(1, 3)
    items.append({"image": items[2]["image"], "caption": captions_of(7)})
    items.append({"image": "val2014/gone.jpg", "caption": captions_of(8)})
    items.append({"image": "val2014/blank.jpg", "caption": [*captions_of(9, 4), " \n"]})
    items.append({"image": "val2014/none.jpg", "caption": []})
    items.append({"image": "val2014/broken.jpg", "caption": captions_of(10)})
    items.append({"file": "val2014/other.jpg", "caption": captions_of(11)})
    write_json(file, items)
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
    "no image name, or captions that are not strings": 1,
}


def test_errors_are_reported_at_once_or_counted_and_leave_the_others_in_place(
    tmp_path: Path,
) -> None:
    folder = write_coco_test(tmp_path)
    spoil_coco(folder)
    wrong = {"wrong number of images": 1, "wrong number of captions": 1}
    assert errors_of(COCO, folder) == {**SKIPPED, **wrong}
    dataset = load_retrieval(COCO, folder, skip_invalid=True)
    assert dataset.protocol["skipped"] == SKIPPED
    assert dataset.protocol["skipped_samples"] == 7
    assert dataset.image_names == (COCO_NAMES[0], COCO_NAMES[2])
    assert dataset.captions == (*captions_of(0), *captions_of(2))
    assert dataset.correspondence.image_of_pair.tolist() == [0] * 5 + [1] * 5
    assert (dataset.protocol["images"], dataset.protocol["captions"]) == (2, 10)


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
        with pytest.raises(ValueError, match="every image has an error"):
            load_dataset(spec, folder, skip_invalid=True)
        return
    dataset = load_retrieval(spec, folder, skip_invalid=True)
    kept = [number for number in range(8) if number not in missing]
    assert captions_by_image(dataset) == {names[number]: captions_of(number) for number in kept}
    assert dataset.protocol["skipped"] == ({"image missing": len(missing)} if missing else {})
    assert "differences_from_published" not in dataset.protocol


def test_reading_only_captions_needs_no_images(tmp_path: Path) -> None:
    folder = write_coco_test(tmp_path)
    for name in COCO_NAMES:
        (folder / name).unlink()
    assert errors_of(COCO, folder) == {"image missing": 3}
    dataset = load_retrieval(COCO, folder, require_images=False)
    assert dataset.images == ()
    assert [group.captions for group in dataset.group_captions()] == [
        tuple(captions_of(number)) for number in range(3)
    ]


def test_the_records_of_a_dataset_are_its_images_with_their_captions(tmp_path: Path) -> None:
    folder = write_coco_test(tmp_path)
    dataset = load_retrieval(COCO, folder)
    assert [(r.name, r.image, r.captions, r.lang) for r in dataset.records] == [
        (name, folder / name, tuple(captions_of(number)), "en")
        for number, name in enumerate(COCO_NAMES)
    ]
    # What is loaded from them is the same dataset.
    again = load_retrieval(dataset.records)
    assert again.list_content() == dataset.list_content()


def test_a_wrong_count_names_both_numbers_or_is_in_the_protocol_if_it_is_accepted(
    tmp_path: Path,
) -> None:
    folder = write_coco_test(tmp_path)
    spec = tiny_spec("coco", images=5000, captions=25000)
    with pytest.raises(DataValidationError) as error:
        load_dataset(spec, folder)
    message = str(error.value)
    assert "wrong number of images: 1 (found 3, published 5000;" in message
    assert "wrong number of captions: 1 (found 15, published 25000;" in message
    assert "skip_invalid" in message
    protocol = load_dataset(spec, folder, skip_invalid=True).protocol
    assert protocol["differences_from_published"] == {"images": -4997, "captions": -24985}
    assert protocol["published"] == {"images": 5000, "captions": 25000}


def test_a_file_with_the_published_checksum_is_reported_as_such(tmp_path: Path) -> None:
    folder = write_coco_test(tmp_path)
    file = folder / "coco_karpathy_test.json"
    # The digest of `md5sum`, of bytes that are known.
    file_of_known_digest = tmp_path / "known"
    file_of_known_digest.write_bytes(b"abc")
    assert hash_file(file_of_known_digest, "md5") == "900150983cd24fb0d6963f7d28e17f72"
    good = replace(COCO, checksums={file.name: f"md5:{hash_file(file, 'md5')}"})
    assert load_dataset(good, folder).protocol["checksums"] == {file.name: "published"}
    bad = replace(COCO, checksums={file.name: "md5:900150983cd24fb0d6963f7d28e17f72"})
    with pytest.raises(ValueError, match=r"not the published one: 1 \(coco_karpathy_test.json"):
        load_dataset(bad, folder)


def test_files_that_differ_from_the_published_ones_are_errors(tmp_path: Path) -> None:
    folder = write_iiw(tmp_path)
    assert errors_of("iiw", folder) == {
        "file is not the published one": 5,
        "wrong number of captions": 1,
        "wrong number of images": 1,
    }
    protocol = load_dataset("iiw", folder, skip_invalid=True).protocol
    assert set(protocol["checksums"].values()) == {"differs"}


def test_a_protocol_can_be_written_as_json_and_names_no_folder_of_this_machine(
    tmp_path: Path,
) -> None:
    protocol = dict(load_dataset(COCO, write_coco_test(tmp_path)).protocol)
    assert str(tmp_path) not in json.dumps(protocol)
    fields = {"dataset", "lang", "split", "source", "images", "captions", "published", "skipped"}
    assert fields <= set(protocol)
