"""Image files that hardly any program writes: bombs, and pixels of more than 8 bits."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping

from tiny import draw_noise


def write_png_header(width: int, height: int) -> bytes:
    """A PNG that states its size and has next to no pixels: a decompression bomb."""
    return write_png(width, height, b"\0" * 100_000)


def write_png(
    width: int,
    height: int,
    rows: bytes,
    *,
    bits: int = 8,
    is_gray: bool = False,
    transparent: bytes | None = None,
) -> bytes:
    """A PNG of given rows, each with a filter byte, and the color that it declares transparent."""
    header = struct.pack(">IIBBBBB", width, height, bits, 0 if is_gray else 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    if transparent is not None:
        chunks.insert(1, (b"tRNS", transparent))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )  # fmt: skip


def write_gif(canvas: tuple[int, int], frame: tuple[int, int]) -> bytes:
    """The headers of a GIF whose first frame may be larger than its canvas."""
    return (
        b"GIF89a" + struct.pack("<2H", *canvas) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
        + b"," + struct.pack("<4H", 0, 0, *frame) + b"\0" + b"\x02\x02\x44\x01\0;"
    )  # fmt: skip


def write_progressive(num_scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated, and after whose end follows a video."""
    buffer = io.BytesIO()
    draw_noise().save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    last = content[content.rindex(b"\xff\xda") : -2]
    repeated = num_scans - content.count(b"\xff\xda")
    return content[:-2] + last * repeated + content[-2:] + b"\xff\xda" * 200


def write_tiff(width: int, height: int, content: bytes, tags: Mapping[int, int]) -> bytes:
    """A gray TIFF of one strip or tile, little-endian, with the given tags beside its size."""
    place = 324 if 322 in tags else 273  # of the offset of a tile or of a strip
    found = {256: width, 257: height, 259: 1, 262: 1, 277: 1, place: 8, **tags}
    found[325 if 322 in tags else 279] = len(content)
    if place == 273:
        found.setdefault(278, height)
    content += b"\0" * (len(content) % 2)
    entries = b"".join(
        struct.pack("<2H2I", tag, 4, 1, value) for tag, value in sorted(found.items())
    )
    start = struct.pack("<2sHI", b"II", 42, 8 + len(content))
    return start + content + struct.pack("<H", len(found)) + entries + b"\0\0\0\0"


def write_rotated_jpeg(tag: int, kind: int) -> bytes:
    """A JPEG whose EXIF has its orientation, and another tag of a type that it never has."""
    buffer = io.BytesIO()
    draw_noise().save(buffer, "JPEG")
    content = buffer.getvalue()
    tags = sorted([(274, 3, 1, 6), (tag, kind, 1, 0)])
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + b"".join(struct.pack("<2H2I", *t) for t in tags)
    exif += b"\0\0\0\0"
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:]


def write_tiff_of_lost_pixels(kind: int) -> bytes:
    """A TIFF of colors that states where its pixels begin, but not as an integer."""
    buffer = io.BytesIO()
    draw_noise().convert("P").save(buffer, "TIFF")
    content = buffer.getvalue()
    place = content.rindex(struct.pack("<2HI", 273, 4, 1))
    return content[: place + 2] + struct.pack("<H", kind) + content[place + 4 :]
