"""Images as they are loaded, and the errors for invalid ones."""

from __future__ import annotations

import base64
import copy
import io
import threading
from collections.abc import Iterator
from functools import partial
from http.server import (
    SimpleHTTPRequestHandler,
    ThreadingHTTPServer,
)
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from odd_images import write_png
from PIL import Image
from shared_models import fresh_processor
from tiny import draw_noise
from transformers import CLIPImageProcessor, CLIPImageProcessorPil

from modeling_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.image_loading_llm2clip import load_images, unpack_pixels

WHITE, RED = (255, 255, 255), (255, 0, 0)


@pytest.fixture
def processor() -> LLM2CLIPProcessor:
    """A fresh processor, because it counts truncated texts."""
    return fresh_processor()


def load(image: Any) -> Image.Image:
    loaded: Image.Image = load_images(image)
    assert loaded.mode == "RGB"
    return loaded


def save_rotated(path: Path) -> None:
    upright = Image.new("RGB", (4, 2), "white")
    upright.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated; to be turned clockwise by 90 degrees
    upright.rotate(90, expand=True).save(path, exif=exif)


def save_animated(path: Path) -> None:
    frames = [Image.new("RGB", (4, 2), color) for color in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def save_palette_with_alpha(path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(path, transparency=1)


def save_color_key(path: Path) -> None:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), (0, 0, 255))
    image.save(path, transparency=(0, 0, 255))


def save_as(mode: str, colors: list[Any], path: Path) -> None:
    image = Image.new(mode, (len(colors), 1))
    for column, color in enumerate(colors):
        image.putpixel((column, 0), color)
    image.save(path)


def as_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def gray(value: int) -> tuple[int, int, int]:
    return (value, value, value)


# File name, function that saves it, and the expected RGB values of its first row.
ODD_IMAGES: dict[str, tuple[Any, list[tuple[int, int, int]]]] = {
    "rotated.png": (save_rotated, [RED, WHITE, WHITE, WHITE]),
    "animated.gif": (save_animated, [RED] * 4),
    "palette_with_alpha.png": (save_palette_with_alpha, [RED, WHITE]),
    "color_key.png": (save_color_key, [RED, WHITE]),
    "gray.png": (partial(save_as, "L", [0, 100]), [gray(0), gray(100)]),
    "one_bit.png": (partial(save_as, "1", [0, 1]), [gray(0), gray(255)]),
    "gray_with_alpha.png": (
        partial(save_as, "LA", [(0, 255), (0, 0), (100, 255)]),
        [gray(0), WHITE, gray(100)],
    ),
    "alpha.png": (
        # A fifth of red on white: red stays 255, the others become 255 · 4 / 5 = 204.
        partial(save_as, "RGBA", [(*RED, 255), (*RED, 0), (*RED, 51)]),
        [RED, WHITE, (255, 204, 204)],
    ),
    # Full cyan absorbs red, no ink is white, black is black.
    "cmyk.tif": (
        partial(save_as, "CMYK", [(255, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 255)]),
        [(0, 255, 255), WHITE, (0, 0, 0)],
    ),
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """URL of a web server on this machine that serves the test's folder."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Log nothing."""

    handler = partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_unusual_images_have_the_right_pixels_from_every_source(
    name: str, server: str, tmp_path: Path
) -> None:
    save, expected = ODD_IMAGES[name]
    path = tmp_path / name
    save(path)
    data = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    for source in (path, str(path), Image.open(path), f"{server}/{name}", data):
        pixels = np.asarray(load(source))
        assert [tuple(int(value) for value in pixel) for pixel in pixels[0]] == expected


def save_broken(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.jpg"
    draw_noise().save(path)
    content = path.read_bytes()
    match kind:
        case "truncated":
            path.write_bytes(content[:-800])
        case "headless":
            path.write_bytes(content[:300])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("<html>not found</html>")
        case "missing":
            path.unlink()
    return path


BROKEN = {
    "truncated": "the image is truncated or corrupt",
    "headless": "the image is truncated or corrupt",
    "empty": "not an image that Pillow can read, or empty",
    "text": "not an image that Pillow can read",
    "missing": "no such image",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_corrupt_image_is_named_by_its_path(
    processor: LLM2CLIPProcessor, kind: str, server: str, tmp_path: Path
) -> None:
    path = save_broken(tmp_path, kind)
    for source in (path, str(path)):
        with pytest.raises(ValueError, match=rf"{kind}\.jpg: {BROKEN[kind]}"):
            processor(images=[draw_noise(), source])
    with pytest.raises(ValueError, match=rf"{server}/{kind}\.jpg"):
        processor(images=f"{server}/{kind}.jpg")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "PPM"])
def test_an_image_truncated_anywhere_is_named_by_its_path(
    image_format: str, tmp_path: Path
) -> None:
    buffer, path = io.BytesIO(), tmp_path / "truncated"
    draw_noise(8, 8).save(buffer, image_format)
    content = buffer.getvalue()
    # The checksum and end marker of a PNG file contain no pixels.
    last = len(content) - (20 if image_format == "PNG" else 0)
    for length in range(0, last, 7 if image_format == "JPEG" else 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"^{path}: (not an image|the image is truncated)"):
            load_images([path])


def test_all_corrupt_images_are_named_at_once(processor: LLM2CLIPProcessor, tmp_path: Path) -> None:
    paths = [save_broken(tmp_path, kind) for kind in ("truncated", "missing")]
    opened = Image.open(paths[0])
    for first in (paths[0], opened):
        with pytest.raises(ValueError, match=r"truncated\.jpg: the(.|\n)*missing\.jpg"):
            processor(images=[first, paths[1], draw_noise()])


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ("{server}/a b.jpg", "cannot be downloaded"),
        ("{server}/\u00e4.jpg", "cannot be downloaded"),
        ("http://127.0.0.1:port/a.jpg", "cannot be downloaded"),
        ("{SERVER}/missing.jpg", "cannot be downloaded .*404"),
        ("x" * 300, r"^x{200}: no such image"),
        ("a\0b.jpg", "no such image"),
    ],
)
def test_an_invalid_url_or_path_is_named(address: str, error: str, server: str) -> None:
    address = address.format(server=server, SERVER=server.replace("http", "HTTP"))
    with pytest.raises(ValueError, match=error):
        load_images([draw_noise(), address])


