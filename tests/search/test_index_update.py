"""What an update of an index encodes, keeps, removes, reports; and what a killed one leaves."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from failing_disk import make_failing_file
from indexes import build, save_images, save_model
from interruptions import largest_file
from PIL import Image
from tiny import draw_noise

from modeling_llm2clip.search import index_update
from modeling_llm2clip.search.image_index import ImageIndex
from modeling_llm2clip.search.index_database import IndexDatabase, lock_database

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


class Place:
    """A model, six images, and the place of their index."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.index = model, folder / "index"
        self.images = save_images(folder / "images", count=6)
        self.first = self.images / "1.png"

    def build(self, **options: Any) -> tuple[ImageIndex, str]:
        """Build or update the index; return it and what was reported."""
        return build(self.model, self.images, self.index, **options)

    def list_rows(self) -> dict[str, Any]:
        """Path to everything else in its row."""
        columns = ["path", "sha256", "width", "height", "embedding"]
        parts = IndexDatabase(self.index).iterate(columns)
        return {row.pop("path"): row for part in parts for row in part.to_pylist()}

    def require_rows_of_a_new_index(self) -> None:
        """Every row is as in an index that is built at once."""
        rows = self.list_rows()
        shutil.rmtree(self.index)
        self.build()
        fresh = self.list_rows()
        assert rows.keys() == fresh.keys()
        for name, row in fresh.items():  # batches of other sizes round differently
            assert row["sha256"] == rows[name]["sha256"], name
            assert row["embedding"] == pytest.approx(rows[name]["embedding"], abs=1e-5), name


@pytest.fixture
def place(model: Path, tmp_path: Path) -> Place:
    return Place(model, tmp_path)


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
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = place.images
    report = place.build()[1]
    assert "6 images: 6 new, 0 changed, 0 unchanged; 0 removed. Encoded 6." in report
    before = place.list_rows()
    (images / "1.png").rename(images / "other name.png")
    shutil.copy(images / "3.png", images / "copy of 3.png")
    (images / "below" / "0.JPG").unlink()
    draw_noise(33, 22, seed=77).save(images / "5.png")
    draw_noise(seed=78).save(images / "new.png")
    os.utime(images / "below" / "2.JPG", (1, 1))  # touched
    with encoding_counted(monkeypatch) as encoded:
        report = place.build()[1]
    assert sorted(encoded) == ["5.png", "new.png"]
    assert "7 images: 3 new, 1 changed, 3 unchanged; 2 removed. Encoded 2." in report
    after = place.list_rows()
    assert after["other name.png"] == before["1.png"]
    assert after["copy of 3.png"] == after["3.png"] == before["3.png"]
    assert after["below/2.JPG"] == before["below/2.JPG"]
    assert (after["5.png"]["width"], after["5.png"]["height"]) == (22, 33)
    assert after["5.png"]["embedding"] != before["5.png"]["embedding"]
    with monkeypatch.context() as patch:  # without changes, nothing is read
        patch.setattr(index_update, "encode_readable_images", None)
        report = place.build()[1]
    assert "7 images: 0 new, 0 changed, 7 unchanged; 0 removed. Encoded 0." in report
    place.require_rows_of_a_new_index()


