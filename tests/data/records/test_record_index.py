"""An index has the records and errors of its source, is reused, and follows its changes."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from captioned_files import write_shards
from interruptions import largest_file
from shard_server import ShardServer

from modeling_llm2clip._extras import MissingExtraError
from modeling_llm2clip.data.records import (
    record_columns,
    record_index,
    record_loading,
    record_table,
)
from modeling_llm2clip.data.records import source_files as source_files_module
from modeling_llm2clip.data.records.record_index import IndexJob
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.record_table import RecordTable, skipped_file
from modeling_llm2clip.data.records.source_files import find_source
from modeling_llm2clip.data.remote import file_locations
from modeling_llm2clip.data.remote.remote_access import AccessError, LostFileError
from modeling_llm2clip.data.remote.remote_files import ChangedFileError
from modeling_llm2clip.data.validation_errors import DataValidationError

# Lines that are split into several parts, with non-ASCII texts.
LINES = [
    *({"file_name": f"{i}.png", "captions": [f"Größe {i}\u2028🙂", "zwei"]} for i in range(50)),
    "\n\n",
    *({"file_name": f"{i}.png", "captions": [f"text {i}"], "lang": "de"} for i in range(20)),
]
BROKEN = [
    {"file_name": "broken.png", "captions": ["a"], "color": "red"},
    "not JSON",
    {"file_name": "3.png", "captions": ["again"]},
    {"file_name": "half.png", "captions": ["\ud83d"]},
]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> Path:
    """Use small parts and batches, an index file from the first record, and an own cache."""
    for module in (record_columns, record_table, record_index):
        monkeypatch.setattr(module, "ROWS_PER_BATCH", 8)
    monkeypatch.setattr(source_files_module, "_BYTES_PER_PART", 700)
    monkeypatch.setattr(record_index, "_MOST_ROWS_IN_MEMORY", 0)
    return own_cache / "records"


def write(folder: Path, lines: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "captions.jsonl").write_text(text, encoding="utf-8")
    return folder


def in_memory(source: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Read the records as one part in this process."""
    with monkeypatch.context() as patch:
        patch.setattr(source_files_module, "_BYTES_PER_PART", 2**24)
        return list(load_records(source, require_images=False, cache=False))


def test_parts_have_every_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "data", LINES)
    found = load_records(source, require_images=False)
    assert found.file is not None
    assert len(find_source(str(source)).split()) > 5
    expected = in_memory(source, monkeypatch)
    assert len(expected) == 70
    assert list(found) == expected
    assert [record.place for record in found] == [record.place for record in expected]


@pytest.mark.slow
def test_several_processes_find_the_records_and_errors_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = write(tmp_path / "a", LINES), write(tmp_path / "b", [*LINES[:30], *BROKEN])
    expected = in_memory(whole, monkeypatch)
    with pytest.raises(DataValidationError) as alone:
        load_records(broken, require_images=False)
    monkeypatch.setattr(record_index, "_LEAST_BYTES_FOR_PROCESSES", 0)
    assert list(load_records(whole, require_images=False, cache=False)) == expected
    with pytest.raises(DataValidationError) as together:
        load_records(broken, require_images=False, cache=False)
    assert alone.value.counts == together.value.counts == {
        "unknown field 'color'": 1, "not JSON": 1, "image and language repeated": 1,
        "a text has a lone surrogate (half a character)": 1,
    }  # fmt: skip
    assert alone.value.places == together.value.places
    assert together.value.places["not JSON"] == ["captions.jsonl line 32"]


@pytest.mark.slow
def test_a_process_that_is_killed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "data", LINES)
    monkeypatch.setattr(record_index, "_LEAST_BYTES_FOR_PROCESSES", 0)
    monkeypatch.setattr(IndexJob, "__reduce__", lambda _: (os.abort, ()))  # as it is received
    with pytest.raises(RuntimeError, match=r"(?s)worker process .*memory.*SIGABRT"):
        load_records(source, require_images=False)


