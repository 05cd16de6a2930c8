"""Files that are complete or absent, locks, hashes."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from modeling_llm2clip.data.atomic_files import (
    hash_file,
    hash_json,
    is_unfinished,
    list_differences,
    lock_file,
    write_atomically,
)


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
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


def test_a_writer_that_is_killed_leaves_the_old_file_and_what_is_known_as_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    write_atomically(file, b"old")

    def die(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    (unfinished,) = [path for path in tmp_path.iterdir() if path != file]
    assert is_unfinished(unfinished)


def test_an_exclusive_lock_keeps_others_out_and_a_shared_one_only_exclusive_ones(
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


def test_hashes_are_those_of_bytes_in_whatever_pieces_and_of_json_in_whatever_order(
    tmp_path: Path,
) -> None:
    file = tmp_path / "file"
    content = bytes(range(256)) * 9000  # more than one piece
    file.write_bytes(content)
    assert hash_file(file) == hashlib.sha256(content).hexdigest()
    assert hash_file(file, "md5") == hashlib.md5(content).hexdigest()
    assert hash_json({"a": [1, 2], "b": {}}) == hash_json({"b": {}, "a": (1, 2)})
    assert hash_json([1, 2]) != hash_json([2, 1])


def test_differences_name_both_values_and_what_only_one_side_has() -> None:
    assert list_differences({"a": 1, "b": 2}, {"b": 3, "c": 4}) == [
        "a: 1 in the store, None now",
        "b: 2 in the store, 3 now",
        "c: None in the store, 4 now",
    ]
    assert list_differences({"a": 1}, {"a": 1}) == []