def test_a_file_of_the_same_size_and_time_is_noticed_to_have_changed(place: Place) -> None:
    file = place.images / "1.bmp"
    Image.new("RGB", (8, 8), "red").save(file)
    place.build()
    before, stat = place.list_rows()["1.bmp"], file.stat()
    Image.new("RGB", (8, 8), "blue").save(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "1 changed" in place.build()[1]
    assert place.list_rows()["1.bmp"]["sha256"] != before["sha256"]


def test_unreadable_images_are_counted_named_and_left_out(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.images / "broken.png").write_bytes(b"no image")
    (place.images / "half.png").write_bytes(place.first.read_bytes()[:-500])
    (place.images / "again.png").write_bytes(b"no image")
    index, report = place.build()
    assert "Not in the index: 3 unreadable images:" in report
    for name in ("broken.png: not an image", "half.png: the image is trunc", "again.png: not an"):
        assert name in report
    assert len(index) == 6
    assert "3 unreadable images" in place.build()[1]  # each time
    (place.images / "3.png").write_bytes(b"broken since")
    report = place.build()[1]
    assert "5 unchanged; 1 removed" in report and "4 unreadable images" in report
    with pytest.warns(UserWarning, match="4 unreadable images"):
        ImageIndex.build(place.model, place.images, place.index)
    real = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path == place.first:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    os.utime(place.first)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    index, report = place.build()
    assert len(index) == 4 and "1.png: cannot be read ([Errno 13] Permission denied" in report


def test_where_no_image_can_be_read_nothing_is_removed(place: Place) -> None:
    place.build()
    for path in place.images.rglob("*.*"):
        path.write_bytes(b"a broken disk")
    with pytest.raises(ValueError, match=r"6 unreadable images.*\n"):
        place.build()
    shutil.rmtree(place.images)
    place.images.mkdir()
    with pytest.raises(ValueError, match="no image in it or its subfolders"):
        place.build()
    assert len(place.list_rows()) == 6


def test_names_of_files_are_kept_whatever_they_are(place: Place) -> None:
    names = ["it's.png", 'a "b".png', "ü %20.png", "100%_of.png"]
    for number, name in enumerate([*names, os.fsdecode(b"\xff.png")]):
        draw_noise(seed=50 + number).save(place.images / name)
    index, report = place.build()
    assert set(names) <= set(place.list_rows())
    assert "its file name is not valid Unicode. Rename it." in report and len(index) == 10
    for name in names:
        (place.images / name).unlink()
    assert "4 removed" in place.build()[1]


def test_other_images_and_models_do_not_write_into_an_index(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.build()
    other = save_images(tmp_path / "other", count=2)
    with pytest.raises(
        ValueError, match=r"is the index of .*images; indexing .*other would remove those images"
    ):
        build(place.model, other, place.index)
    model = save_model(tmp_path / "model", vision="vit")
    with pytest.raises(
        ValueError, match=f"for the model {place.model}, and the embeddings of {model} differ"
    ):
        build(model, place.images, place.index)
    place.images = place.images.rename(tmp_path / "moved")
    with encoding_counted(monkeypatch) as encoded:
        index, _ = place.build()
    assert encoded == [] and len(index) == 6
    assert ImageIndex.open(place.index).search("a dog").hits[0][0].exists()


def test_a_database_is_locked_before_it_is_there(place: Place) -> None:
    with lock_database(str(place.index)):
        with pytest.raises(ValueError, match=r"Another process is writing .*index"):
            place.build()
        assert [path.name for path in place.index.iterdir()] == [".llm2clip-lock"]
    assert len(place.build()[0]) == 6


@pytest.mark.parametrize("size", [0, 300, 800])  # no data, no version, no version of the images
def test_a_database_that_found_no_room_to_begin_is_begun_by_the_same_call(
    size: int, place: Place
) -> None:
    with largest_file(size), pytest.raises(OSError, match=r"No room for the index .*Free .*index'"):
        place.build()
    assert list(place.index.glob("*.lance"))
    assert len(place.build()[0]) == 6
    place.require_rows_of_a_new_index()


def test_a_stopped_update_has_kept_what_it_committed_and_is_continued(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_update, "_COMMITTED_AT_ONCE", 2)
    real, calls = index_update.encode_readable_images, itertools.count(1)

    def stop_at_the_third(*args: Any, **options: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(index_update, "encode_readable_images", stop_at_the_third)
        place.build()
    about = IndexDatabase(place.index).about
    assert about.tally is not None and about.tally["num_images"] == 4
    assert len(place.list_rows()) == 4
    with encoding_counted(monkeypatch) as encoded:
        index, report = place.build()
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
        earlier = real_read(path)
        if path == file:
            write()
        return earlier

    if moment == "before":
        monkeypatch.setattr(index_update, "encode_readable_images", write_first)
    else:
        monkeypatch.setattr(Path, "read_bytes", write_after)


@pytest.mark.parametrize(
    ("change", "moment"),
    [
        ("another image", "before"), ("another image", "after"), ("broken", "before"),
        ("gone", "before"), ("gone", "after"),
    ],
)  # fmt: skip
def test_a_copy_never_gets_what_another_file_has_become(
    change: str, moment: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of several equal files is replaced before or after it is read.

    It is indexed as it was read, and read again by the next run, because its times have changed.
    """
    other = (place.images / "5.png").read_bytes()
    contents = {"another image": other, "broken": b"no image", "gone": None}
    for name in ("2 copy of 1.png", "3 copy of 1.png"):
        shutil.copy(place.first, place.images / name)
    with monkeypatch.context() as patch:
        write_around_reading(patch, place.first, contents[change], moment=moment)
        report = place.build()[1]
    is_unread = moment == "before" and change != "another image"
    assert (f"Not in the index: 1 unreadable image:\n{place.first}: " in report) == is_unread
    rows = place.list_rows()
    assert ("1.png" in rows) != is_unread and len(rows) == 8 - is_unread
    embeddings = {row["sha256"]: row["embedding"] for row in rows.values()}
    assert all(row["embedding"] == embeddings[row["sha256"]] for row in rows.values())
    place.build()
    place.require_rows_of_a_new_index()


def test_a_replaced_image_is_indexed_as_it_was_read_even_if_its_times_are_the_same(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clocks of file systems are coarse: two writes within milliseconds may have one time."""
    monkeypatch.setattr(index_update, "describe_stat", lambda _: "the same")
    content = (place.images / "5.png").read_bytes()
    write_around_reading(monkeypatch, place.first, content, moment="before")
    place.build()
    rows = place.list_rows()
    assert len(rows) == 6 and rows["1.png"] == rows["5.png"]


def test_content_that_only_a_replaced_row_had_is_encoded_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file changes, and another one in a later commit has what it was before."""
    place.build()
    before = place.list_rows()["1.png"]
    shutil.copy(place.first, place.images / "z.png")
    draw_noise(seed=99).save(place.first)
    monkeypatch.setattr(index_update, "_COMMITTED_AT_ONCE", 1)
    assert "1 new, 1 changed" in place.build()[1]
    after = place.list_rows()["z.png"]
    assert after["sha256"] == before["sha256"]
    # A batch of another size rounds differently.
    assert after["embedding"] == pytest.approx(before["embedding"], abs=1e-5)


def test_a_damaged_path_that_another_image_has_is_not_written_anew(place: Place) -> None:
    """The row would become a second one of that image, with a new checksum."""
    place.build()
    (file,) = (place.index / "images.lance" / "data").glob("*.lance")
    content = file.read_bytes()
    assert content.count(b"3.png") == 1
    file.write_bytes(content.replace(b"3.png", b"1.png"))
    (place.images / "3.png").unlink()
    with pytest.raises(ValueError, match="is damaged: 1 row with a duplicate path"):
        place.build()


def test_times_of_a_touched_file_are_found_by_filters(place: Place) -> None:
    where = "modified > date '2001-01-01'"
    for path in place.images.rglob("*.*"):
        os.utime(path, (1, 1))
    assert place.build()[0].count(where) == 0
    os.utime(place.first, (2_000_000_000, 2_000_000_000))
    index, report = place.build()
    assert "6 unchanged" in report and "Encoded 0" in report
    (result,) = index.search(["a dog"], where=where)
    assert index.count(where) == 1
    assert [path.name for path, _ in result.hits] == ["1.png"]


@pytest.mark.parametrize("name", ["1.png", "new.png"])
def test_a_disk_that_fails_ends_the_update_and_removes_no_image(name: str, place: Place) -> None:
    """Nothing is known of such a file, so that a good row of it stays."""
    place.build()
    before = place.list_rows()
    make_failing_file(place.images / name)
    with pytest.raises(OSError, match=f"the disk or server failed.*{name}"):
        place.build()
    assert place.list_rows() == before