@pytest.mark.slow
def test_a_script_without_a_guard_runs_once(tmp_path: Path) -> None:
    """Processes that run the script again would also start processes."""
    source = write(tmp_path / "data", LINES)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from modeling_llm2clip import load_records\n"
        "from modeling_llm2clip.data.records import record_index, source_files\n"
        "record_index._LEAST_BYTES_FOR_PROCESSES, source_files._BYTES_PER_PART = 0, 700\n"
        "print(len(load_records(sys.argv[1], require_images=False)))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(source)], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("70\n", "")


@pytest.mark.slow
def test_an_error_in_a_process_is_raised_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Access may expire while a large source is read; this is not a crash and has no traceback."""
    write_shards(tmp_path)
    monkeypatch.setattr(record_index, "_LEAST_BYTES_FOR_PROCESSES", 0)
    with ShardServer(tmp_path) as server:
        server.deny_after = 1
        with pytest.raises(AccessError, match=r"tar: access denied .*their expiry") as caught:
            load_records(f"{server.url}/{{00000..00001}}.tar")
    assert "Traceback" not in str(caught.value)


def test_errors_pass_between_processes_unchanged() -> None:
    for error in (
        AccessError("https://host/0.tar: access denied"),
        LostFileError("https://host/0.tar: no such file"),
        ChangedFileError("x", (1, "a"), (1, "b")),
        MissingExtraError("not installed: aiohttp"),
        PermissionError(13, "Permission denied", "/data/0.tar"),
        ValueError("0.json: not JSON"),
        pa.ArrowInvalid("x"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


@pytest.mark.slow
@pytest.mark.parametrize("cache", [True, False])
def test_a_disk_filled_by_processes_is_named_and_no_index_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_parts: Path, cache: bool
) -> None:
    source = write(tmp_path / "data", LINES)
    monkeypatch.setattr(record_index, "_LEAST_BYTES_FOR_PROCESSES", 0)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(record_index, "temporary_folder", lambda: temporary)
    remedy = "XDG_CACHE_HOME" if cache else "TMPDIR"
    with largest_file(2000), pytest.raises(OSError, match=r"No room for the index") as caught:
        load_records(source, require_images=False, cache=cache)
    folder = small_parts if cache else temporary
    assert re.search(rf"File too large.*Free some space.*{remedy}.*: '{folder}'", str(caught.value))
    assert list_indexes(folder) == []


@pytest.mark.slow
def test_processes_need_no_temporary_folder_if_there_is_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "data", LINES)
    monkeypatch.setattr(record_index, "_LEAST_BYTES_FOR_PROCESSES", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    assert len(load_records(source, require_images=False)) == 70
    with pytest.raises(DataValidationError, match="image missing: 70"):
        load_records(source)


def test_a_changed_source_is_read_again_and_an_unused_index_is_removed(
    tmp_path: Path, small_parts: Path
) -> None:
    source = write(tmp_path / "data", LINES)
    old = load_records(source, require_images=False).file
    assert old is not None
    skipped_file(old).write_text("{}", encoding="utf-8")
    os.utime(old, (0, 0))
    load_records(source, require_images=False)  # which opens it
    assert old.stat().st_atime > 0 == old.stat().st_mtime
    state = (source / "captions.jsonl").stat()
    write(source, [*LINES[:-1], {**LINES[-1], "lang": "fr"}])  # type: ignore[dict-item]
    # Of the same size, a nanosecond later.
    os.utime(source / "captions.jsonl", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    for name in ("tmp", "parts"):  # of a process that was killed
        (small_parts / f"{old.stem[:-16]}{16 * '0'}.arrow.1.{name}").mkdir()
    assert load_records(source, require_images=False)[-1].lang == "fr"
    assert {old, skipped_file(old)} < set(small_parts.iterdir())
    os.utime(old, (0, 0))
    write(source, LINES[:3])
    load_records(source, require_images=False)
    assert sorted(file.suffix for file in small_parts.iterdir()) == [".arrow", ".arrow", ".locked"]
    assert not old.exists()


def test_other_options_have_another_index(tmp_path: Path) -> None:
    source = write(tmp_path / "data", [{**line, "x": 1} for line in LINES if line != "\n\n"])  # type: ignore[dict-item]
    load_records(source, require_images=False, ignore_fields=["x"])
    with pytest.raises(DataValidationError, match="unknown field 'x': 70"):
        load_records(source, require_images=False)
    with pytest.raises(DataValidationError, match="image missing: 70"):
        load_records(source, ignore_fields=["x"])


def write_other_schema(file: Path) -> None:
    with pa.ipc.new_file(str(file), pa.schema([("name", pa.string())])) as writer:
        writer.write_table(pa.table({"name": ["a"]}))


def flip_in_caption(file: Path) -> None:
    content = file.read_bytes()
    place = content.index("Größe".encode())
    file.write_bytes(content[:place] + b"g" + content[place + 1 :])


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: os.truncate(file, 0),
    "beginning": lambda file: os.truncate(file, 100),
    "without the last byte": lambda file: os.truncate(file, file.stat().st_size - 1),
    "another caption": flip_in_caption,
    "another schema": write_other_schema,
    "notes that are not JSON": lambda file: skipped_file(file).write_text("{", encoding="utf-8"),
    "deep notes": lambda file: skipped_file(file).write_text("[" * 100_000, encoding="utf-8"),
    "a number as notes": lambda file: skipped_file(file).write_text("1", encoding="utf-8"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    source = write(tmp_path / "data", LINES)
    file = load_records(source, require_images=False).file
    assert file is not None
    DAMAGES[damage](file)
    assert list(load_records(source, require_images=False)) == in_memory(source, monkeypatch)


def test_a_relative_path_from_another_folder_has_another_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, the same path leads to other images."""
    for place in ("a", "b"):
        (tmp_path / place / "data").mkdir(parents=True)
        (tmp_path / place / "data" / "0.png").write_bytes(b"image")
    write(tmp_path / "a" / "data", [{"image": "0.png", "captions": ["x"]}])
    monkeypatch.chdir(tmp_path / "a")
    assert load_records("data")[0].path.resolve() == tmp_path / "a" / "data" / "0.png"
    monkeypatch.chdir(tmp_path / "b")
    assert load_records("../a/data")[0].path.resolve() == tmp_path / "a" / "data" / "0.png"


