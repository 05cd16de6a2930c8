"""Images of requests: base64, data URLs and, where allowed, web URLs; and their safe decoding.

Only formats that images on the web and in cameras have are opened: Pillow runs other programs for
some, such as Ghostscript for EPS. The size in pixels is read off the header, before any is decoded.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from ..configs.serve_config import ServeConfig
from ..data.images.image_sources import register_heif_reader
from ..image_loading_llm2clip import load_images, read_image_header
from .errors import RequestError

if TYPE_CHECKING:
    from .url_fetching import UrlFetcher

FORMATS = frozenset(
    ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")
)  # fmt: skip
_AT_ONCE = 8  # of one request; each may be a URL to be fetched
_SHOWN = 40  # characters of an input in an error
# Progressive JPEGs have about ten scans; a few bytes suffice for one more pass over all pixels.
_MOST_SCANS = 100
_MOST_SEGMENTS = 10_000
_END_OF_IMAGE, _START_OF_SCAN = 0xD9, 0xDA
_WITHOUT_LENGTH = (0x01, 0xD8)
# Neither a byte of the pixels (FF00), nor one of the restarts within a scan, nor a fill byte.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_WHITESPACE = {ord(char): None for char in " \t\r\n"}


class ImageInputs:
    """Reads the images of requests.

    Args:
        config: Limits, and whether web URLs are fetched.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._max_bytes = int(config.max_image_mb * 1e6)
        self._max_total = int(config.max_request_mb * 1e6)
        self._fetcher: UrlFetcher | None = None
        if config.image_urls:
            from .url_fetching import UrlFetcher  # its packages come with the extra `serve`

            self._fetcher = UrlFetcher(
                networks=config.image_networks,
                max_bytes=self._max_bytes,
                timeout_s=config.timeout_s,
            )

    async def read(self, images: Sequence[str]) -> list[bytes]:
        """Return the encoded images, in their order.

        Args:
            images: Data URLs, web URLs, or plain base64.

        Raises:
            RequestError: One cannot be read or is too large.
        """
        contents: list[bytes] = []
        for start in range(0, len(images), _AT_ONCE):
            part = images[start : start + _AT_ONCE]
            contents += await asyncio.gather(*map(self._read_one, part))
            if sum(map(len, contents)) > self._max_total:
                raise RequestError(
                    413,
                    f"The images of one request have more than {self._max_total / 1e6:g} MB "
                    "(--max-request-mb). Send fewer in one request.",
                    code="request_too_large",
                )
        return contents

    async def _read_one(self, image: str) -> bytes:
        scheme = image[:8].lower()
        if scheme.startswith(("http://", "https://")):
            if self._fetcher is None:
                raise RequestError(
                    400,
                    "This server does not fetch images from URLs (--image-urls). Send a data URL, "
                    "data:image/jpeg;base64,….",
                    code="url_not_allowed",
                )
            return await self._fetcher.fetch(image)
        content = self._decode_base64(_strip_data_url(image) if scheme[:5] == "data:" else image)
        if not content:
            raise RequestError(400, "An image is empty.", code="invalid_image")
        return content

    def _decode_base64(self, text: str) -> bytes:
        if len(text) > self._max_bytes * 1.4:  # 4 characters are 3 bytes
            raise self._refuse_size()
        try:
            content = base64.b64decode(text.translate(_WHITESPACE), validate=True)
        except (binascii.Error, ValueError):  # the latter for what is not ASCII
            raise RequestError(
                400,
                f"An image is not valid base64 ({text[:_SHOWN]!r}). Send a data URL, "
                "data:image/jpeg;base64,….",
                code="invalid_image",
            ) from None
        if len(content) > self._max_bytes:
            raise self._refuse_size()
        return content

    def _refuse_size(self) -> RequestError:
        return RequestError(
            413,
            f"An image has more than {self._max_bytes / 1e6:g} MB. Shrink it, or start the server "
            "with a larger --max-image-mb.",
            code="image_too_large",
        )


def decode_image(content: bytes, *, max_megapixels: float) -> Image.Image:
    """Decode an image of a request, upright RGB as everywhere in this package.

    Args:
        content: The encoded image.
        max_megapixels: Maximum size.

    Raises:
        RequestError: It is not an image of one of `FORMATS`, is broken, is too large, or is a JPEG
            of more scans than any camera or program writes.
    """
    register_heif_reader()
    try:
        with read_image_header(io.BytesIO(content), name="An image of the request") as image:
            if image.format not in FORMATS:
                raise ValueError(
                    f"An image of the request is {image.format}; send one of {sorted(FORMATS)}."
                )
            width, height = image.size
            if width * height > max_megapixels * 1e6:
                raise RequestError(
                    413,
                    f"An image has {width} × {height} pixels, more than {max_megapixels:g} million "
                    "(--max-megapixels). Shrink it.",
                    code="image_too_large",
                )
            if image.format in ("JPEG", "MPO") and _has_too_many_scans(content):
                raise ValueError(
                    f"An image of the request is a JPEG of more than {_MOST_SCANS} scans, each of "
                    "which goes over all of its pixels. Save it anew."
                )
            decoded: Image.Image = load_images(image)
            return decoded
    except ValueError as error:
        raise RequestError(400, str(error), code="invalid_image") from error


def _has_too_many_scans(content: bytes) -> bool:
    """Go through the segments of a JPEG as libjpeg does, up to the end of its first image.

    What cameras append to it, such as a video, has the bytes of markers by chance.
    """
    if content.count(b"\xff\xda") <= _MOST_SCANS:  # the most that there can be
        return False
    num_scans = place = 0
    for _ in range(_MOST_SEGMENTS):
        found = _MARKER.search(content, place)
        marker = _END_OF_IMAGE if found is None else content[found.end() - 1]
        if found is None or marker == _END_OF_IMAGE:
            return False
        num_scans += marker == _START_OF_SCAN
        if num_scans > _MOST_SCANS:
            return True
        place = found.end()
        if marker not in _WITHOUT_LENGTH:
            place += max(int.from_bytes(content[place : place + 2], "big"), 2)
    return True


def _strip_data_url(url: str) -> str:
    """Return the base64 of a data URL."""
    header, comma, content = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise RequestError(
            400,
            f"A data URL is not base64 ({url[:_SHOWN]!r}). Send data:image/jpeg;base64,….",
            code="invalid_image",
        )
    return content
