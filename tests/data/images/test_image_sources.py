"""An invalid image and an unreadable file are different errors, in every storage format."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captioned_files import encode, write_parquet, write_shards
from failing_disk import make_failing_file
from PIL import Image
from shard_server import ShardServer

from modeling_llm2clip.data.images.image_sources import (
    ParquetImage,
    TarImage,
    decode_image,
    find_unreadable_images,
)
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.remote import file_locations
from modeling_llm2clip.data.validation_errors import DataValidationError

pytestmark = pytest.mark.usefixtures("own_cache", "new_states")


# A BigTIFF whose directory is beyond any file's end: the operating system reports EINVAL.
FAR_DIRECTORY = b"II\x2b\0\x08\0\0\0" + (2**63 - 5).to_bytes(8, "little") + bytes(64)


@pytest.mark.parametrize(
    "content", [b"", b"no image", encode("images/red.png")[:-30], FAR_DIRECTORY]
)
def test_a_file_of_invalid_content_is_an_invalid_image(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "0.png"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"0\.png"):
        decode_image(file)
    assert list(find_unreadable_images([file])) == [file]


def test_an_unreadable_file_is_not_an_invalid_image(tmp_path: Path) -> None:
    good = tmp_path / "0.png"
    good.write_bytes(encode("images/red.png"))
    for file in (tmp_path / "gone.png", make_failing_file(tmp_path / "1.png")):
        with pytest.raises(OSError, match=rf"{file.name}: cannot be read .*Run the same command"):
            decode_image(file)
        with pytest.raises(OSError, match="cannot be read"):
            find_unreadable_images([good, file])
    assert decode_image(good).size == (9, 6)
    file = make_failing_file(tmp_path / "0.parquet")
    for image in (ParquetImage(file, "image", 0), TarImage(file, "0.png", 0, 10)):
        with pytest.raises(OSError, match="cannot be read"):
            decode_image(image)


def test_a_shard_that_became_shorter_is_not_an_invalid_image(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data")
    image = load_records(folder)[0].image
    assert isinstance(image, TarImage) and isinstance(image.shard, Path)
    image.shard.write_bytes(image.shard.read_bytes()[: image.offset + 3])
    with pytest.raises(OSError, match=r"cannot be read .*changed while it was in use"):
        decode_image(image)


def test_a_row_of_broken_bytes_is_an_invalid_image(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    rows = [{"bytes": stream.getvalue(), "path": None}, {"bytes": b"no image", "path": None}]
    file = tmp_path / "0.parquet"
    pq.write_table(pa.table({"image": rows, "caption": ["a", "b"]}), file)
    assert decode_image(ParquetImage(file, "image", 0)).size == (4, 4)
    with pytest.raises(ValueError, match="row 1: not an image"):
        decode_image(ParquetImage(file, "image", 1))
    # A damaged file is also invalid, because reading it again changes nothing.
    content = file.read_bytes()
    damaged = tmp_path / "1.parquet"
    damaged.write_bytes(content[:4] + bytes(len(content) - 8) + content[-4:])
    with pytest.raises(ValueError, match="row 0"):
        decode_image(ParquetImage(damaged, "image", 0))


@pytest.mark.parametrize(
    ("write", "status"),
    [(write_shards, 500), (write_parquet, 503), (write_shards, 404), (write_parquet, 403)],
)
def test_a_failing_server_does_not_make_its_images_invalid(
    write: Callable[[Path], Path], status: int, tmp_path: Path
) -> None:
    names = "{00000..00001}.tar" if write is write_shards else "part-{0..1}.parquet"
    folder = write(tmp_path / "data")
    with ShardServer(folder) as server:
        records = load_records(f"{server.url}/{names}", cache=False)
        images = [record.image for record in records if record.image]
        file_locations._open_remote.cache_clear()
        before = server.requests.total()
        for file in folder.iterdir():
            server.status[file.name] = status
        with pytest.raises(OSError, match="cannot be read"):
            find_unreadable_images(images)
        # Only temporary failures are retried.
        assert (server.requests.total() - before > 3) == (status >= 500)
        server.status.clear()
        assert not find_unreadable_images(images)


def test_a_check_of_images_stops_if_the_disk_fails(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    lines = [f'{{"image": "{number}.png", "caption": "x"}}' for number in range(3)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataValidationError, match="image unreadable: 3"):
        load_records(tmp_path, check_images=True)
    make_failing_file(tmp_path / "1.png")
    with pytest.raises(OSError, match=r"1\.png: cannot be read"):
        load_records(tmp_path, check_images=True)
