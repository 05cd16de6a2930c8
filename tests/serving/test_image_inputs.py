"""Images of requests: what is read, and what is refused before it is decoded."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import numpy as np
import pytest
from odd_images import write_png_header
from PIL import Image
from served_apps import to_data_url, to_png
from tiny import draw_noise

from modeling_llm2clip.configs.serve_config import ServeConfig
from modeling_llm2clip.image_loading_llm2clip import ImageLimits, load_images
from modeling_llm2clip.serving.image_inputs import ImageInputs, decode_sent_image
from modeling_llm2clip.serving.service_results import RequestError

NOISE = draw_noise()
PNG = to_png(NOISE)


def read(*images: str, **limits: Any) -> list[bytes]:
    return asyncio.run(ImageInputs(ServeConfig(**limits)).read(images))


def refuse(image: str, **limits: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read(image, **limits)
    return caught.value


def test_data_urls_and_plain_base64_give_the_same_bytes() -> None:
    text = base64.b64encode(PNG).decode()
    wrapped = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    forms = [to_data_url(PNG), to_data_url(PNG, ""), f"DATA:image/png;BASE64,{text}", text, wrapped]
    assert read(*forms) == [PNG] * len(forms)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("data:image/png,abc", "not base64"),
        ("data:image/png;base64", "not base64"),
        ("data:;base64,", "empty"),
        ("not base64!", "not valid base64"),
        ("ünïcode", "not valid base64"),
        ("file:///etc/passwd", "not valid base64"),
        ("/etc/passwd", "not valid base64"),
        ("ftp://example.com/a.png", "not valid base64"),
        ("https://example.com/a.png", "does not fetch"),
        ("HTTP://example.com/a.png", "does not fetch"),
    ],
)
def test_what_is_not_an_image_of_a_request_is_refused(image: str, message: str) -> None:
    error = refuse(image)
    assert error.status == 400
    assert message in error.message


def test_a_large_file_is_refused() -> None:
    assert refuse(to_data_url(b"x" * 1001), max_image_mb=0.001).status == 413
    assert read(to_data_url(b"x" * 1000), max_image_mb=0.001)


def decode(content: bytes, max_megapixels: float = 1) -> Any:
    return decode_sent_image(content, ImageLimits(max_megapixels=max_megapixels))


@pytest.mark.parametrize("size", [(1001, 1000), (12_000, 12_000), (60_000, 60_000)])
def test_decompression_bombs_are_refused_by_their_header(size: tuple[int, int]) -> None:
    """Above one million pixels here; Pillow itself refuses the last one."""
    with pytest.raises(RequestError, match=r"pixels|Shrink") as caught:
        decode(write_png_header(*size))
    assert caught.value.status == 413


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_pixels_are_those_of_the_package(form: str) -> None:
    buffer = io.BytesIO()
    NOISE.save(buffer, form)
    expected = load_images(Image.open(io.BytesIO(buffer.getvalue())))
    assert np.array_equal(np.asarray(decode(buffer.getvalue())), np.asarray(expected))


@pytest.mark.parametrize("form", ["EPS", "ICO", "PCX", "TGA"])
def test_other_formats_are_refused(form: str) -> None:
    """Pillow runs Ghostscript for EPS."""
    buffer = io.BytesIO()
    NOISE.save(buffer, form)
    with pytest.raises(RequestError, match=r"send one of|not an image") as caught:
        decode(buffer.getvalue())
    assert caught.value.status == 400


@pytest.mark.parametrize("content", [b"", b"GIF89a", PNG[: len(PNG) // 2], b"\xff\xd8\xff" * 50])
def test_broken_images_are_refused(content: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        decode(content)
    assert caught.value.status == 400
