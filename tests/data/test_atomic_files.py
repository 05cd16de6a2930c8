"""Files that are complete or absent, locks, hashes."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from interruptions import largest_file
from safetensors.torch import save_file

from modeling_llm2clip.data.atomic_files import (
    atomic_file,
    explain_full_disk,
    hash_file,
    hash_json,
    is_unfinished,
    lock_file,
    require_new_file,
    require_new_folder,
    write_atomically,
)
from modeling_llm2clip.data.sealed_manifest import list_differences


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for content in (b"first", b"second"):
        write_atomically(file, content)
        assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file] and not is_unfinished(file)
    folder = tmp_path / "taken"
    (folder / "name").mkdir(parents=True)  # a file cannot take the place of a folder
    with pytest.raises(OSError) as caught:
        write_atomically(folder / "name", b"content")
    assert caught.value.errno in (errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST)
    assert [path.name for path in folder.iterdir()] == ["name"]


@pytest.mark.parametrize("has_links", [True, False])
def test_a_new_file_never_replaces_a_concurrent_one_and_is_kept_next_to_it(
    has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new" / "tags.csv"
    if not has_links:
        monkeypatch.setattr(os, "link", Mock(side_effect=PermissionError(errno.EPERM, "no links")))
    with atomic_file(file) as opened:
        opened.write(b"first")
        with pytest.raises(
            FileExistsError, match=r"kept its own version.*tags-.{8}\.csv"
        ) as caught:
            with atomic_file(file) as second:
                second.write(b"second")
                file.write_bytes(b"another's")
        file.unlink()
    assert file.read_bytes() == b"first"
    (kept,) = [path for path in file.parent.iterdir() if path != file]
    assert kept.read_bytes() == b"second" and str(kept) in str(caught.value)


def test_concurrent_writers_of_one_file_each_write_a_complete_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with atomic_file(file, replaces=True) as first:
        first.write(b"the first, which is longer")
        with atomic_file(file, replaces=True) as second:
            first.flush()  # what is not empty could be taken for a killed writer's
            second.write(b"the second")
        assert file.read_bytes() == b"the second"
    assert file.read_bytes() == b"the first, which is longer"
    assert list(tmp_path.iterdir()) == [file]


def test_a_failed_writer_keeps_the_old_file_and_the_next_clears_up_after_a_killed_one(
    tmp_path: Path,
) -> None:
    file = tmp_path / "file"
    write_atomically(file, b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(file, replaces=True) as opened:
        opened.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [file]
    child = os.fork()
    if not child:
        with atomic_file(file, replaces=True) as opened:
            opened.write(b"half")
            opened.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert file.read_bytes() == b"old"
    (unfinished,) = [path for path in tmp_path.iterdir() if path != file]
    assert is_unfinished(unfinished) and unfinished.read_bytes() == b"half"
    theirs = [tmp_path / "file.tmp", tmp_path / "file.old.tmp"]
    for path in theirs:
        path.write_bytes(b"mine")
    write_atomically(file, b"new")
    assert file.read_bytes() == b"new" and not unfinished.exists()
    assert all(path.read_bytes() == b"mine" for path in theirs)


def test_a_name_too_long_for_a_temporary_file_is_refused_before_any_work(tmp_path: Path) -> None:
    """A name of maximum length is written; two-byte letters count twice."""
    longest = tmp_path / ("é" * 107 + ".csv")
    require_new_file(longest)
    with atomic_file(longest) as opened:
        opened.write(b"content")
    require_new_folder(tmp_path / ("m" * 218))
    for require, name in ((require_new_file, f"{longest.name}x"), (require_new_folder, "m" * 300)):
        with pytest.raises(ValueError, match=r"is longer than 218 bytes\. Choose a shorter name"):
            require(tmp_path / name)


@pytest.mark.parametrize("count", [5000, 50])  # torch writes a small file at its end
@pytest.mark.parametrize("save", [torch.save, save_file])
def test_all_ways_to_write_tensors_report_a_full_disk_alike(
    save: Any, count: int, tmp_path: Path
) -> None:
    with largest_file(100), pytest.raises(OSError, match=r"No room for it .*Free some\."):
        with explain_full_disk(tmp_path, "for it", "Free some."):
            save({"a": torch.ones(count)}, tmp_path / "file")
    with pytest.raises(RuntimeError, match="other"), explain_full_disk(tmp_path, "", ""):
        raise RuntimeError("other")


def test_a_full_disk_error_names_the_folder_that_is_full(tmp_path: Path) -> None:
    """Also for a run whose temporary files are elsewhere."""
    run, temporary = tmp_path / "run", tmp_path / "temporary"
    for place, message in ((temporary, "to write file .*Free"), (run / "below", "for it .*Free")):
        with (
            largest_file(1000),
            pytest.raises(OSError, match=f"No room {message}") as caught,
            explain_full_disk(run, "for it", "Free some."),
        ):
            write_atomically(place / "file", bytes(2000))
        assert caught.value.filename == str(temporary if place == temporary else run)


def test_an_exclusive_lock_excludes_all_others_and_a_shared_one_only_exclusive_ones(
    tmp_path: Path,
) -> None:
    file = tmp_path / "lock"
    # Locks belong to what was opened, so two openings of one process are two holders.
    with file.open("ab") as one, file.open("ab") as other:
        assert lock_file(one)
        assert not lock_file(other, wait=False)
        assert not lock_file(other, shared=True, wait=False)
    with file.open("ab") as one, file.open("ab") as other, file.open("ab") as third:
        assert lock_file(one, shared=True) and lock_file(other, shared=True, wait=False)
        assert not lock_file(third, wait=False)


def test_hashes_do_not_depend_on_chunks_of_bytes_or_the_order_of_json_keys(tmp_path: Path) -> None:
    file = tmp_path / "file"
    content = bytes(range(256)) * 9000  # more than one piece
    file.write_bytes(content)
    assert hash_file(file) == hashlib.sha256(content).hexdigest()
    assert hash_file(file, "md5") == hashlib.md5(content).hexdigest()
    assert hash_json({"a": [1, 2], "b": {}}) == hash_json({"b": {}, "a": (1, 2)})
    assert hash_json([1, 2]) != hash_json([2, 1])


def test_differences_list_both_values_and_entries_of_only_one_side() -> None:
    assert list_differences({"a": 1, "b": 2}, {"b": 3, "c": 4}) == [
        "a: 1 in the store, None now",
        "b: 2 in the store, 3 now",
        "c: None in the store, 4 now",
    ]
    assert list_differences({"a": 1}, {"a": 1}) == []
