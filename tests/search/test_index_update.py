"""What an update of an index encodes, keeps, removes, reports; and what a killed one leaves."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from failing_disk import make_failing_file
from indexes import build, save_images, save_model
from PIL import Image
from tiny import draw_noise

from modeling_llm2clip.search import index_update
from modeling_llm2clip.search.image_index import ImageIndex
from modeling_llm2clip.search.index_database import IndexDatabase

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return save_images(tmp_path / "images", count=6)


def list_rows(path: Path) -> dict[str, Any]:
    """Path to everything else in its row."""
    parts = IndexDatabase.open(path).iterate(["path", "sha256", "width", "height", "embedding"])
    return {row.pop("path"): row for part in parts for row in part.to_pylist()}


@contextmanager
def encoding_counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect the names of the images that the model is run on."""
    encoded: list[str] = []
    real = index_update.encode_readable_images

    def note(*args: Any, **options: Any) -> Any:
        read = real(*args, **options)
        encoded.extend(path.name for path in read.paths)
        return read

    with monkeypatch.context() as patch:
        patch.setattr(index_update, "encode_readable_images", note)
        yield encoded


def test_only_what_is_new_is_encoded_and_what_is_gone_is_removed(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "index"
    assert (
        "6 images: 6 new, 0 changed, 0 unchanged; 0 removed. Encoded 6."
        in build(model, images, path)[1]
    )
    before = list_rows(path)
    (images / "1.png").rename(images / "other name.png")
    shutil.copy(images / "3.png", images / "copy of 3.png")
    (images / "below" / "0.JPG").unlink()
    draw_noise(33, 22, seed=77).save(images / "5.png")
    draw_noise(seed=78).save(images / "new.png")
    os.utime(images / "below" / "2.JPG", (1, 1))  # touched
    with encoding_counted(monkeypatch) as encoded:
        _, report = build(model, images, path)
    assert sorted(encoded) == ["5.png", "new.png"]
    assert "7 images: 3 new, 1 changed, 3 unchanged; 2 removed. Encoded 2." in report
    after = list_rows(path)
    assert after["other name.png"] == before["1.png"]
    assert after["copy of 3.png"] == after["3.png"] == before["3.png"]
    assert after["below/2.JPG"] == before["below/2.JPG"]
    assert (after["5.png"]["width"], after["5.png"]["height"]) == (22, 33)
    assert after["5.png"]["embedding"] != before["5.png"]["embedding"]
    shutil.rmtree(path)
    build(model, images, path)
    fresh = list_rows(path)
    assert set(fresh) == set(after)
    for name, row in fresh.items():  # batches of other sizes round differently
        assert row["sha256"] == after[name]["sha256"]
        assert row["embedding"] == pytest.approx(after[name]["embedding"], abs=1e-5)


def test_a_folder_without_changes_is_neither_read_nor_encoded(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(model, images, tmp_path / "index")
    monkeypatch.setattr(index_update, "encode_readable_images", None)
    _, report = build(model, images, tmp_path / "index")
    assert "6 images: 0 new, 0 changed, 6 unchanged; 0 removed. Encoded 0." in report


def test_a_file_of_the_same_size_and_time_is_noticed_to_have_changed(
    model: Path, images: Path, tmp_path: Path
) -> None:
    file = images / "1.bmp"
    Image.new("RGB", (8, 8), "red").save(file)
    build(model, images, tmp_path / "index")
    before, stat = list_rows(tmp_path / "index")["1.bmp"], file.stat()
    Image.new("RGB", (8, 8), "blue").save(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "1 changed" in build(model, images, tmp_path / "index")[1]
    assert list_rows(tmp_path / "index")["1.bmp"]["sha256"] != before["sha256"]


def test_broken_images_are_counted_named_and_left_out(
    model: Path, images: Path, tmp_path: Path
) -> None:
    (images / "broken.png").write_bytes(b"no image")
    (images / "half.png").write_bytes((images / "1.png").read_bytes()[:-500])
    (images / "again.png").write_bytes(b"no image")
    index, report = build(model, images, tmp_path / "index")
    assert "Not in the index: 3 unreadable images:" in report
    for name in ("broken.png: not an image", "half.png: the image is trunc", "again.png: not an"):
        assert name in report
    assert len(index) == 6
    assert "3 unreadable images" in build(model, images, tmp_path / "index")[1]  # each time
    (images / "3.png").write_bytes(b"broken since")
    _, report = build(model, images, tmp_path / "index")
    assert "5 unchanged; 1 removed" in report and "4 unreadable images" in report
    with pytest.warns(UserWarning, match="4 unreadable images"):
        ImageIndex.build(model, images, tmp_path / "index")


def test_where_no_image_can_be_read_nothing_is_removed(
    model: Path, images: Path, tmp_path: Path
) -> None:
    build(model, images, tmp_path / "index")
    for path in images.rglob("*"):
        if path.is_file():
            path.write_bytes(b"a broken disk")
    with pytest.raises(ValueError, match=r"6 unreadable images.*\n"):
        build(model, images, tmp_path / "index")
    assert len(list_rows(tmp_path / "index")) == 6
    shutil.rmtree(images)
    images.mkdir()
    with pytest.raises(ValueError, match="no image in it or below it"):
        build(model, images, tmp_path / "index")
    assert len(list_rows(tmp_path / "index")) == 6


def test_a_file_that_may_not_be_read_is_named_like_a_broken_one(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "1.png":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    index, report = build(model, images, tmp_path / "index")
    assert len(index) == 5 and "1.png: cannot be read ([Errno 13] Permission denied" in report


def test_names_of_files_are_kept_whatever_they_are(
    model: Path, images: Path, tmp_path: Path
) -> None:
    names = ["it's.png", 'a "b".png', "ü %20.png", "100%_of.png"]
    for number, name in enumerate(names):
        draw_noise(seed=50 + number).save(images / name)
    other = os.fsdecode(b"\xff.png")
    draw_noise(seed=60).save(images / other)
    index, report = build(model, images, tmp_path / "index")
    assert set(names) <= set(list_rows(tmp_path / "index"))
    assert "its name is not Unicode. Rename it." in report and len(index) == 10
    for name in names:
        (images / name).unlink()
    assert "4 removed" in build(model, images, tmp_path / "index")[1]


def test_another_folder_does_not_replace_the_images_of_an_index(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(model, images, tmp_path / "index")
    other = save_images(tmp_path / "other", count=2)
    with pytest.raises(ValueError, match=r"is the index of .*images, and would lose those images"):
        build(model, other, tmp_path / "index")
    moved = images.rename(tmp_path / "moved")
    with encoding_counted(monkeypatch) as encoded:
        index, _ = build(model, moved, tmp_path / "index")
    assert encoded == [] and len(index) == 6
    assert ImageIndex.open(tmp_path / "index").search("a dog").hits[0][0].exists()


def test_another_model_does_not_write_into_an_index(
    model: Path, images: Path, tmp_path: Path
) -> None:
    build(model, images, tmp_path / "index")
    other = save_model(tmp_path / "other", vision="vit")
    with pytest.raises(ValueError, match=rf"index of the model {model}, and {other} gives other"):
        build(other, images, tmp_path / "index")


def test_two_processes_do_not_write_one_index(model: Path, images: Path, tmp_path: Path) -> None:
    build(model, images, tmp_path / "index")
    with IndexDatabase.open(tmp_path / "index").writing():
        with pytest.raises(ValueError, match="Another process is writing"):
            build(model, images, tmp_path / "index")


def test_a_stopped_update_has_kept_what_it_committed_and_is_continued(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_update, "_COMMITTED_AT_ONCE", 2)
    real, calls = index_update.encode_readable_images, itertools.count(1)

    def stop_at_the_third(*args: Any, **options: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(index_update, "encode_readable_images", stop_at_the_third)
        build(model, images, tmp_path / "index")
    about = IndexDatabase.open(tmp_path / "index").about
    assert about.tally is not None and about.tally["num_images"] == 4
    require_continued(model, images, tmp_path / "index", monkeypatch)


KILLED = """
import os, sys
from modeling_llm2clip.configs.encoding_config import IndexConfig
from modeling_llm2clip.search import index_update
from modeling_llm2clip.search.image_index import ImageIndex
index_update._COMMITTED_AT_ONCE = 2
real, calls = index_update.encode_readable_images, []
def die(*args, **options):
    calls.append(1)
    return os._exit(9) if len(calls) == 3 else real(*args, **options)
index_update.encode_readable_images = die
ImageIndex.build(*sys.argv[1:4], IndexConfig(show_progress=False))
"""


@pytest.mark.slow
def test_a_killed_update_is_continued_too(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(model), str(images), str(tmp_path / "index")]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *words], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 9, done.stderr[-2000:]
    require_continued(model, images, tmp_path / "index", monkeypatch)


def require_continued(
    model: Path, images: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(list_rows(path)) == 4
    with encoding_counted(monkeypatch) as encoded:
        index, report = build(model, images, path)
    assert len(encoded) == 2 and len(index) == 6 and "2 new, 0 changed, 4 unchanged" in report


def write_around_reading(
    monkeypatch: pytest.MonkeyPatch, file: Path, content: bytes | None, *, moment: str
) -> None:
    """Replace a file, or delete it, after its size and times were noted."""
    real_encode, real_read = index_update.encode_readable_images, Path.read_bytes

    def write() -> None:
        if content is None:
            file.unlink(missing_ok=True)
        else:
            file.write_bytes(content)

    def write_first(*args: Any, **options: Any) -> Any:
        write()
        return real_encode(*args, **options)

    def write_after(path: Path) -> bytes:
        found = real_read(path)
        if path == file:
            write()
        return found

    if moment == "before it is read":
        monkeypatch.setattr(index_update, "encode_readable_images", write_first)
    else:
        monkeypatch.setattr(Path, "read_bytes", write_after)


@pytest.mark.parametrize("moment", ["before it is read", "after it is read"])
@pytest.mark.parametrize("change", ["another image", "broken", "gone"])
def test_a_copy_never_gets_what_another_file_has_become(
    change: str,
    moment: str,
    model: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first of several equal files is replaced while the folder is indexed.

    It is indexed as it was read, and read again by the next run, because its times have changed.
    """
    other = (images / "5.png").read_bytes()
    contents = {"another image": other, "broken": b"no image", "gone": None}
    shutil.copy(images / "1.png", images / "2 copy of 1.png")
    shutil.copy(images / "1.png", images / "3 copy of 1.png")
    with monkeypatch.context() as patch:
        write_around_reading(patch, images / "1.png", contents[change], moment=moment)
        _, report = build(model, images, tmp_path / "index")
    is_unread = moment == "before it is read" and change != "another image"
    assert (f"Not in the index: 1 unreadable image:\n{images / '1.png'}: " in report) == is_unread
    rows = list_rows(tmp_path / "index")
    assert ("1.png" in rows) != is_unread and len(rows) == 8 - is_unread
    embeddings = {row["sha256"]: row["embedding"] for row in rows.values()}
    assert all(row["embedding"] == embeddings[row["sha256"]] for row in rows.values())
    build(model, images, tmp_path / "index")
    rows = list_rows(tmp_path / "index")
    build(model, images, tmp_path / "fresh")
    fresh = list_rows(tmp_path / "fresh")
    assert rows.keys() == fresh.keys()
    for name, row in fresh.items():  # batches of other sizes round differently
        assert row["sha256"] == rows[name]["sha256"], name
        assert row["embedding"] == pytest.approx(rows[name]["embedding"], abs=1e-5), name


def test_a_replaced_image_is_indexed_as_it_was_read_even_if_its_times_are_the_same(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clocks of file systems are coarse: two writes within milliseconds may have one time."""
    monkeypatch.setattr(index_update, "describe_stat", lambda _: "the same")
    content = (images / "5.png").read_bytes()
    write_around_reading(monkeypatch, images / "1.png", content, moment="before it is read")
    build(model, images, tmp_path / "index")
    rows = list_rows(tmp_path / "index")
    assert len(rows) == 6 and rows["1.png"] == rows["5.png"]


def test_content_that_only_a_replaced_row_had_is_encoded_again(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file changes, and another one in a later commit has what it was before."""
    build(model, images, tmp_path / "index")
    before = list_rows(tmp_path / "index")["1.png"]
    shutil.copy(images / "1.png", images / "z.png")
    draw_noise(seed=99).save(images / "1.png")
    monkeypatch.setattr(index_update, "_COMMITTED_AT_ONCE", 1)
    assert "1 new, 1 changed" in build(model, images, tmp_path / "index")[1]
    after = list_rows(tmp_path / "index")["z.png"]
    assert after["sha256"] == before["sha256"]
    # A batch of another size rounds differently.
    assert after["embedding"] == pytest.approx(before["embedding"], abs=1e-5)


def test_times_of_a_touched_file_are_found_by_filters(
    model: Path, images: Path, tmp_path: Path
) -> None:
    where = "modified > date '2001-01-01'"
    for path in images.rglob("*.*"):
        os.utime(path, (1, 1))
    index, _ = build(model, images, tmp_path / "index")
    assert index.count(where) == 0
    os.utime(images / "1.png", (2_000_000_000, 2_000_000_000))
    index, report = build(model, images, tmp_path / "index")
    assert "6 unchanged" in report and "Encoded 0" in report
    assert index.count(where) == 1
    (result,) = index.search(["a dog"], where=where)
    assert [path.name for path, _ in result.hits] == ["1.png"]


@pytest.mark.parametrize("place", ["1.png", "new.png"])
def test_a_disk_that_fails_ends_the_update_and_removes_no_image(
    place: str, model: Path, images: Path, tmp_path: Path
) -> None:
    """Nothing is known of such a file, so that a good row of it stays."""
    path = tmp_path / "index"
    build(model, images, path)
    before = list_rows(path)
    make_failing_file(images / place)
    with pytest.raises(OSError, match=f"the disk or server failed.*{place}"):
        build(model, images, path)
    assert list_rows(path) == before
