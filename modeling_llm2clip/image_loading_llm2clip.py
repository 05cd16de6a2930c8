"""Loads images from any source as upright RGB on white. No other module decodes pixels.

Every image is decoded in full unless a store or an index records otherwise, so its pixels are the
same in training, extraction, evaluation, search, serving, and the saved processor. Pipelines of
transformers decode images themselves: they drop the alpha channel and clip 16-bit pixels.

Uploaded with the weights.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import json
import os
import re
import socket
import struct
import time
import urllib.request
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# The limits are kept in the environment because worker processes inherit it, and the copy of this
# module in a model folder reads it as well.
LIMITS_VARIABLE = "LLM2CLIP_IMAGE_LIMITS"
# Errors of Pillow's decoders, which differ by format; most mean that a tag has an unexpected type.
DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, RuntimeError, EOFError, TypeError, LookupError,
    ArithmeticError, struct.error,
)  # fmt: skip
# Errors of urllib, http and sockets; ValueError means an invalid URL.
_FETCH_ERRORS = (OSError, http.client.HTTPException, ValueError)
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_MOST_SHOWN = 200  # characters of a path in an error message
_READ_AS_CHANNELS = (1, 2, 4)
_PILLOWS_OWN = 2**30 // 4 // 3  # pixels; Pillow warns above this by default
IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
_WEB = ("http://", "https://")
_CHUNK_BYTES = 2**16  # per read of a download
# IPv6 forms of the IPv4 addresses in their last 32 bits. In an IPv6-only network, DNS returns one
# for every IPv4 host (RFC 6052).
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")
_UNICAST = ipaddress.IPv6Network("2000::/3")  # all public IPv6 addresses (RFC 4291)
# Networks that some Python versions' `is_global` accepts, and IPv6 addresses that embed an IPv4
# address, which may be private.
_NEVER_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "192.0.0.0/24",  # protocol assignments (RFC 6890)
            "192.88.99.0/24",  # relays of 6to4 (RFC 7526)
            "2002::/16",  # 6to4 (RFC 3056)
            "2001::/32",  # Teredo (RFC 4380)
            "3fff::/20",  # documentation (RFC 9637)
        ),
    )
)
_BAND_PIXELS = 2**22
# TIFF tags, and one tag's value.
_TILE_SIDES, _BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = (322, 323), 258, 262, 0
_GRAY_MAXIMA = {"L;2": 3, "L;4": 15}  # by Pillow's name for the file's pixel format
_MOST_SEGMENTS = 10_000  # per JPEG
_END_OF_IMAGE, _START_OF_SCAN = 0xD9, 0xDA
_WITHOUT_LENGTH = (0x01, 0xD8)
# Any marker except an escaped pixel byte (FF00), a restart within a scan, or a fill byte.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


class ImageTooLargeError(ValueError):
    """An image has more pixels or bytes than `ImageLimits` allows."""


@dataclass(frozen=True)
class ImageLimits:
    """Limits on the images to decode; any other image is rejected based on its header.

    Args:
        max_megapixels: Maximum size of a decoded image, in millions of pixels. Cameras produce up
            to 151 megapixels; decoding an image of this size takes up to 1.5 GB.
        max_image_mb: Maximum size of an encoded image, in MB.
        max_aspect_ratio: Maximum ratio of the longer side to the shorter. A strip of 60,000 × 1
            pixels, a file of 100 bytes, would take gigabytes once its shorter side is resized.
        max_jpeg_scans: Maximum number of scans in a JPEG. Progressive files have about ten scans,
            but a few more bytes can force another pass over all pixels.
        max_download_s: Maximum seconds for downloading an image from a URL.
        formats: Accepted file formats, by Pillow's names. For some other formats, Pillow runs
            external programs, such as Ghostscript for EPS.
    """

    max_megapixels: float = 160
    max_image_mb: float = 1000
    max_aspect_ratio: float = 100
    max_jpeg_scans: int = 100
    max_download_s: float = 60
    formats: tuple[str, ...] = (
        "AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "JXL", "MPO", "PNG", "PPM", "TIFF",
        "WEBP",
    )  # fmt: skip

    def __post_init__(self) -> None:
        object.__setattr__(self, "formats", tuple(self.formats))
        numbers = {name: value for name, value in asdict(self).items() if name != "formats"}
        for name, value in numbers.items():
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name}={value!r} must be a number above 0.")


def get_image_limits(**changes: Any) -> ImageLimits:
    """Return the limits of this process, which are set, inherited from its parent, or the defaults.

    Args:
        **changes: Fields of `ImageLimits` to override in the result.

    Raises:
        ValueError: The environment variable `LLM2CLIP_IMAGE_LIMITS` is not a JSON object with
            fields of `ImageLimits`.

    Examples:
        >>> get_image_limits().max_jpeg_scans
        100
    """
    return replace(_parse_limits(os.environ.get(LIMITS_VARIABLE, "{}")), **changes)


def set_image_limits(limits: ImageLimits) -> None:
    """Set the limits for all threads of this process and for processes started from now on.

    Args:
        limits: The new limits, which `get_image_limits` will return.

    Examples:
        >>> set_image_limits(get_image_limits(max_megapixels=160))
    """
    os.environ[LIMITS_VARIABLE] = json.dumps(asdict(limits))


@lru_cache(maxsize=8)
def _parse_limits(text: str) -> ImageLimits:
    try:
        return ImageLimits(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{LIMITS_VARIABLE}={text[:_MOST_SHOWN]!r} must be a JSON object with fields of "
            f'ImageLimits, such as {{"max_megapixels": 300}} ({error}).'
        ) from None


def load_images(
    images: Any, *, limits: ImageLimits | None = None, min_jpeg_side: int | None = None
) -> Any:
    """Load one image or a list of images as RGB.

    PIL images, paths and URLs become PIL images; arrays and tensors keep their type. Transparency
    becomes white, 12- and 16-bit pixels are scaled to 8 bits, EXIF rotation is applied, only the
    first frame of an animation or page of a TIFF is read, and color profiles (ICC) are ignored, as
    in the transforms that CLIP models are trained and published with.

    Args:
        images: One image or a list: PIL images, paths, web and `data:` URLs, or RGB arrays and
            tensors of shape (H, W, 3) or (3, H, W). A 4-dimensional batch is read as a list.
        limits: Limits on encoded images. Default: `get_image_limits()`.
        min_jpeg_side: Decode JPEGs at a half, a quarter or an eighth of their size, as long as both
            sides keep at least this many pixels. Default: decode in full.

    Returns:
        A single image if one was passed, a list if a list was passed.

    Raises:
        ImageTooLargeError: A single image was passed that is too large.
        ValueError: An image is missing, corrupt, beyond the limits, or has pixels of an unknown
            range. The message names the first eight invalid images and counts the rest.

    Examples:
        >>> from PIL import Image
        >>> image = load_images(Image.new("RGBA", (2, 2)))  # transparent
        >>> image.mode, image.getpixel((0, 0))
        ('RGB', (255, 255, 255))
        >>> load_images(["nowhere.png"])
        Traceback (most recent call last):
            ...
        ValueError: nowhere.png: no such image. Correct the path.
    """
    limits = limits or get_image_limits()
    if len(getattr(images, "shape", ())) == 4:
        images = list(images)
    if not isinstance(images, list | tuple):
        return _load_image(images, 1, limits, min_jpeg_side)
    if not images:
        raise ValueError("images is an empty list. Pass at least one image.")
    loaded, errors = [], []
    for number, image in enumerate(images, start=1):
        try:
            loaded.append(_load_image(image, number, limits, min_jpeg_side))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        more = f"\nand {len(errors) - 8} more" if len(errors) > 8 else ""
        raise ValueError("\n".join(errors[:8]) + more)
    return loaded


def unpack_pixels(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Copy the pixels of an RGB image channel by channel, (3, H, W).

    This takes a third of the time of `np.array` and a transpose, which torch would copy again.
    """
    pixels = np.empty((len(image.mode), image.height, image.width), np.uint8)
    for channel, name in zip(pixels, image.mode, strict=True):
        channel[:] = np.frombuffer(image.tobytes("raw", name), np.uint8).reshape(channel.shape)
    return pixels


