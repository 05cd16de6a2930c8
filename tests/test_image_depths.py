"""Pixels of more than 8 bits, color profiles, and arrays of a few rows."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from odd_images import write_tiff
from PIL import Image, ImageCms
from shared_models import fresh_processor
from tiny import draw_noise
from transformers.image_utils import load_image

from modeling_llm2clip import load_images

EIGHT = np.asarray(draw_noise(16, 24).convert("L"))
COMPRESSIONS = {"none": (1, bytes), "deflate": (8, zlib.compress)}


def pack(values: np.ndarray, bits: int) -> bytes:
    """Rows of pixels as TIFF holds them: 12 bits are packed, the most significant first."""
    if bits != 12:
        return values.astype(f"<u{bits // 8}").tobytes()
    digits = ["".join(f"{value:012b}" for value in row) for row in values]
    return b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in digits)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_the_bit_depth_of_a_tiff_determines_white(
    bits: int, white_is_zero: bool, compression: str, tmp_path: Path
) -> None:
    """Each depth of one image gives the same pixels."""
    if bits == 12 and white_is_zero:
        pytest.skip("Pillow refuses it")
    white = 2**bits - 1
    values = np.ceil(EIGHT * (white / 255)).astype(np.int64)  # the first value of each of 8 bits
    number, compress = COMPRESSIONS[compression]
    content = compress(pack(white - values if white_is_zero else values, bits))
    tags = {258: bits, 259: number, 262: int(not white_is_zero)}
    (tmp_path / "a.tif").write_bytes(write_tiff(24, 16, content, tags))
    for given in (tmp_path / "a.tif", Image.open(tmp_path / "a.tif")):
        assert np.array_equal(np.asarray(load_images(given).convert("L")), EIGHT)


def test_a_rotated_tiff_of_twelve_bits_is_scaled_too(tmp_path: Path) -> None:
    values = np.ceil(EIGHT * (4095 / 255)).astype(np.int64)
    (tmp_path / "a.tif").write_bytes(write_tiff(24, 16, pack(values, 12), {258: 12, 274: 6}))
    found = np.asarray(load_images(tmp_path / "a.tif").convert("L"))
    assert np.array_equal(found, np.rot90(EIGHT, -1))


def test_sixteen_bits_of_every_format_give_the_same_pixels(tmp_path: Path) -> None:
    sixteen = Image.fromarray(EIGHT.astype(np.uint16) * 257)
    (tmp_path / "a.pgm").write_bytes(
        b"P5 24 16 65535\n" + (EIGHT.astype(np.uint16) * 257).astype(">u2").tobytes()
    )
    (tmp_path / "b.pgm").write_bytes(
        b"P5 24 16 1020\n"
        + (EIGHT.astype(np.uint16) * 4).astype(">u2").tobytes()  # a maximum of its own
    )
    for name in ("a.png", "a.tif", "a.jp2"):
        sixteen.save(tmp_path / name)
    sixteen.save(tmp_path / "b.tif", compression="tiff_lzw")
    big_endian = Image.frombytes(
        "I;16B", (24, 16), (EIGHT.astype(np.uint16) * 257).astype(">u2").tobytes()
    )
    for given in (*sorted(tmp_path.iterdir()), sixteen, big_endian):
        assert np.array_equal(np.asarray(load_images(given).convert("L")), EIGHT), given


@pytest.mark.parametrize("mode", ["I", "F"])
@pytest.mark.parametrize("form", [None, "TIFF"])
def test_pixels_whose_range_nothing_states_are_refused(mode: str, form: str | None) -> None:
    """Of 32-bit integers as of floats: 8 bits would be black, and what is above 16 would wrap."""
    kind = {"I": "32-bit integer", "F": "float"}[mode]
    image = Image.fromarray(EIGHT).convert(mode)
    if form is not None:
        buffer = io.BytesIO()
        image.save(buffer, form)
        image = Image.open(buffer)
    with pytest.raises(ValueError, match=rf"{kind} pixels have an unknown range.*8 or 16 bits"):
        load_images(image)


def test_signed_sixteen_bits_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(write_tiff(24, 16, pack(EIGHT, 16), {258: 16, 339: 2}))
    with pytest.raises(ValueError, match=r"a\.tif: 32-bit integer pixels have an unknown range"):
        load_images(tmp_path / "a.tif")


def test_color_profiles_are_ignored_as_in_the_transforms_of_clip(tmp_path: Path) -> None:
    """With the red and green primaries of sRGB exchanged, a profile is plain to see."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    exchanged = profile.tobytes().replace(b"rXYZ", b"xxxx").replace(b"gXYZ", b"rXYZ")
    exchanged = exchanged.replace(b"xxxx", b"gXYZ")
    image = draw_noise()
    for name in ("a.png", "a.tif", "a.webp"):
        image.save(tmp_path / name, icc_profile=exchanged, lossless=True)
        opened = Image.open(tmp_path / name)
        used = ImageCms.profileToProfile(
            opened, ImageCms.ImageCmsProfile(io.BytesIO(opened.info["icc_profile"])), profile
        )
        assert used is not None and np.abs(np.asarray(used, int) - np.asarray(image)).max() > 50
        # As open_clip and CLIP convert, and as transformers loads.
        for wanted in (image, opened.convert("RGB"), load_image(str(tmp_path / name))):
            found = load_images(tmp_path / name)
            assert np.array_equal(np.asarray(found), np.asarray(wanted))


@pytest.mark.parametrize(
    ("height", "width"), [(h, w) for h in (*range(1, 7), 9) for w in (1, 2, 4, 9)]
)
def test_an_array_of_a_few_rows_is_the_image(height: int, width: int) -> None:
    """As arrays and tensors, channels first and last, and as an image; 3 rows are ambiguous."""
    processor = fresh_processor()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    wanted = processor(images=Image.fromarray(pixels))["pixel_values"]
    last: list[Any] = [pixels, torch.from_numpy(pixels)]
    first = [one.transpose(2, 0, 1) if isinstance(one, np.ndarray) else one.permute(2, 0, 1)
             for one in last]  # fmt: skip
    for array in (*(last if height != 3 else ()), *first):
        assert torch.equal(processor(images=array)["pixel_values"], wanted)
    if height == 3:
        with pytest.raises(ValueError, match=r"shape \(3, \d, 3\)"):
            processor(images=pixels)
