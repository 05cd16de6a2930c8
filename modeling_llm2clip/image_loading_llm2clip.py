"""Loads images from any source as upright RGB on white. No other module decodes pixels.

Every image is decoded in full. So it has the same pixels in training, extraction, evaluation and
search, and in a pipeline or sentence-transformers.

Uploaded with the weights.
"""

from __future__ import annotations

import http.client
import io
import os
import urllib.request
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Errors of Pillow's decoders, which differ by format.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, EOFError)
# Errors of urllib, http and sockets; ValueError is for an invalid URL.
_FETCH_ERRORS = (OSError, http.client.HTTPException, ValueError)
_FETCH_TIMEOUT_S = 30
_ORIENTATION = 0x0112  # of the EXIF standard; 1 is upright
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_UNSCALED = "do_rescale=False requires floats in [0, 1]; give those, or leave it out."
_MOST_SHOWN = 200  # characters of a path in an error message
# The longer side, in shorter ones: resizing the shorter side would make a strip of 60,000 × 1
# pixels, a file of 100 bytes, fill gigabytes.
_MOST_TIMES_LONGER = 100


def load_images(images: Any, *, rescales: bool | None = True) -> Any:
    """Load one image or a list of images as RGB.

    PIL images, paths and URLs become PIL images; arrays and tensors keep their type. Transparency
    becomes white, 16 bits are scaled to 8, EXIF rotation is applied, and the first frame of an
    animation is taken.

    Args:
        images: one image or a list: PIL images, paths, URLs, or RGB arrays and tensors of shape
            (H, W, 3) or (3, H, W). A 4-dimensional batch of these is read as a list.
        rescales: whether the image processor divides pixels by 255. True accepts integers, False
            floats in [0, 1]. None is for an image processor that never does, and accepts both.

    Returns:
        One image for one image, a list for a list.

    Raises:
        ValueError: an image is missing, corrupt, too large, more than 100 times longer than wide,
            or has pixels of an unknown range. The message names the first eight of these and counts
            the others.

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
    if len(getattr(images, "shape", ())) == 4:
        images = list(images)
    if not isinstance(images, list | tuple):
        return _load_image(images, 0, rescales=rescales)
    if not images:
        raise ValueError("images is an empty list; give at least one image.")
    loaded, errors = [], []
    for number, image in enumerate(images):
        try:
            loaded.append(_load_image(image, number, rescales=rescales))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        more = f"\nand {len(errors) - 8} more" if len(errors) > 8 else ""
        raise ValueError("\n".join(errors[:8]) + more)
    return loaded


def unpack_pixels(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Copy the pixels of an image channel by channel.

    It takes a third of the time of `np.array` and a transposition, of which torch makes another
    copy.

    Args:
        image: an RGB image.

    Returns:
        (3, H, W), contiguous.
    """
    pixels = np.empty((len(image.mode), image.height, image.width), np.uint8)
    for channel, name in zip(pixels, image.mode, strict=True):
        channel[:] = np.frombuffer(image.tobytes("raw", name), np.uint8).reshape(channel.shape)
    return pixels


def _load_image(image: Any, number: int, *, rescales: bool | None) -> Any:
    if hasattr(image, "shape") and hasattr(image, "dtype"):
        return _check_array(image, f"image number {number}", rescales=rescales)
    if isinstance(image, str | os.PathLike):
        loaded = _open_image(os.fspath(image))
    elif isinstance(image, Image.Image):
        loaded = _decode(image, getattr(image, "filename", "") or f"image number {number}")
    else:
        in_memory = isinstance(image, bytes | memoryview | io.IOBase)
        remedy = " Open it with PIL.Image.open, bytes as io.BytesIO." if in_memory else ""
        raise ValueError(
            f"Image number {number} is {type(image).__name__}; give a PIL image, a path, a URL, "
            f"an array or a tensor.{remedy}"
        )
    if rescales is False:
        raise ValueError(f"Image number {number} has 8 bits per channel. {_UNSCALED}")
    return loaded


