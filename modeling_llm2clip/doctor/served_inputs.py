"""Test inputs, besides the golden inputs, that reveal whether a server silently changes inputs."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache, partial

import numpy as np
from PIL import Image

from ..model_folders.golden_embeddings import render_golden_images

# Each contains something that libraries and gateways rewrite: line breaks, repeated spaces,
# no-break and zero-width spaces, ligatures and other compatibility characters, decomposed and
# precomposed accents, emoji, typographic quotes, markup, and a pair that differs only in case.
EXACT_TEXTS = (
    "Two lines:\na red dog,\n\nand a cat.",
    "A list\r\nof two\tcolumns  and   spaces",
    "10\u00a0km to Tokyo,\u3000by a red\u200btrain",
    "The ﬁrst oﬃce of №5, ½ price, ５ m²",
    "Cafe\u0301 con leche, man\u0303ana",
    "Ångström, naïve façade, São Paulo",
    "👩\u200d🚀 with a 🐕 at the door ☕\ufe0f",
    "“Curly” quotes — it’s a dash…",
    'Q&amp;A: <b>5 > 3</b> & "so on"',
    "the White House",
    "the white house",
    "  a dog at the edge  ",
)
_REWRITINGS: tuple[Callable[[str], str], ...] = (
    str.lower,
    lambda text: text.replace("\n", " "),
    lambda text: " ".join(text.split()),
    partial(unicodedata.normalize, "NFC"),
    partial(unicodedata.normalize, "NFKC"),
    partial(re.sub, r"[^\w\s]", ""),
)
# COCO's most common size, odd dimensions, a large one, a small one, and an elongated one.
_SIZES = ((640, 427), (333, 501), (1280, 853), (61, 47), (700, 96))
_EXIF_ORIENTATION, _ROTATED = 0x0112, 6
_PATCH = 24  # height in pixels of each patch in the near-duplicate photograph
_CELLS = (64, 1)  # cell sizes of the coarse and fine noise, in pixels


def list_exact_texts() -> list[str]:
    """List the texts that servers tend to rewrite, each followed by its rewritten variants.

    A cache keyed by rewritten texts would return the same embedding for a text and its variant.
    """
    return list(
        dict.fromkeys(
            changed
            for text in EXACT_TEXTS
            for changed in (text, *(rewrite(text) for rewrite in _REWRITINGS))
        )
    )


@cache
def render_small() -> tuple[Image.Image, ...]:
    """Render enough small, distinct images to fill one request."""
    return tuple(render_photograph(48, 32, seed=seed) for seed in range(20))


@cache
def render_odd_images() -> tuple[Image.Image, ...]:
    """Render images that libraries decode differently: transparency, 16 bits, EXIF rotation."""
    ramp, disc = render_golden_images()
    transparent = ramp.convert("RGBA")
    transparent.putalpha(disc.convert("L").resize(ramp.size).point(lambda value: 255 - value))
    rotated = ramp.copy()
    rotated.getexif()[_EXIF_ORIENTATION] = _ROTATED
    palette = disc.quantize(16)
    palette.info["transparency"] = palette.getpixel((40, 40))
    deep = Image.fromarray(np.asarray(ramp.convert("L")).astype(np.uint16) * 257)
    return transparent, rotated, transparent.convert("LA"), palette, deep


@cache
def render_photographs() -> tuple[Image.Image, ...]:
    """Render images with the sizes and detail of photographs, deterministically.

    The last image is a copy of the first with a white and a black patch added, so a cache keyed by
    thumbnails confuses the two.
    """
    images = [render_photograph(*size, seed=seed) for seed, size in enumerate(_SIZES)]
    near_copy = images[0].copy()
    left, top = near_copy.width // 2 + _PATCH, near_copy.height * 11 // 20
    for number, color in enumerate(("white", "black")):
        near_copy.paste(
            color, (left, top + number * _PATCH, left + 2 * _PATCH, top + (number + 1) * _PATCH)
        )
    return (*images, near_copy)


def render_photograph(width: int, height: int, *, seed: int) -> Image.Image:
    """Render coarse and fine colored noise, which resizing and compression alter."""
    generator = np.random.default_rng(seed)
    coarse, fine = (
        Image.fromarray(
            generator.integers(0, 256, (height // cell + 1, width // cell + 1, 3), dtype=np.uint8)
        ).resize((width, height), Image.Resampling.BICUBIC)
        for cell in _CELLS
    )
    return Image.blend(coarse, fine, 0.3)
