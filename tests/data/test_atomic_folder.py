"""A written folder is complete or absent; the next writer clears what a killed one left."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import largest_file
from killed_writers import leave_unfinished, living_writer
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from modeling_llm2clip.data.atomic_files import atomic_folder, clear_leftovers, require_new_folder


def write(folder: Path) -> None:
    with atomic_folder(folder) as unfinished:
        (unfinished / "model.safetensors").write_bytes(b"whole")


def write_text(content: Any, file: Path) -> None:
    file.write_text(str(content) * 100)


def copy_file(_: Any, file: Path) -> None:
    shutil.copy2(__file__, file)


def save_tokenizer(content: Any, file: Path) -> None:
    """Raises an error without a class of its own."""
    vocabulary = {f"{content} {number}": number for number in range(100)}
    Tokenizer(WordLevel(vocabulary, unk_token="?")).save(str(file))


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "model") as unfinished:
        (unfinished / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("save", [save_file, write_text, copy_file, save_tokenizer])
def test_a_full_disk_error_names_the_folder_and_the_remedy(
    save: Callable[[Any, Path], object], tmp_path: Path
) -> None:
    with (
        largest_file(1000),
        pytest.raises(OSError, match=r"No room to write model .*Free some space") as caught,
        atomic_folder(tmp_path / "model") as unfinished,
    ):
        save({"a": torch.ones(5000)}, unfinished / "file")
    assert str(tmp_path) in str(caught.value) and list(tmp_path.iterdir()) == []


def test_the_next_writer_clears_what_a_killed_one_left_and_leaves_only_its_folder(
    tmp_path: Path,
) -> None:
    leave_unfinished(tmp_path / "model")
    write(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.safetensors"]


def test_a_folder_that_a_live_process_is_writing_is_refused_and_untouched(tmp_path: Path) -> None:
    with living_writer(tmp_path / "model") as hidden:
        for refuse in (clear_leftovers, require_new_folder, write):
            with pytest.raises(FileExistsError, match="is being written by another process"):
                refuse(tmp_path / "model")
        assert (hidden / "model" / "model.safetensors").read_bytes() == b"half"
        write(tmp_path / "model-2")
    clear_leftovers(tmp_path / "model")
    assert not hidden.exists()


def test_of_two_writers_that_start_together_the_second_to_finish_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        with atomic_folder(tmp_path / "model") as unfinished:
            (unfinished / "model.safetensors").write_bytes(b"mine")
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "model.safetensors").write_bytes(b"another's")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == b"another's"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_folder_is_synced_before_it_is_renamed_and_follows_the_umask(
    umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, synced = tmp_path / "model", {}
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced[os.fstat(descriptor).st_ino] = model.exists()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    before = os.umask(umask)
    try:
        with atomic_folder(model) as unfinished:
            save_file({"a": torch.ones(1)}, unfinished / "model.safetensors")
            (unfinished / "onnx").mkdir()
            (unfinished / "onnx" / "config.json").write_text("{}")
            (unfinished / "convert.sh").write_text("#!/bin/sh")
            (unfinished / "convert.sh").chmod(0o755)
    finally:
        os.umask(before)
    for path in (model, *model.rglob("*")):
        assert synced[path.stat().st_ino] is False  # while the name was not there
        all_bits = 0o777 if path.is_dir() or path.suffix == ".sh" else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == all_bits & ~umask, path
    assert synced[tmp_path.stat().st_ino] is True


def test_only_folders_claimed_for_the_same_target_are_cleared(tmp_path: Path) -> None:
    sibling = leave_unfinished(tmp_path / "model-2")
    elsewhere = leave_unfinished(tmp_path / "elsewhere" / "model")
    (tmp_path / ".model-of-mine").mkdir()
    (tmp_path / ".model-of-mine" / "notes.txt").write_text("mine")
    just_begun = Path(shutil.copytree(elsewhere, tmp_path / ".model-justbegn"))
    (just_begun / ".llm2clip-is-writing").write_text("")  # its lock is not yet taken
    (tmp_path / ".model-linked12").symlink_to(elsewhere)
    before = sorted(tmp_path.rglob("*"))
    clear_leftovers(tmp_path / "model")
    assert sorted(tmp_path.rglob("*")) == before
    clear_leftovers(tmp_path / "model-2")
    assert not sibling.exists() and elsewhere.exists()


def test_a_name_with_glob_characters_is_matched_literally(tmp_path: Path) -> None:
    left, other = leave_unfinished(tmp_path / "model[1]"), leave_unfinished(tmp_path / "model1")
    clear_leftovers(tmp_path / "model[1]")
    assert not left.exists() and other.exists()


@pytest.mark.parametrize("name", ["link", "dangling", "."])
def test_a_folder_that_cannot_be_replaced_is_refused_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "link").symlink_to(place)
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    monkeypatch.chdir(place if name == "." else tmp_path)
    with pytest.raises(FileExistsError, match=r"link, a mount or the current folder.*Choose a fol"):
        require_new_folder(Path(name))
    require_new_folder(Path(name), is_renamed=False)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["dangling", "link", "place"]