def _load_image(image: Any, number: int, limits: ImageLimits, min_jpeg_side: int | None) -> Any:
    if hasattr(image, "shape") and hasattr(image, "dtype"):
        return _check_array(image, f"image number {number}", limits)
    if isinstance(image, str | os.PathLike):
        return _open_image(os.fspath(image), limits, min_jpeg_side)
    if isinstance(image, Image.Image):
        return _decode(
            image,
            getattr(image, "filename", "") or f"image number {number}",
            limits,
            min_jpeg_side,
        )
    raise ValueError(
        f"Image number {number} must be a PIL image, a path, a URL, an array or a tensor, not "
        f"{type(image).__name__}. Use PIL.Image.open for open files, and for bytes in io.BytesIO."
    )


def _check_array(image: Any, name: str, limits: ImageLimits) -> Any:
    """Reject pixels of unknown layout or range, and scale 16 bits to 8.

    Floats do not reveal their range: a dark image in [0, 255] can have the same values as a bright
    image in [0, 1].
    """
    shape = tuple(image.shape)
    if len(shape) != 3 or 0 in shape or (shape[0] == 3) == (shape[2] == 3):
        raise ValueError(
            f"{name} is an array of shape {shape}, but RGB must be (H, W, 3) or (3, H, W). Convert "
            "grayscale or transparent pixels with PIL.Image.fromarray first."
        )
    _require_no_strip(*(shape[1:] if shape[0] == 3 else shape[:2]), name, limits)
    dtype = getattr(image.dtype, "name", str(image.dtype).removeprefix("torch."))
    if dtype not in ("uint8", "uint16"):
        raise ValueError(
            f"{name} has {dtype} pixels, whose range is unknown. Use uint8 (0 to 255) or uint16 "
            "(0 to 65535). For floats in [0, 1], convert (image * 255).round() to uint8, or call "
            "the processor with do_rescale=False."
        )
    if dtype == "uint16":
        pixels = np.asarray(image.cpu() if hasattr(image, "cpu") else image)
        image = (pixels // 257).astype(np.uint8)
    if 1 in shape:  # torch misreads a column of pixels if its strides do not match its shape
        image = image.reshape(-1).reshape(shape)
    if shape[0] in _READ_AS_CHANNELS:  # image processors would mistake the rows for channels
        image = image.permute(2, 0, 1) if hasattr(image, "permute") else image.transpose(2, 0, 1)
    return image


def _require_no_strip(width: int, height: int, name: str, limits: ImageLimits) -> None:
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise ValueError(
            f"{name}: one side of {width} × {height} pixels is more than "
            f"{limits.max_aspect_ratio:g} times longer than the other. Crop the image."
        )


def _open_image(path: str, limits: ImageLimits, min_jpeg_side: int | None) -> Image.Image:
    # transformers' load_image would turn transparency black and clip 16 bits.
    is_data = path[:5].lower() == "data:"
    name = f"{path[:40]}…" if is_data else path
    source = _fetch(path, name, limits) if is_data or path.lower().startswith(_WEB) else path
    if source is path and not os.path.isfile(path):  # noqa: PTH113  # False for an invalid path
        raise ValueError(f"{path[:_MOST_SHOWN]}: no such image. Correct the path.")
    with read_image_header(source, name=name, limits=limits) as image:
        return _decode(image, name, limits, min_jpeg_side)


def read_image_header(source: Any, *, name: str, limits: ImageLimits | None = None) -> Image.Image:
    """Open an image without decoding it, and check its header; no other code opens images.

    `source` is a path or binary file, as in `PIL.Image.open`, or an image that `PIL.Image.open`
    returned.
    """
    limits = limits or get_image_limits()
    if isinstance(source, Image.Image):
        _require_within(source, name, limits)
        return source
    Image.init()  # otherwise an unknown name in `formats` raises KeyError
    known = [form for form in limits.formats if form in Image.OPEN]
    # Let Pillow open all that the limits allow, unless the user set its maximum. Pillow refuses
    # images of more than twice its maximum.
    if Image.MAX_IMAGE_PIXELS == _PILLOWS_OWN and limits.max_megapixels * 1e6 > 2 * _PILLOWS_OWN:
        Image.MAX_IMAGE_PIXELS = int(limits.max_megapixels * 5e5) + 1
    try:
        _require_few_bytes(_count_bytes(source), name, limits)
        image = Image.open(source, formats=known)
    except ImageTooLargeError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{name}: not an image that Pillow can read, or empty. Formats: {', '.join(known)}."
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(f"{name}: {error} Shrink the image first.") from error
    except DECODER_ERRORS as error:
        from_system = getattr(error, "errno", None) is not None  # for example permission denied
        problem = "cannot be read" if from_system else "the image is truncated or corrupt"
        raise ValueError(f"{name}: {problem} ({error}).") from error
    try:
        _require_within(image, name, limits)
    except ValueError:
        image.close()
        raise
    return image


def _count_bytes(source: Any) -> int:
    if isinstance(source, str | os.PathLike):
        return os.path.getsize(source)  # noqa: PTH202  # it may be a string
    count: int = source.seek(0, io.SEEK_END)
    source.seek(0)
    return count


def _require_few_bytes(count: int, name: str, limits: ImageLimits) -> None:
    if count > limits.max_image_mb * 1e6:
        raise ImageTooLargeError(
            f"{name}: the image file is larger than {limits.max_image_mb:g} MB. Shrink it, or "
            "raise max_image_mb."
        )


def _require_within(image: Image.Image, name: str, limits: ImageLimits) -> None:
    """Raise ValueError if an encoded image must not be decoded."""
    if image.format not in (*limits.formats, None):
        raise ValueError(
            f"{name}: {image.format} is not one of the supported formats "
            f"({', '.join(limits.formats)}). Convert the image."
        )
    # A TIFF states the size of its tiles separately, and a decoder allocates at least one tile.
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    tile = tuple(tags.get(side, 0) for side in _TILE_SIDES)
    for width, height in (image.size, tile):
        if width * height > limits.max_megapixels * 1e6:
            raise ImageTooLargeError(
                f"{name}: {width} × {height} pixels are more than {limits.max_megapixels:g} "
                "million. Shrink the image, or raise max_megapixels."
            )
    if image.width and image.height:
        _require_no_strip(*image.size, name, limits)
    if image.format in ("JPEG", "MPO") and _has_too_many_scans(_read_all(image), limits):
        raise ValueError(
            f"{name}: the JPEG has more than {limits.max_jpeg_scans} scans, each a pass over all "
            "pixels. Save it again."
        )


def _read_all(image: Image.Image) -> bytes:
    """Return an image's encoded bytes; empty if it is already decoded or its file is closed."""
    file: Any = getattr(image, "fp", None)
    if file is None or file.closed:
        return b""
    place = file.tell()
    file.seek(0)
    content: bytes = file.read()
    file.seek(place)
    return content


def _has_too_many_scans(content: bytes, limits: ImageLimits) -> bool:
    """Return whether a JPEG has too many scans, reading its segments the way libjpeg does.

    Reading stops at the end of the first image. Cameras append other content, such as a video,
    which may contain the bytes of a marker by chance.
    """
    if content.count(b"\xff\xda") <= limits.max_jpeg_scans:  # an upper bound on the scans
        return False
    num_scans = place = 0
    for _ in range(_MOST_SEGMENTS):
        match = _MARKER.search(content, place)
        marker = _END_OF_IMAGE if match is None else content[match.end() - 1]
        if match is None or marker == _END_OF_IMAGE:
            return False
        num_scans += marker == _START_OF_SCAN
        if num_scans > limits.max_jpeg_scans:
            return True
        place = match.end()
        if marker not in _WITHOUT_LENGTH:
            place += max(int.from_bytes(content[place : place + 2], "big"), 2)
    return True


def _fetch(address: str, name: str, limits: ImageLimits) -> io.BytesIO:
    request = urllib.request.Request(address, headers={"User-Agent": "modeling_llm2clip"})
    content, deadline = io.BytesIO(), time.monotonic() + limits.max_download_s
    opener = urllib.request.build_opener(_Downloader(deadline))
    try:
        with opener.open(request, timeout=limits.max_download_s) as response:
            while chunk := response.read1(_CHUNK_BYTES):
                content.write(chunk)
                _require_few_bytes(content.tell(), name, limits)
            # read1 ends without an error if the connection breaks.
            if getattr(response, "length", None):
                raise http.client.IncompleteRead(b"", response.length)
    except ImageTooLargeError:
        raise
    except _FETCH_ERRORS as error:
        reason = (
            f"more than {limits.max_download_s:g} seconds"
            if time.monotonic() >= deadline
            else error
        )
        raise ValueError(f"{name}: the image cannot be downloaded ({reason}).") from error
    return content


class _Downloader(
    urllib.request.HTTPHandler, urllib.request.HTTPSHandler, urllib.request.HTTPRedirectHandler
):
    """Ends a download at a deadline, and follows no redirect from the public web to other hosts."""

    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline

    def do_open(self, http_class: Any, req: Any, **options: Any) -> Any:
        def connect(host: str, **settings: Any) -> Any:
            connection = http_class(host, **settings)
            connection.response_class = partial(_read_response, deadline=self._deadline)
            return connection

        return super().do_open(connect, req, **options)

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if not newurl.lower().startswith(_WEB) or not (
            _is_proxied(request) or _is_web(newurl) or not _is_web(req.full_url)
        ):
            raise ValueError(f"it redirects to {newurl[:_MOST_SHOWN]}, which is not public")
        req.timeout = max(self._deadline - time.monotonic(), 0.001)  # for the next connection
        return request


def _is_proxied(request: Any) -> bool:
    """Return whether a request goes to a proxy, which itself resolves and checks the host."""
    proxies, bypasses = urllib.request.getproxies(), urllib.request.proxy_bypass(request.host)
    return request.type in proxies and not bypasses


def _is_web(url: str) -> bool:
    """Return whether all IP addresses of a URL's host are public."""
    return all(
        is_public(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]))
        for entry in socket.getaddrinfo(urlsplit(url).hostname, None, type=socket.SOCK_STREAM)
    )