def _check_array(image: Any, name: str, *, rescales: bool | None) -> Any:
    """Reject pixels of unknown layout or range, and scale 16 bits to 8.

    The values of floats do not reveal their range: a dark image in [0, 255] is a bright one in
    [0, 1].
    """
    shape = tuple(image.shape)
    if len(shape) != 3 or 0 in shape or (shape[0] == 3) == (shape[2] == 3):
        raise ValueError(
            f"{name} is an array of shape {shape}; give RGB as (H, W, 3) or (3, H, W). Convert "
            "grayscale or transparent pixels with PIL.Image.fromarray first."
        )
    _require_no_strip(*(shape[1:] if shape[0] == 3 else shape[:2]), name)
    image = image.detach() if hasattr(image, "detach") else image
    dtype = getattr(image.dtype, "name", str(image.dtype).removeprefix("torch."))
    if dtype in ("uint8", "uint16") and rescales is False:
        raise ValueError(f"{name} has {dtype} pixels. {_UNSCALED}")
    if dtype not in ("uint8", "uint16"):
        _check_floats(image, dtype, name, rescales=rescales)
    if dtype == "bfloat16":  # NumPy lacks it
        image = image.float()
    if dtype == "uint16":
        pixels = np.asarray(image.cpu() if hasattr(image, "cpu") else image)
        image = (pixels // 257).astype(np.uint8)
    if shape[0] == 1:  # one row of pixels would be read as one channel
        image = image.permute(2, 0, 1) if hasattr(image, "permute") else image.transpose(2, 0, 1)
    return image


def _require_no_strip(width: int, height: int, name: str) -> None:
    if max(width, height) > _MOST_TIMES_LONGER * min(width, height):
        raise ValueError(
            f"{name}: one side of {width} × {height} pixels is more than {_MOST_TIMES_LONGER} "
            "times longer than the other. Crop the image."
        )


def _check_floats(image: Any, dtype: str, name: str, *, rescales: bool | None) -> None:
    if "float" not in dtype or rescales:
        raise ValueError(
            f"{name} has {dtype} pixels, whose range is unknown. Give uint8 (0 to 255), uint16 "
            "(0 to 65535), or floats in [0, 1] together with do_rescale=False."
        )
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise ValueError(
            f"{name} has pixels from {low:g} to {high:g}; with do_rescale=False they must be in "
            "[0, 1]."
        )


def _open_image(path: str) -> Image.Image:
    if path.startswith("data:"):
        raise ValueError(
            f"{path[:40]}…: data URIs are not supported. Decode it (base64.b64decode), and open "
            "the bytes with PIL.Image.open(io.BytesIO(…))."
        )
    # transformers' load_image would turn transparency black and clip 16 bits.
    source = _fetch(path) if path.lower().startswith(("http://", "https://")) else path
    if source is path and not os.path.isfile(path):  # noqa: PTH113  # False for an invalid path
        raise ValueError(f"{path[:_MOST_SHOWN]}: no such image. Correct the path.")
    with read_image_header(source, name=path) as image:
        return _decode(image, path)


def read_image_header(source: Any, *, name: str) -> Image.Image:
    """Open an image without decoding it.

    Args:
        source: a path or a binary file, as `PIL.Image.open` takes it.
        name: name of the image in error messages.

    Returns:
        The image, which is decoded on first use.

    Raises:
        ValueError: it is not an image, its header is corrupt, or it has more pixels than Pillow
            considers safe.
    """
    try:
        return Image.open(source)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: not an image that Pillow can read, or empty.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {error} Shrink the image first.") from error
    except _DECODER_ERRORS as error:
        from_system = getattr(error, "errno", None) is not None  # such as a missing permission
        problem = "cannot be read" if from_system else "the image is truncated or corrupt"
        raise ValueError(f"{name}: {problem} ({error}).") from error


def _fetch(address: str) -> io.BytesIO:
    request = urllib.request.Request(address, headers={"User-Agent": "modeling_llm2clip"})
    try:
        with urllib.request.urlopen(request, timeout=_FETCH_TIMEOUT_S) as response:
            return io.BytesIO(response.read())
    except _FETCH_ERRORS as error:
        raise ValueError(f"{address}: the image cannot be downloaded ({error}).") from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    """Decode in full, apply EXIF rotation, and convert to RGB on white."""
    if 0 in image.size:
        raise ValueError(f"{name}: the image has no pixels ({image.size}).")
    _require_no_strip(*image.size, name)
    try:
        image.load()
        if image.getexif().get(_ORIENTATION, 1) != 1:  # Pillow would copy an upright one
            image = ImageOps.exif_transpose(image)
    except _DECODER_ERRORS as error:
        raise ValueError(f"{name}: the image is truncated or corrupt ({error}).") from error
    except (AssertionError, AttributeError) as error:  # Pillow's errors for a closed file
        raise ValueError(f"{name}: the image's file is closed. Open it again.") from error
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BIT_MODES:
        return _scale_sixteen_bit(image, name)
    if image.mode == "F":
        raise ValueError(
            f"{name}: float pixels have an unknown range. Convert the image to 8 or 16 bits."
        )
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _scale_sixteen_bit(image: Image.Image, name: str) -> Image.Image:
    # Pillow's conversion clips at 255, which would turn almost every image white.
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(
            f"{name}: pixels are outside [0, 65535]. Convert the image to 8 or 16 bits."
        )
    # PNG may declare one gray value transparent.
    pixels[pixels == image.info.get("transparency", -1)] = 65535
    return Image.fromarray((pixels // 257).astype(np.uint8)).convert("RGB")
