"""ShareGPT4V, Urban1k, DOCCI and ImageInWords are read as their publishers ship them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from published_datasets import (
    captions_by_image,
    errors_of,
    read_retrieval,
    tiny_spec,
    write_docci,
    write_iiw,
    write_images,
    write_sharegpt4v,
    write_urban1k,
)

from modeling_llm2clip.evaluation.datasets.caption_readers import JsonCaptions
from modeling_llm2clip.evaluation.datasets.dataset_registry import (
    find_dataset,
    load_dataset,
)
from modeling_llm2clip.evaluation.datasets.retrieval_dataset import RetrievalDataset


def test_the_first_line_of_an_urban1k_file_is_the_caption_and_longer_files_are_counted(
    tmp_path: Path,
) -> None:
    found = read_retrieval(
        "urban1k", write_urban1k(tmp_path / "Urban1k"), {"images": 10, "captions": 10}
    )
    assert found.captions == tuple(f"Street {number}." for number in range(1, 11))
    assert found.image_names == tuple(f"{number}.jpg" for number in range(1, 11))
    assert found.protocol["captions_truncated_to_first_line"] == 1


def test_an_urban1k_image_without_its_caption_is_an_error_and_vice_versa(tmp_path: Path) -> None:
    folder = write_urban1k(tmp_path / "Urban1k")
    (folder / "caption" / "3.txt").unlink()
    (folder / "image" / "4.jpg").unlink()
    (folder / "caption" / "5.txt").write_text("\nSecond line only.", encoding="utf-8")
    spec = tiny_spec("urban1k", images=10, captions=9)
    wanted = {"no caption": 1, "image missing": 1, "blank caption": 1}
    assert errors_of(spec, folder) == wanted
    found = load_dataset(spec, folder, skip_invalid=True)
    assert isinstance(found, RetrievalDataset)
    assert found.image_names == tuple(f"{n}.jpg" for n in (1, 2, 6, 7, 8, 9, 10))
    assert found.protocol["skipped"] == wanted
    (folder / "caption" / "6.txt").write_bytes("Straße".encode("latin-1"))
    with pytest.raises(ValueError, match=r"6\.txt: cannot be read as text .*Download it again"):
        load_dataset(spec, folder, skip_invalid=True)


def test_two_urban1k_images_of_one_name_are_an_error(tmp_path: Path) -> None:
    folder = write_urban1k(tmp_path / "Urban1k")
    write_images(folder / "image", ["3.png"])
    assert errors_of(tiny_spec("urban1k"), folder) == {"image repeated": 1}


def test_only_the_wanted_records_of_sharegpt4v_are_read(tmp_path: Path) -> None:
    # What follows the third record is broken, which a reader of the whole file would meet.
    folder = write_sharegpt4v(tmp_path / "sharegpt4v", records=3)
    assert find_dataset("sharegpt4v-1k").protocol["split"] == "first 1000 records"
    spec = tiny_spec("sharegpt4v-1k", images=3, captions=3)
    assert isinstance(spec.read, JsonCaptions)
    spec = replace(spec, read=replace(spec.read, first=3))
    found = load_dataset(spec, folder)
    assert isinstance(found, RetrievalDataset)
    assert found.captions == tuple(f"A long answer. It is number {n}." for n in range(3))


def test_a_truncated_list_of_sharegpt4v_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a JSON list, or truncated"):
        load_dataset("sharegpt4v-1k", write_sharegpt4v(tmp_path, records=3))


def test_only_the_test_split_of_docci_is_read(tmp_path: Path) -> None:
    found = read_retrieval("docci", write_docci(tmp_path), {"images": 2, "captions": 2})
    assert captions_by_image(found) == {
        "test_00000.jpg": ["test_00000."],
        "test_00001.jpg": ["test_00001."],
    }


def test_lines_of_docci_that_are_not_records_are_errors(tmp_path: Path) -> None:
    folder = write_docci(tmp_path)
    with (folder / "docci_descriptions.jsonlines").open("a", encoding="utf-8") as lines:
        lines.write('{"split": "test", "image_file": "test_00000.jpg"}\n{"split": "tes\n')
    spec = tiny_spec("docci", images=2, captions=2)
    wanted = {"no 'split', 'image_file' and 'description'": 1, "not JSON": 1}
    assert errors_of(spec, folder) == wanted
    assert load_dataset(spec, folder, skip_invalid=True).protocol["skipped"] == wanted


def test_imageinwords_are_texts_of_which_pairs_can_be_selected(tmp_path: Path) -> None:
    folder = write_iiw(tmp_path)
    everything = read_retrieval("iiw", folder, {"images": 6, "captions": 8})
    assert everything.images == ()
    assert [len(group.captions) for group in everything.group_captions()] == [2, 1, 2, 1, 1, 1]
    pairs = read_retrieval("iiw-pairs", folder, {"images": 2, "captions": 4})
    assert [group.captions for group in pairs.group_captions()] == [
        ("Long one.", "Made one."),
        ("Long three.", "Short three."),
    ]
    by_people = read_retrieval(
        "iiw-400", folder, {"images": 2, "captions": 2}, image_dir=folder / "aar"
    )
    assert by_people.captions == ("Long one.", "Long two.")
