"""Images of Arrow files are read at their row, in both formats."""

from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow as pa
import pytest

from modeling_llm2clip.data.images.image_sources import ArrowImage, EncodedImage, count_bytes
from modeling_llm2clip.data.records.record_columns import make_image
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.records.records import CaptionedImage

IMAGES = [b"image %d" % number * number for number in range(1, 8)]


@pytest.fixture(params=["stream", "file"])
def file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    rows = [{"bytes": image, "path": None} for image in IMAGES]
    table = pa.table({"image": rows, "plain": [*IMAGES[:-1], None]})
    path = tmp_path / "0.arrow"
    new = pa.ipc.new_stream if request.param == "stream" else pa.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


@pytest.mark.parametrize("column", ["image", "plain"])
def test_images_are_read_in_any_order_and_after_pickling(file: Path, column: str) -> None:
    for row in (5, 0, 3, 2):
        image = ArrowImage(file, column, row, len(IMAGES[row]))
        assert pickle.loads(pickle.dumps(image)).read_bytes() == IMAGES[row]
        assert count_bytes(image) == len(IMAGES[row])


def test_what_is_not_there_is_named(file: Path) -> None:
    with pytest.raises(ValueError, match=r"0\.arrow has no row 7"):
        ArrowImage(file, "image", 7, 1).read_bytes()
    with pytest.raises(ValueError, match=r"0\.arrow has no column 'photo'"):
        ArrowImage(file, "photo", 0, 1).read_bytes()
    with pytest.raises(ValueError, match=r"row 6 has no image in 'plain'"):
        ArrowImage(file, "plain", 6, 1).read_bytes()
    broken = file.with_name("1.arrow")
    broken.write_bytes(b"no Arrow at all")
    with pytest.raises(ValueError, match=r"1\.arrow: not an Arrow file, or broken"):
        ArrowImage(broken, "image", 0, 1).read_bytes()


def test_addresses_survive_the_columns_of_a_table() -> None:
    image = ArrowImage(Path("a.arrow"), "image", 3, 44)
    table = RecordTable.from_records([CaptionedImage(image, "a", "a", ("a text",))])
    assert table[0].image == image
    assert make_image(4, "a.arrow", "image", 3, 44) == image


def test_an_image_in_memory_is_no_address() -> None:
    record = CaptionedImage(EncodedImage("a.tar: 1.png", b"x"), "a", "a", ("a text",))
    with pytest.raises(TypeError, match=r"a\.tar: 1\.png is in memory"):
        RecordTable.from_records([record])
