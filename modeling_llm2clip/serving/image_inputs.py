"""Reads and decodes the images in requests: base64, data URLs and, if enabled, web URLs."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from ..configs.serve_config import ServeConfig
from ..data.images.image_sources import register_heif_reader
from ..image_loading_llm2clip import (
    ImageLimits,
    ImageTooLargeError,
    get_image_limits,
    load_images,
    read_image_header,
)
from .service_results import RequestError

if TYPE_CHECKING:
    from .url_fetching import UrlFetcher

_AT_ONCE = 8  # per request; each may be a URL to fetch
_WANTED = "Send a data URL such as data:image/jpeg;base64,…."
_SHOWN = 40  # characters of an input in an error
_WHITESPACE = {ord(char): None for char in " \t\r\n"}


class ImageInputs:
    """Reads the images in requests, within the server's limits."""

    def __init__(self, config: ServeConfig) -> None:
        self._limits = limits = get_image_limits(**config.list_limits())
        self._max_bytes = int(limits.max_image_mb * 1e6)
        self._max_total = int(config.max_request_mb * 1e6)
        self._fetcher: UrlFetcher | None = None
        if config.image_urls:
            from .url_fetching import UrlFetcher  # needs packages from the `serve` extra

            self._fetcher = UrlFetcher(max_bytes=self._max_bytes, timeout_s=limits.max_download_s)

    async def read(self, images: Sequence[str]) -> list[bytes]:
        """Return the bytes of images given as data URLs, web URLs or plain base64, in order."""
        contents: list[bytes] = []
        for start in range(0, len(images), _AT_ONCE):
            part = images[start : start + _AT_ONCE]
            contents += await asyncio.gather(*map(self._read_one, part))
            if sum(map(len, contents)) > self._max_total:
                raise RequestError(
                    413,
                    f"The images in this request exceed {self._max_total / 1e6:g} MB "
                    "(--max-request-mb). Send fewer images per request.",
                    code="request_too_large",
                )
        return contents

    async def _read_one(self, image: str) -> bytes:
        scheme = image[:8].lower()
        if scheme.startswith(("http://", "https://")):
            if self._fetcher is None:
                raise _refuse(
                    f"This server does not fetch images from URLs (--image-urls). {_WANTED}",
                    code="url_not_allowed",
                )
            return await self._fetcher.fetch(image)
        text = image
        if scheme[:5] == "data:":
            header, comma, text = image.partition(",")
            if not comma or not header.lower().endswith(";base64"):
                raise _refuse(f"A data URL is not base64-encoded ({image[:_SHOWN]!r}). {_WANTED}")
        try:
            content = base64.b64decode(text.translate(_WHITESPACE), validate=True)
        except ValueError:  # also for non-ASCII characters
            raise _refuse(f"An image is not valid base64 ({text[:_SHOWN]!r}). {_WANTED}") from None
        self.require_size(content)
        return content

    def require_size(self, content: bytes) -> None:
        """Raise RequestError if an image is empty or too large."""
        if not content:
            raise _refuse("An image is empty.")
        if len(content) > self._max_bytes:
            raise RequestError(
                413,
                f"An image is larger than {self._max_bytes / 1e6:g} MB. Shrink it, or start the "
                "server with a larger --max-image-mb.",
                code="image_too_large",
            )

    def measure(self, content: bytes) -> dict[str, int]:
        """Return the size in the header of an image that was decoded before, in immich's fields."""
        with read_image_header(io.BytesIO(content), name="image", limits=self._limits) as image:
            return {"imageHeight": image.height, "imageWidth": image.width}


def decode_sent_image(content: bytes, limits: ImageLimits) -> Image.Image:
    """Decode a request's image as upright RGB; raise RequestError if it exceeds the limits."""
    register_heif_reader()
    name = "An image in the request"
    try:
        with read_image_header(io.BytesIO(content), name=name, limits=limits) as image:
            decoded: Image.Image = load_images(image, limits=limits)
            return decoded
    except ImageTooLargeError as error:
        raise RequestError(413, str(error), code="image_too_large") from error
    except ValueError as error:
        raise _refuse(str(error)) from error


def _refuse(message: str, *, code: str = "invalid_image") -> RequestError:
    return RequestError(400, message, code=code)