def test_a_closed_image_is_rejected_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "closed.png"
    draw_noise().save(path)
    with Image.open(path) as image:
        pass
    with pytest.raises(ValueError, match=r"closed\.png: the image's file is closed"):
        load_images([image])


def test_premultiplied_gray_is_also_composed_on_white() -> None:
    image = Image.new("LA", (1, 1), (100, 0)).convert("La")
    assert load(image).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(
    ("image", "error"),
    [
        *((image, rf"Image number 2 must be a PIL image, .* not {type(image).__name__}")
          for image in (None, b"bytes", 3, ["nested.png"])),
        # Encoded images in memory: the error says how to open them.
        *((image, r"PIL\.Image\.open.*BytesIO")
          for image in (b"", memoryview(b"a"), io.BytesIO(b""))),
        # Addresses of data are long.
        ("data:image/png;base64,AA" + "A" * 98, r"^data:image/png;base64,A{18}…: not an image"),
        ("data:image/png;base64,A", r"^data:image/png;base64,A…: the image cannot be downloaded"),
        ("DATA:nothing", r"^DATA:nothing…: the image cannot be downloaded"),
        (Image.new("RGB", (0, 4)), "image number 2: the image has no pixels"),
    ],
)  # fmt: skip
def test_an_input_that_is_not_an_image_is_rejected_with_its_number(image: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        load_images([draw_noise(), image])


def test_an_empty_list_of_images_is_rejected(processor: LLM2CLIPProcessor) -> None:
    with pytest.raises(ValueError, match="images is an empty list"):
        processor(images=[])


def test_pixels_are_unpacked_as_numpy_reads_them() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 23, 3), dtype=np.uint8)
    found = unpack_pixels(Image.fromarray(pixels))
    assert found.flags["C"] and found.flags["W"]
    np.testing.assert_array_equal(found, pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(60_000, 1), (2, 201)])
