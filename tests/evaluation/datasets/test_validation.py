"""Counts and checksums are compared with the published ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from published_datasets import (
    errors_of,
    tiny_spec,
    write_coco_test,
    write_iiw,
)

from modeling_llm2clip.data.atomic_files import hash_file
from modeling_llm2clip.data.validation_errors import DataValidationError
from modeling_llm2clip.evaluation.datasets.dataset_registry import (
    load_dataset,
)


def test_a_wrong_count_names_both_numbers_and_what_to_do(tmp_path: Path) -> None:
    folder = write_coco_test(tmp_path)
    with pytest.raises(DataValidationError) as error:
        load_dataset(tiny_spec("coco", images=5000, captions=25000), folder)
    message = str(error.value)
    assert "wrong number of images: 1 (found 3, published 5000;" in message
    assert "wrong number of captions: 1 (found 15, published 25000;" in message
    assert "skip_invalid" in message


def test_a_wrong_count_that_is_accepted_is_in_the_protocol(tmp_path: Path) -> None:
    folder = write_coco_test(tmp_path)
    spec = tiny_spec("coco", images=5000, captions=25000)
    found = load_dataset(spec, folder, skip_invalid=True)
    assert found.protocol["differences_from_published"] == {"images": -4997, "captions": -24985}
    assert found.protocol["published"] == {"images": 5000, "captions": 25000}


def test_a_file_with_the_published_checksum_is_reported_as_such(tmp_path: Path) -> None:
    folder = write_coco_test(tmp_path)
    file = folder / "coco_karpathy_test.json"
    # The digest of `md5sum`, of bytes that are known.
    file_of_known_digest = tmp_path / "known"
    file_of_known_digest.write_bytes(b"abc")
    assert hash_file(file_of_known_digest, "md5") == "900150983cd24fb0d6963f7d28e17f72"
    spec = tiny_spec("coco", images=3, captions=15)
    good = replace(spec, checksums={file.name: f"md5:{hash_file(file, 'md5')}"})
    assert load_dataset(good, folder).protocol["checksums"] == {file.name: "published"}
    bad = replace(spec, checksums={file.name: "md5:900150983cd24fb0d6963f7d28e17f72"})
    with pytest.raises(ValueError, match=r"not the published one: 1 \(coco_karpathy_test.json"):
        load_dataset(bad, folder)


def test_a_file_that_differs_from_the_published_one_is_an_error(tmp_path: Path) -> None:
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
    found = load_dataset(tiny_spec("coco", images=3, captions=15), write_coco_test(tmp_path))
    assert str(tmp_path) not in json.dumps(dict(found.protocol))
    wanted = {"dataset", "lang", "split", "source", "images", "captions", "published", "skipped"}
    assert wanted <= set(found.protocol)
