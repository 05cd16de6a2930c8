"""A written folder is whole or not there, and the next writer clears what a killed one left."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from killed_writers import leave_unfinished, living_writer

from modeling_llm2clip.data.atomic_files import atomic_folder, clear_leftovers


def write(folder: Path) -> None:
    with atomic_folder(folder) as unfinished:
        (unfinished / "model.safetensors").write_bytes(b"whole")


def test_a_finished_folder_holds_what_was_written_and_nothing_is_left_beside_it(
    tmp_path: Path,
) -> None:
    write(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.safetensors"]


def test_a_writing_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "model") as unfinished:
        (unfinished / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    leave_unfinished(tmp_path / "model")
    write(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    with living_writer(tmp_path / "model") as hidden:
        clear_leftovers(tmp_path / "model")
        write(tmp_path / "model")
        assert (hidden / "model" / "model.safetensors").read_bytes() == b"half"
    clear_leftovers(tmp_path / "model")
    assert not hidden.exists()


def test_only_folders_that_were_claimed_for_the_same_target_are_cleared(tmp_path: Path) -> None:
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


def test_a_name_with_the_signs_of_a_pattern_means_itself(tmp_path: Path) -> None:
    left, other = leave_unfinished(tmp_path / "model[1]"), leave_unfinished(tmp_path / "model1")
    clear_leftovers(tmp_path / "model[1]")
    assert not left.exists() and other.exists()
