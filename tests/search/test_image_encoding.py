"""Images encoded in one pass: equal to the facade's, with their facts, whatever else is broken."""

from __future__ import annotations

import hashlib
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from odd_images import write_rotated_jpeg, write_tiff_of_lost_pixels
from PIL import Image
from shared_models import ROUNDING, shared_model
from tiny import draw_noise

from modeling_llm2clip.encoding.encode import TorchEncoder, encode_images
from modeling_llm2clip.search import image_encoding
from modeling_llm2clip.search.image_encoding import (
    ReadImages,
    encode_readable_images,
    find_time_taken,
)

_EXIF, _TAKEN, _CHANGED, _ORIENTATION = 0x8769, 36867, 306, 274


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Five images, of which the second is upright only after rotation, and the third broken."""
    files = [tmp_path / f"{number}.png" for number in range(5)]
    for number, file in enumerate(files):
        draw_noise(40, 56, seed=number).save(file)
    exif = Image.Exif()
    exif[_ORIENTATION] = 6
    exif.get_ifd(_EXIF)[_TAKEN] = "2024:02:29 23:59:58"
    draw_noise(40, 56, seed=9).save(files[1], exif=exif)
    files[2].write_bytes(b"no image")
    return files


def encode(*paths: Path, **options: Any) -> ReadImages:
    """Encode images with the shared model."""
    return encode_readable_images(TorchEncoder(*shared_model()), paths, **options)


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_embeddings_are_those_of_the_facade_whatever_else_is_broken(
    paths: list[Path], batch_size: int | None
) -> None:
    found = encode(*paths, batch_size=batch_size)
    readable = [path for path in paths if path != paths[2]]
    assert found.paths == readable and list(found.errors) == [paths[2]]
    assert "2.png: not an image" in found.errors[paths[2]]
    assert torch.allclose(found.embeds, encode_images(*shared_model(), readable), atol=ROUNDING)


@pytest.mark.parametrize(
    "content",
    [
        write_rotated_jpeg(257, kind=2),
        write_rotated_jpeg(282, kind=7),
        write_tiff_of_lost_pixels(kind=2),
        write_tiff_of_lost_pixels(kind=11),
    ],
    ids=["EXIF: struct.error", "EXIF: TypeError", "TIFF: TypeError", "TIFF: fraction"],
)
def test_a_tag_of_another_type_is_an_error_of_its_file_alone(
    content: bytes, paths: list[Path]
) -> None:
    """Pillow raises other errors for these than for damaged pixels."""
    paths[3].write_bytes(content)
    found = encode(*paths)
    assert list(found.errors) == [paths[2], paths[3]] and len(found.paths) == 3
    assert f"{paths[3]}: the image is truncated or corrupt" in found.errors[paths[3]]


def test_images_of_few_rows_or_columns_are_read_as_the_facade_reads_them(tmp_path: Path) -> None:
    """As arrays, some of these could be channels first."""
    sizes = [(1, 40), (40, 1), (3, 40), (40, 3), (3, 3), (2, 2)]
    files = [tmp_path / f"{number}.png" for number in range(len(sizes))]
    for file, (height, width) in zip(files, sizes, strict=True):
        draw_noise(width, height).save(file)
    read = encode(*files)
    assert not read.errors
    assert torch.allclose(read.embeds, encode_images(*shared_model(), files), atol=ROUNDING)


def test_facts_are_of_the_upright_image(paths: list[Path]) -> None:
    found = encode(*paths)
    assert found.facts[0] == {"width": 56, "height": 40, "taken": None}
    taken = datetime(2024, 2, 29, 23, 59, 58)
    assert found.facts[1] == {"width": 40, "height": 56, "taken": taken}


def test_an_image_that_the_processor_refuses_is_named_and_stops_no_other(
    paths: list[Path],
) -> None:
    model, processor = shared_model()

    def refuse_wide(images: list[Any]) -> Any:
        if any(np.asarray(image).shape == (56, 40, 3) for image in images):
            raise ValueError("absolute aspect ratio must be smaller")
        return processor(images=images)

    found = encode_readable_images(TorchEncoder(model, refuse_wide), paths)  # type: ignore[arg-type]
    assert found.paths == [paths[0], *paths[3:]]
    assert found.errors[paths[1]] == f"{paths[1]}: absolute aspect ratio must be smaller"


@pytest.mark.parametrize(
    ("text", "time"),
    [
        (None, None),  # only the time of a change, which editors and scanners write
        ("2024:02:29 23:59:58", datetime(2024, 2, 29, 23, 59, 58)),
        ("2024:02:29 23:59:58\0", datetime(2024, 2, 29, 23, 59, 58)),
        ("2024-02-29", None),
        ("0000:00:00 00:00:00", None),
        ("    :  :     :  :  ", None),
        ("2023:02:29 00:00:00", None),
    ],
)
def test_the_time_is_that_of_exif_or_unknown(
    text: str | None, time: datetime | None, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[_CHANGED] = "2020:01:01 00:00:00"
    if text is not None:
        exif.get_ifd(_EXIF)[_TAKEN] = text
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as image:
        assert find_time_taken(image) == time


def test_damaged_exif_is_no_error(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(_EXIF)[_TAKEN] = "2024:02:29 23:59:58"
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg", exif=exif)
    content = (tmp_path / "a.jpg").read_bytes()
    start = content.index(b"Exif\0\0") + 6
    for place in range(start, start + 40):
        damaged = content[:place] + b"\xff\xfe" + content[place + 2 :]
        (tmp_path / "a.jpg").write_bytes(damaged)
        with Image.open(tmp_path / "a.jpg") as image:
            found = find_time_taken(image)
        assert found is None or isinstance(found, datetime)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.ppm"])
def test_digests_are_of_the_bytes_that_are_decoded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow maps gray BMP and TIFF from their path when it decodes them, which is later."""
    file, other = tmp_path / name, tmp_path / f"other {name}"
    draw_noise(40, 56, seed=1).convert("L").save(file)
    draw_noise(40, 56, seed=2).convert("L").save(other)
    before = file.read_bytes()
    wanted = encode_images(*shared_model(), [file])
    real = image_encoding.find_time_taken

    def replace_then_find(image: Image.Image) -> datetime | None:
        file.write_bytes(other.read_bytes())
        return real(image)

    monkeypatch.setattr(image_encoding, "find_time_taken", replace_then_find)
    found = encode(file)
    assert found.digests == {file: hashlib.sha256(before).hexdigest()}
    assert torch.allclose(found.embeds, wanted, atol=ROUNDING)


def test_where_all_are_broken_there_are_digests_and_no_embeddings(tmp_path: Path) -> None:
    file = tmp_path / "half.png"
    draw_noise(40, 56).save(file)
    file.write_bytes(file.read_bytes()[:-500])
    read = encode(file)
    assert read.embeds.shape == (0, 32)
    assert read.digests == {file: hashlib.sha256(file.read_bytes()).hexdigest()}
    assert read.errors[file].startswith(f"{file}: the image is truncated or corrupt")
