"""What is left out of a folder of images is counted and named."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from modeling_llm2clip.search.image_files import list_images, records_from_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "below").mkdir(parents=True)
    for name in ("images/b.png", "images/below/a.png", "other.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path / "images"


def test_links_to_files_are_images_and_other_links_are_left_out_and_named(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder.parent / "other.png")
    (folder / "gone.png").symlink_to(folder.parent / "gone.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "unmounted").symlink_to(folder.parent / "no-disk")
    (folder / "notes.txt").symlink_to(folder.parent / "gone.txt")  # no image, if it were there
    (folder / "linked").symlink_to(folder / "below")
    (folder / "below" / "up").symlink_to(folder)
    found = list_images(folder)
    assert found.readable == [folder / "b.png", folder / "below" / "a.png", folder / "link.png"]
    assert list(found.skipped.values()) == [
        [],
        [folder / "gone.png", folder / "loop.png", folder / "unmounted"],
        [folder / "below" / "up", folder / "linked"],
        [],
    ]
    lines = found.describe_skipped().splitlines()
    assert lines[0].startswith("Skipped 3 symbolic links to no file: ")
    assert str(folder / "gone.png") in lines[0]
    assert lines[1].startswith("Skipped 2 symbolic links to a folder, not followed: ")
    reports: list[str] = []
    assert len(records_from_images(folder, report=reports.append)) == 3
    assert reports == [found.describe_skipped()]


def test_folders_that_cannot_be_listed_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, scandir = folder / "below", os.scandir

    def refuse(path: str) -> object:  # in place of permissions, which do not bind root
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = list_images(folder)
    assert found.readable == [folder / "b.png"]
    assert f"Skipped 1 folder that cannot be listed: {closed}." in found.describe_skipped()


def test_a_folder_of_nothing_but_links_says_so(folder: Path) -> None:
    (folder.parent / "links").mkdir()
    (folder.parent / "links" / "images").symlink_to(folder)
    with pytest.raises(ValueError, match=r"no image in it .* 1 symbolic link to a folder"):
        list_images(folder.parent / "links")


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_no_image_is_left_out_unnamed(
    number: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Path.is_file` of Python 3.14 is False, whatever keeps it from looking."""
    stat = Path.stat

    def fail(path: Path, **options: Any) -> os.stat_result:
        if path.name == "b.png":
            raise OSError(number, os.strerror(number), str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", fail)
    monkeypatch.setattr(Path, "is_file", os.path.isfile)
    if number == errno.EIO:
        with pytest.raises(OSError, match=r"the disk or server failed.*b\.png"):
            list_images(folder)
    else:  # who reads it names it
        assert folder / "b.png" in list_images(folder).readable