def is_public(address: IpAddress) -> bool:
    """Return whether an IP address is on the public internet, not in a private network."""
    if address in _TRANSLATED:
        address = ipaddress.IPv4Address(int(address) % 2**32)
    return (
        (address.version == 4 or address in _UNICAST)
        and not any(address in network for network in _NEVER_PUBLIC)
        and address.is_global
        and not address.is_multicast
    )


def _read_response(sock: Any, *, deadline: float, **options: Any) -> http.client.HTTPResponse:
    response = http.client.HTTPResponse(sock, **options)
    response.fp = io.BufferedReader(_TimedReader(response.fp.detach(), sock, deadline))
    return response


class _TimedReader(io.RawIOBase):
    """Reads from a socket until a deadline, however slowly the bytes arrive."""

    def __init__(self, raw: Any, sock: socket.socket, deadline: float) -> None:
        self._raw, self._socket, self._deadline = raw, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._socket.settimeout(self._deadline - time.monotonic())  # ValueError once it has passed
        return self._raw.readinto(buffer)  # type: ignore[no-any-return]


def _decode(
    image: Image.Image, name: str, limits: ImageLimits, min_jpeg_side: int | None
) -> Image.Image:
    """Decode, apply EXIF rotation, and convert to RGB on white."""
    if 0 in image.size:
        raise ValueError(f"{name}: the image has no pixels ({image.size}).")
    _require_no_strip(*image.size, name, limits)
    if getattr(image, "fp", None) is not None:  # not decoded yet
        _require_within(image, name, limits)
    black, white = _find_black_and_white(image)  # read from the file, which a rotated copy lacks
    _scale_transparent_value(image)
    if min_jpeg_side is not None:
        image.draft(None, (min_jpeg_side, min_jpeg_side))  # other formats ignore it
    file = getattr(image, "filename", "")
    try:
        if file:  # Pillow memory-maps files that have a name, which scrambles a rotated TIFF
            setattr(image, "filename", "")  # noqa: B010  # a plain image has no such attribute
        image.load()
        if image.getexif().get(_ORIENTATION, 1) != 1:  # Pillow would copy an upright image
            image = ImageOps.exif_transpose(image)
    except DECODER_ERRORS as error:
        raise ValueError(f"{name}: the image is truncated or corrupt ({error}).") from error
    except (AssertionError, AttributeError) as error:  # Pillow's errors for a closed file
        raise ValueError(f"{name}: the image's file is closed. Open it again.") from error
    finally:
        if file:
            setattr(image, "filename", file)  # noqa: B010
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode[0] in "IF" and black == white:
        kind = "float" if image.mode == "F" else "32-bit integer"
        raise ValueError(
            f"{name}: {kind} pixels have an unknown range. Convert the image to 8 or 16 bits."
        )
    if image.mode[0] == "I":
        return _scale_to_eight_bits(image, name, black=black, white=white)
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        return _compose_on_white(image)
    return image.convert("RGB")