def test_a_strip_that_resizing_would_make_enormous_is_rejected(
    size: tuple[int, int], tmp_path: Path
) -> None:
    image = Image.new("RGB", size)
    image.save(tmp_path / "strip.png")
    for source in (tmp_path / "strip.png", image, np.asarray(image), as_tensor(np.asarray(image))):
        with pytest.raises(ValueError, match=r"times longer than the other\. Crop the image"):
            load_images(source)
    assert load_images(Image.new("RGB", (2, 200))).size == (2, 200)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_the_strides_of_an_array_do_not_change_its_pixels(make: Any, dtype: Any) -> None:
    processor = LLM2CLIPProcessor(CLIPImageProcessor(), fresh_processor().tokenizer)
    array = np.random.default_rng(0).integers(0, 256, (9, 1, 3), np.uint8)
    wanted = processor(images=Image.fromarray(array))["pixel_values"]
    scaled = array.astype(dtype) * (np.iinfo(dtype).max // 255)
    assert torch.equal(processor(images=make(np.asfortranarray(scaled)))["pixel_values"], wanted)


@pytest.mark.parametrize("mode", ["L", "I;16", "RGBA", "CMYK", "RGB"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_turned_tiff_has_the_same_pixels_from_a_path_and_from_bytes(
    mode: str, orientation: int, tmp_path: Path
) -> None:
    path, size = tmp_path / "turned.tif", (7, 5)
    image = Image.new(mode, size)
    image.frombytes(np.random.default_rng(0).bytes(len(image.tobytes())))
    image.save(path, tiffinfo={0x0112: orientation})
    wanted = np.asarray(load(Image.open(io.BytesIO(path.read_bytes()))))
    opened = Image.open(path)
    for source in (path, opened):
        np.testing.assert_array_equal(np.asarray(load(source)), wanted)
    assert opened.filename == str(path)


@pytest.mark.parametrize("make", [np.asarray, as_tensor], ids=["array", "tensor"])
def test_sixteen_bit_arrays_are_scaled_like_sixteen_bit_images(
    processor: LLM2CLIPProcessor, make: Any
) -> None:
    eight = np.asarray(draw_noise())
    expected = processor(images=make(eight))["pixel_values"]
    assert torch.equal(expected, processor(images=draw_noise())["pixel_values"])
    # 257 times 0 … 255 is 0 … 65535; values below the next multiple round down.
    sixteen = eight.astype(np.uint16) * 257
    sixteen[sixteen < 65535] += 256
    assert torch.equal(processor(images=make(sixteen))["pixel_values"], expected)


FLOAT_RANGE = r"whose range is unknown\. Use uint8.*\(image \* 255\)\.round\(\)"
ODD_ARRAYS: dict[str, tuple[Any, str]] = {
    "float in 0 to 1": (np.full((8, 8, 3), 0.5, dtype=np.float32), f"float32.*{FLOAT_RANGE}"),
    "float in 0 to 255": (np.full((8, 8, 3), 128.0), f"float64.*{FLOAT_RANGE}"),
    "half tensor": (torch.full((3, 8, 8), 0.5, dtype=torch.bfloat16), f"bfloat16.*{FLOAT_RANGE}"),
    "NaN": (np.full((8, 8, 3), np.nan, dtype=np.float32), f"float32.*{FLOAT_RANGE}"),
    "integers": (np.full((8, 8, 3), 128), f"int64.*{FLOAT_RANGE}"),
    "empty": (np.zeros((0, 0, 3), dtype=np.uint8), r"shape \(0, 0, 3\)"),
    "gray": (np.zeros((8, 9), dtype=np.uint8), r"shape \(8, 9\), .*Image\.fromarray"),
    "transparency": (np.zeros((8, 9, 4), dtype=np.uint8), r"shape \(8, 9, 4\)"),
    "colors first or last": (np.zeros((3, 9, 3), dtype=np.uint8), r"shape \(3, 9, 3\)"),
}


@pytest.mark.parametrize("kind", ODD_ARRAYS)
def test_an_array_of_unknown_range_or_layout_is_rejected_by_its_number(
    processor: LLM2CLIPProcessor, kind: str
) -> None:
    array, error = ODD_ARRAYS[kind]
    with pytest.raises(ValueError, match=rf"image number 2 .*{error}"):
        processor(images=[np.zeros((8, 9, 3), dtype=np.uint8), array])


@pytest.mark.parametrize(
    ("value", "nested"), [(False, None), (False, "images_kwargs"), (0, "common_kwargs")]
)
@pytest.mark.parametrize("make", [np.asarray, as_tensor], ids=["array", "tensor"])
@pytest.mark.parametrize("image_processor", [CLIPImageProcessor, CLIPImageProcessorPil])
def test_floats_that_are_not_to_be_rescaled_equal_their_images(
    make: Any, nested: str | None, value: object, image_processor: Any
) -> None:
    processor = LLM2CLIPProcessor(image_processor(), fresh_processor().tokenizer)
    options: dict[str, Any] = {"do_rescale": value}
    options = {nested: options} if nested else options
    floats = make(np.asarray(draw_noise()) / np.float32(255))
    wanted = processor(images=draw_noise())["pixel_values"]
    for images in (floats, [floats], floats[None]):
        assert torch.equal(processor(images=images, **options)["pixel_values"], wanted)


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (draw_noise(), "Image"),
        ("a.png", "str"),
        (np.zeros((8, 9, 3), np.uint8), "uint8"),
        (np.full((8, 9, 3), 1.5), "float64 outside"),
        (torch.full((3, 8, 9), -0.1), r"torch\.float32 outside"),
        (np.full((8, 9, 3), np.nan, np.float32), "float32 outside"),
    ],
)
def test_pixels_that_are_to_be_scaled_are_not_taken_for_scaled_ones(
    processor: LLM2CLIPProcessor, image: Any, kind: str
) -> None:
    with pytest.raises(ValueError, match=rf"do_rescale=False needs float images .*, not {kind}"):
        processor(images=[np.zeros((8, 9, 3)), image], do_rescale=False)


@pytest.mark.parametrize("nested", [None, "images_kwargs", "common_kwargs"])
def test_a_rescale_option_of_none_is_the_default(
    nested: str | None, processor: LLM2CLIPProcessor
) -> None:
    options: dict[str, Any] = {"do_rescale": None}
    options = {nested: options} if nested else options
    wanted = processor(images=draw_noise())["pixel_values"]
    assert torch.equal(processor(images=draw_noise(), **options)["pixel_values"], wanted)


def test_a_processor_that_never_rescales_accepts_images() -> None:
    image_processor = copy.deepcopy(fresh_processor().image_processor)
    image_processor.do_rescale, image_processor.image_mean = False, [127.5] * 3
    processor = LLM2CLIPProcessor(image_processor, fresh_processor().tokenizer)
    assert processor(images=draw_noise())["pixel_values"].max() > 1


# Written by hand, because Pillow writes none of these. Each pixel, scaled to 8 bits; the second is
# the one that the file declares transparent.
TRANSPARENT_PIXELS = {
    "gray of 1 bit": (dict(bits=1, is_gray=True, transparent=b"\0\0"), [0b10_000000], [255, 255]),
    "gray of 2 bits": (
        dict(bits=2, is_gray=True, transparent=b"\0\1"), [0b00_01_10_11], [0, 255, 170, 255]
    ),
    "gray of 4 bits": (
        dict(bits=4, is_gray=True, transparent=b"\0\5"), [0x05, 0xAF], [0, 255, 170, 255]
    ),
    "gray of 8 bits": (dict(is_gray=True, transparent=b"\0\5"), [0, 5, 10], [0, 255, 10]),
    "gray of 16 bits": (
        dict(bits=16, is_gray=True, transparent=b"\3\xe8"), [0xEA, 0x60, 3, 0xE8], [233, 255]
    ),
    "color of 8 bits": (dict(transparent=b"\0\7" * 3), [9, 9, 9, 7, 7, 7], [9, 255]),
    "color of 16 bits": (
        dict(bits=16, transparent=b"\x12\x34" * 3),
        [0x34, 0x34] * 3 + [0x12, 0x34] * 3,
        [0x34, 255],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TRANSPARENT_PIXELS)
def test_the_color_that_a_png_declares_transparent_is_white(kind: str, tmp_path: Path) -> None:
    options, row, wanted = TRANSPARENT_PIXELS[kind]
    path = tmp_path / "a.png"
    path.write_bytes(write_png(len(wanted), 1, bytes([0, *row]), **options))
    for given in (path, Image.open(path)):
        assert np.asarray(load_images(given))[0].tolist() == [[value] * 3 for value in wanted]


def test_a_batch_in_one_array_or_in_lists_equals_a_list_of_its_images(
    processor: LLM2CLIPProcessor,
) -> None:
    images = np.stack([np.asarray(draw_noise()), np.asarray(draw_noise())[::-1]])
    wanted = processor(images=list(images))["pixel_values"]
    for batch in (images, [[images[0]], (images[1],)], [list(images)]):
        assert torch.equal(processor(images=batch)["pixel_values"], wanted)
    with pytest.raises(ValueError, match="image number 1 has float64"):
        processor(images=images / 255)