def test_errors_leave_no_index(
    tmp_path: Path, small_parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "data", [*LINES, *BROKEN])
    with pytest.raises(DataValidationError, match="image missing"):
        load_records(source, check_images=True)  # which looks through the index, too
    assert list_indexes(small_parts) == []

    def die(*_: Any, **__: Any) -> None:
        # A kill at any moment before the index is known to have no errors.
        assert not any(file.suffix == ".arrow" for file in small_parts.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(record_index, "find_repeated", die)
    with pytest.raises(KeyboardInterrupt):
        load_records(source, require_images=False)
    assert list_indexes(small_parts) == []


def list_indexes(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.suffix != ".locked"]


def test_a_cache_that_cannot_be_written_is_named_with_a_remedy(
    tmp_path: Path, own_cache: Path
) -> None:
    own_cache.parent.mkdir()
    own_cache.write_text("a file in its place")
    with pytest.raises(OSError, match=r"XDG_CACHE_HOME.*--no-cache") as caught:
        load_records(write(tmp_path / "data", LINES), require_images=False)
    assert str(own_cache) in str(caught.value)


def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_parts: Path
) -> None:
    def fill(*_: Any, **__: Any) -> Iterator[Any]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record_index.pa.ipc, "new_file", fill)
    with pytest.raises(OSError, match="No room for the index"):
        load_records(write(tmp_path / "data", LINES), require_images=False)
    assert list_indexes(small_parts) == []


