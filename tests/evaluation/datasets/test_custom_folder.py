"""A folder of one's own is read in every language, and its errors are counted once."""

from __future__ import annotations

from pathlib import Path

import pytest
from captioned_files import write_shards
from downloads import write_downloaded_parquet
from failing_disk import make_failing_file
from published_datasets import (
    captions_by_image,
    errors_of,
    load_retrieval,
    write_images,
    write_own_folder,
)

from modeling_llm2clip.data.records import record_index
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.validation_errors import DataValidationError
from modeling_llm2clip.evaluation.datasets.dataset_registry import find_languages, load_dataset
from modeling_llm2clip.evaluation.datasets.dataset_spec import ReadingCache


def append(folder: Path, *lines: str) -> None:
    with (folder / "captions.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def test_images_of_one_group_share_their_captions_each_text_once(tmp_path: Path) -> None:
    dataset = load_retrieval("folder", write_own_folder(tmp_path), lang="en")
    assert captions_by_image(dataset) == {
        "a.jpg": ["a cat", "one cat"],
        "b.jpg": ["a cat", "one cat"],
        "c.jpg": ["a dog"],
    }
    # To a text encoder the two cats are one thing, not two that say the same.
    assert [group.captions for group in dataset.group_captions()] == [
        ("a cat", "one cat"),
        ("a dog",),
    ]
    long = load_retrieval("folder-long", tmp_path, lang="en")
    assert long.captions == ("A cat, seen from afar.", "A cat, seen from near.", "A dog.")


def test_languages_of_a_folder_share_one_reading(tmp_path: Path) -> None:
    folder = write_own_folder(tmp_path)
    cache = ReadingCache()
    assert find_languages("folder", folder, cache=cache) == ("en", "de")
    english = load_retrieval("folder", folder, lang="en", cache=cache)
    # Nothing is left to read or to decode: the files are gone, and German is there.
    for file in folder.iterdir():
        file.unlink()
    german = load_retrieval("folder", folder, lang="de", cache=cache)
    assert german.captions == ("eine Katze", "ein Hund")
    assert german.images == (english.images[0], english.images[2])


def test_a_sample_with_several_errors_is_skipped_once(tmp_path: Path) -> None:
    folder = write_own_folder(tmp_path)
    before = load_retrieval("folder", folder, lang="en").protocol
    assert before["skipped_samples"] == 0
    append(
        folder,
        '{"image": "gone.jpg", "captions": [" "], "lang": "en", "surprise": 1}',
        '{"image": 7, "captions": "none", "surprise": 1}\nno JSON',
        '{"image": "broken.jpg", "captions": [""], "lang": "en"}',
    )
    (folder / "broken.jpg").write_bytes(b"no image")
    protocol = load_retrieval("folder", folder, lang="en", skip_invalid=True).protocol
    assert sum(protocol["skipped"].values()) > 4
    assert protocol["skipped_samples"] == 4
    assert protocol["images"] == before["images"]


def test_a_repeated_image_is_reported_with_its_line(tmp_path: Path) -> None:
    folder = write_own_folder(tmp_path)
    lines = (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "captions.jsonl").write_text("\n".join([*lines, lines[0]]), encoding="utf-8")
    with pytest.raises(DataValidationError) as error:
        load_dataset("folder", folder, lang="en")
    assert error.value.places["image repeated"][0].startswith(
        f"captions.jsonl line {len(lines) + 1}: "
    )
    protocol = load_retrieval("folder", folder, lang="en", skip_invalid=True).protocol
    assert protocol["skipped_samples"] == 1


def test_errors_of_another_language_are_not_skipped_samples_of_this_one(tmp_path: Path) -> None:
    folder = write_own_folder(tmp_path)
    append(
        folder,
        '{"image": "c.jpg", "captions": [], "lang": "fr"}\nno JSON',
        '{"image": "gone.jpg", "captions": ["weg"], "lang": "de"}',
    )
    assert errors_of("folder", folder, lang="en") == {
        "not JSON": 1,
        "no caption": 1,
        "image missing": 1,
    }
    german = load_retrieval("folder", folder, lang="de", skip_invalid=True)
    assert german.protocol["skipped"] == {"not JSON": 1, "image missing": 1}
    assert german.captions == ("eine Katze", "ein Hund")


def test_rows_that_are_no_records_are_counted_in_the_protocol(tmp_path: Path) -> None:
    folder = write_downloaded_parquet(tmp_path / "data")
    protocol = load_dataset("folder", folder, lang="en").protocol
    assert protocol["rows_skipped"] == {"image not downloaded: failed_to_download": 1}
    assert protocol["images"] == 2 and protocol["skipped_samples"] == 0


def test_a_large_folder_is_read_through_its_index_unless_it_has_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_index, "_MOST_ROWS_IN_MEMORY", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_own_folder(tmp_path / "data")
    dataset = load_retrieval("folder", folder, lang="en", skip_invalid=True)
    (index,) = tmp_path.rglob("*.arrow")
    monkeypatch.setattr(record_index, "_build", None)  # it is not built again
    assert load_dataset("folder", folder, lang="en").list_content() == dataset.list_content()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    append(
        folder,
        '{"image": "gone.jpg", "captions": ["a fox"], "lang": "en"}',
        '{"image": "c.jpg", "captions": ["half: \\ud83d"], "lang": "fr"}',
    )
    without = load_retrieval("folder", folder, lang="en", skip_invalid=True)
    assert without.protocol["skipped_samples"] == 2  # of one, not even the language is known
    assert without.list_content() == dataset.list_content() and index.is_file()


def test_a_folder_with_only_broken_lines_is_reported_with_its_lines(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text("{no JSON\n", encoding="utf-8")
    for options in ({}, {"skip_invalid": True}, {"lang": "en"}):
        with pytest.raises(DataValidationError, match=r"not JSON: 1 \(captions\.jsonl line 1\)"):
            load_dataset("folder", tmp_path, **options)


def test_a_record_without_a_long_caption_is_an_error_if_long_ones_are_wanted(
    tmp_path: Path,
) -> None:
    assert errors_of("folder-long", write_own_folder(tmp_path), lang="de") == {"no caption": 2}


def test_an_image_without_captions_and_a_caption_without_image_are_errors(tmp_path: Path) -> None:
    write_images(write_own_folder(tmp_path), ["d.jpg"])
    append(
        tmp_path,
        '\n{"image": "d.jpg", "captions": [], "lang": "en"}',
        '{"group_id": "bird", "captions": ["a bird", "one bird"], "lang": "en"}',
    )
    assert errors_of("folder", tmp_path, lang="en") == {"no caption": 1, "no image": 1}
    write_images(tmp_path, ["a.jpg"])
    records = [
        CaptionedImage(tmp_path / "a.jpg", "a", "a", ("a cat",)),
        CaptionedImage(None, "c", "c", ("a dog",)),
    ]
    with pytest.raises(DataValidationError, match="image missing: 1"):
        load_dataset(records)


def test_what_cannot_be_read_is_not_skipped_as_invalid(tmp_path: Path) -> None:
    """Neither an image nor a shard: a score without them would be of fewer samples."""
    folder = write_own_folder(tmp_path / "images")
    make_failing_file(folder / "a.jpg")
    with pytest.raises(OSError, match=r"a\.jpg: cannot be read"):
        load_dataset("folder", folder, lang="en", skip_invalid=True)
    shards = write_shards(tmp_path / "shards")
    dataset = load_retrieval("folder", shards, lang="en", skip_invalid=True)
    (shards / "00002.tar").write_bytes(b"no tar")
    skipped = load_retrieval("folder", shards, lang="en", skip_invalid=True)
    assert skipped.protocol["skipped_samples"] == 1
    assert skipped.list_content() == dataset.list_content()
    for name in ("00002.tar", "00001.tar"):
        make_failing_file(shards / name)
        with pytest.raises(DataValidationError, match=r"(?s)its disk fails.*Try again"):
            load_dataset("folder", shards, lang="en", skip_invalid=True)