def _find_black_and_white(image: Image.Image) -> tuple[int, int]:
    """Return the values of black and white above 8 bits; (0, 0) if the file does not state them."""
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})  # TIFF, whose pixels Pillow does not rescale
        white = 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
        return (white, 0) if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else (0, white)
    # Pillow scales a PPM of more than 8 bits to 16 bits; a PNG in this mode always has 16.
    return (0, 65535) if image.format in ("PNG", "PPM") and image.mode == "I" else (0, 0)


def _scale_transparent_value(image: Image.Image) -> None:
    """Scale a PNG's transparent value the way Pillow scales its 2-, 4- and 16-bit pixels."""
    value, tile = image.info.get("transparency"), getattr(image, "tile", None)
    raw_mode = tile[0][3] if tile and image.format == "PNG" else None
    if isinstance(value, tuple) and max(value) > 255:
        image.info["transparency"] = tuple(channel >> 8 for channel in value)
    elif raw_mode in _GRAY_MAXIMA and isinstance(value, int) and value <= _GRAY_MAXIMA[raw_mode]:
        image.info["transparency"] = value * 255 // _GRAY_MAXIMA[raw_mode]


def _scale_to_eight_bits(image: Image.Image, name: str, *, black: int, white: int) -> Image.Image:
    # Pillow's conversion clips at 255, which would turn almost every image white.
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > max(black, white):
        raise ValueError(
            f"{name}: pixels are outside [0, {max(black, white)}]. Convert the image to 8 bits."
        )
    # Look up the 8-bit value of each pixel in a table; a PNG may declare one value transparent.
    scaled = abs(np.arange(max(black, white) + 1) - black) * 255 // max(black, white)
    if 0 <= (transparent := image.info.get("transparency", -1)) < len(scaled):
        scaled[transparent] = 255
    return Image.fromarray(scaled.astype(np.uint8)[pixels]).convert("RGB")


def _compose_on_white(image: Image.Image) -> Image.Image:
    """Put a transparent image on white, in bands because each step in Pillow makes a copy."""
    flat = Image.new("RGB", image.size)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        band = image.crop(box)
        band = (band.convert("LA") if band.mode == "La" else band).convert("RGBA")
        white = Image.new("RGBA", band.size, "white")
        flat.paste(Image.alpha_composite(white, band).convert("RGB"), box)
    return flat