def test_unpickling_a_table_maps_its_index_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_locations, "_states", {})
    records = load_records(write(tmp_path / "data", LINES), require_images=False)
    content = pickle.dumps(records.select([3, 1]))
    # Bytes: the path and two numbers, the state of the source, and no text.
    assert len(content) < 2_000
    again: RecordTable = pickle.loads(content)
    assert list(again) == [records[3], records[1]]


IMAGE_LINES = [{"file_name": f"{i}.png", "captions": [f"text {i}"], "id": "x"} for i in range(3)]


def test_without_a_cache_other_options_have_another_index_and_nothing_is_kept(
    tmp_path: Path, small_parts: Path
) -> None:
    """The captions are one file, so only the options differ."""
    captions = write(tmp_path / "data", IMAGE_LINES) / "captions.jsonl"
    options: dict[str, Any] = {"ignore_fields": ["id"], "cache": False}
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        for number in range(3):
            (folder / f"{number}.png").write_bytes(folder.name.encode())
    tables = [load_records(captions, image_dir=folder, **options) for folder in folders]
    texts = load_records(captions, require_images=False, **options)
    assert [record.image for record in texts] == [None] * 3
    for table, folder in zip(tables, folders, strict=True):
        assert table.file is not None and table.file.is_file()
        assert [record.path.parent for record in table] == [folder] * 3
        assert {image.parent for image in table.iterate_images() if image} == {folder}
    assert not small_parts.exists()


def test_two_urls_whose_server_has_no_tags_have_two_indexes(
    tmp_path: Path, small_parts: Path
) -> None:
    """Such files have no known state, so states cannot tell them apart."""
    for name in ("a", "b"):
        lines = [{"group_id": f"{i}", "captions": [f"{name} {i}"]} for i in range(20)]
        (write(tmp_path / name, lines) / "captions.jsonl").rename(tmp_path / f"{name}.jsonl")
    with ShardServer(tmp_path, tags=False) as server:
        one, other = (
            load_records(f"{server.url}/{name}.jsonl", require_images=False) for name in ("a", "b")
        )
        assert [record.captions for record in one] == [(f"a {i}",) for i in range(20)]
        assert [record.captions for record in other] == [(f"b {i}",) for i in range(20)]
    assert not small_parts.exists()


def test_rebuilding_an_index_leaves_one_in_use_unchanged(tmp_path: Path) -> None:
    """Tables keep reading their index file, also in workers that receive its path."""
    source = write(tmp_path / "data", IMAGE_LINES)
    for number in range(3):
        (source / f"{number}.png").write_bytes(b"image")
    first = load_records(source, ignore_fields=["id"])
    before = list(first)
    (source / "1.png").write_bytes(b"a larger image")
    second = load_records(source, ignore_fields=["id"])
    sizes = [table.read_numbers("image_size").tolist() for table in (first, second)]
    assert sizes == [[5, 5, 5], [5, 14, 5]]
    assert load_records(source, ignore_fields=["id"]).file == second.file
    write(source, [{"group_id": "other", "captions": ["other"]}])
    assert len(load_records(source, require_images=False)) == 1
    assert list(first) == before
    assert list(pickle.loads(pickle.dumps(first.select([2, 0])))) == [before[2], before[0]]


def test_memory_does_not_grow_with_an_error(tmp_path: Path) -> None:
    """Records are in a file, with or without errors."""
    lines = [{"file_name": f"{i}.png", "captions": ["x" * 20_000]} for i in range(200)]
    source = write(tmp_path / "data", [*lines, "not JSON"])
    job = record_loading._plan(source, None, False, (), None)
    before = pa.total_allocated_bytes()
    table, errors = record_index.open_index(job)
    assert errors.counts == {"not JSON": 1}
    collected = record_loading.collect_records(source, require_images=False)
    assert len(table) == len(collected.records) == 200
    # The texts alone are 4 MB; a batch of eight is 160 kB, and tables may keep two.
    assert pa.total_allocated_bytes() - before < 400_000
    assert table[199].captions == collected.records[199].captions == ("x" * 20_000,)
