"""Decoding images before a stage begins: each once, shared by processes and runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from modeling_llm2clip import DataValidationError, load_records
from modeling_llm2clip.data.records import record_index, record_loading
from modeling_llm2clip.data.records.record_loading import decode_images
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.validation_errors import ErrorCollector


def write_images(folder: Path, count: int, broken: Iterable[int] = ()) -> Path:
    """Write two records per image, in two languages."""
    folder.mkdir()
    lines = []
    for number in range(count):
        name = f"{number}.png"
        Image.new("RGB", (4, 4), (number, 90, 10)).save(folder / name)
        lines += [
            f'{{"image": "{name}", "caption": "x", "lang": "{lang}"}}' for lang in ("en", "de")
        ]
    for number in broken:
        (folder / f"{number}.png").write_bytes(b"not an image")
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def find_broken(records: RecordTable) -> list[str]:
    errors = ErrorCollector()
    decode_images(records, errors)
    with pytest.raises(DataValidationError) as raised:
        errors.raise_if_any("data")
    (places,) = raised.value.places.values()
    return [Path(place.partition(":")[0]).name for place in places]


@pytest.fixture
def decoded(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the names of decoded images; even small tables get an index file."""
    assert not own_cache.exists()
    names: list[str] = []
    find = record_loading.find_unreadable_images

    def note(images: Iterable[Path], *, show_progress: bool) -> dict[Path, str]:
        taken = list(images)
        names.extend(path.name for path in taken)
        return find(taken, show_progress=show_progress)

    monkeypatch.setattr(record_index, "_MOST_ROWS_IN_MEMORY", 1)
    monkeypatch.setattr(record_loading, "find_unreadable_images", note)
    return names


def test_the_processes_of_a_machine_share_the_work_and_miss_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = load_records(write_images(tmp_path / "data", 7, broken=range(7)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    parts = []
    for process in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(process))
        parts.append(find_broken(records))
    assert max(map(len, parts)) == 3  # one of them is shared by records of two parts
    assert {name for part in parts for name in part} == {f"{number}.png" for number in range(7)}


def test_images_of_a_cached_index_are_checked_once(tmp_path: Path, decoded: list[str]) -> None:
    data = write_images(tmp_path / "data", 3)
    load_records(data)
    assert not decoded
    for _ in range(2):
        load_records(data, check_images=True)
        assert decoded == ["0.png", "1.png", "2.png"]
    with (data / "captions.jsonl").open("a", encoding="utf-8") as file:
        file.write('\n{"image": "2.png", "caption": "x", "lang": "fr"}')
    load_records(data, check_images=True)
    assert len(decoded) == 6


def test_a_changed_image_and_one_with_an_error_are_checked_again(
    tmp_path: Path, decoded: list[str]
) -> None:
    data = write_images(tmp_path / "data", 3)
    load_records(data, check_images=True)
    (data / "1.png").write_bytes(b"not an image")
    for count in (6, 9):
        with pytest.raises(DataValidationError, match=r"1\.png"):
            load_records(data, check_images=True)
        assert len(decoded) == count


def test_a_check_by_one_process_does_not_cover_the_other_parts(
    tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_images(tmp_path / "data", 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for process in ("0", "1", "0", "1"):
        monkeypatch.setenv("LOCAL_RANK", process)
        load_records(data, check_images=True)
    assert len(decoded) == 4
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    load_records(data, check_images=True)
    assert len(decoded) == 8


def test_a_read_only_cache_is_enough(tmp_path: Path, decoded: list[str]) -> None:
    """The note of a check only saves later runs work."""
    data = write_images(tmp_path / "data", 3)
    file = load_records(data).file
    assert file is not None
    index = file.rename(tmp_path / "index.arrow")
    note = index.with_suffix(".checked-0-of-1")
    note.mkdir()  # cannot be written, not even by root
    errors = ErrorCollector()
    decode_images(RecordTable.open(index), errors)
    assert not errors.total
    assert decoded == ["0.png", "1.png", "2.png"]
