"""Changes that servers and gateways make to texts and images before a model sees them."""

from __future__ import annotations

import html
import io
import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial

from PIL import Image

from ..image_loading_llm2clip import load_images

# Numbers of characters that gateways and databases cut texts off at.
_COMMON_CUTS = (
    64, 80, 100, 128, 140, 200, 250, 255, 256, 280, 300, 400, 500, 512, 768, 800, 1000, 1024, 1500,
    2000, 2048, 2500, 3000, 4000, 4096, 5000, 8000, 8191, 8192, 10_000, 16_000, 16_384, 32_000,
    32_768,
)  # fmt: skip
_PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "-", "–": "-", "…": "..."})
_JOINERS = re.compile("[\u200b-\u200d\ufe0e\ufe0f\ufeff]")
_COMMON_SIDES = (224, 256, 336, 384, 448, 512, 640, 768, 1024)
_COMMON_QUALITIES = (95, 90, 85, 80, 75, 70, 60, 50)


def _remove_accents(text: str) -> str:
    parts = unicodedata.normalize("NFD", text)
    return "".join(part for part in parts if not unicodedata.combining(part))


def _remove_emoji(text: str) -> str:
    return "".join(part for part in text if unicodedata.category(part) not in ("So", "Sk"))


TEXT_CHANGES: dict[str, Callable[[str], str]] = {
    "texts are lowercased": str.lower,
    "line breaks are replaced by spaces": lambda text: text.replace("\n", " "),
    "all line breaks are replaced by spaces": lambda text: re.sub(r"\r\n?|\n", " ", text),
    "line breaks are removed": lambda text: re.sub(r"[\r\n]", "", text),
    "line breaks are rewritten as \\n": lambda text: re.sub(r"\r\n?", "\n", text),
    "whitespace is collapsed": lambda text: " ".join(text.split()),
    "texts are normalized to NFC": partial(unicodedata.normalize, "NFC"),
    "texts are normalized to NFKC": partial(unicodedata.normalize, "NFKC"),
    "texts are normalized to NFD": partial(unicodedata.normalize, "NFD"),
    "texts are normalized to NFKD": partial(unicodedata.normalize, "NFKD"),
    "accents are removed": _remove_accents,
    "characters outside of ASCII are removed": lambda text: text.encode("ascii", "ignore").decode(),
    "characters outside of ASCII become question marks": (
        lambda text: text.encode("ascii", "replace").decode()
    ),
    "emoji are removed": _remove_emoji,
    "invisible joiners are removed": lambda text: _JOINERS.sub("", text),
    "typographic quotes and dashes are made plain": lambda text: text.translate(_PLAIN),
    "HTML entities are unescaped": html.unescape,
    "texts are escaped for HTML": html.escape,
    "HTML tags are removed": lambda text: re.sub(r"<[^<>]*>", "", text),
    "punctuation is removed": lambda text: re.sub(r"[^\w\s]", "", text),
}


def list_text_changes(texts: list[str]) -> Iterator[tuple[str, Callable[[str], str]]]:
    """Yield the name and function of each change that shows in some of these texts."""
    for name, change in TEXT_CHANGES.items():
        if any(change(text) != text for text in texts):
            yield name, change
    longest = max(map(len, texts))
    for count in _COMMON_CUTS:
        if count < longest:
            yield f"texts are truncated to {count:,} characters", partial(_cut, count)


def _cut(count: int, text: str) -> str:
    return text[:count]


def list_image_changes(
    images: list[Image.Image],
) -> Iterator[tuple[str, Callable[[Image.Image], Image.Image]]]:
    """Yield the name and function of each change that shows in some of these images."""
    largest = max(max(image.size) for image in images)
    for side in _COMMON_SIDES:
        if side < largest:
            for method in ("NEAREST", "BILINEAR", "BICUBIC", "LANCZOS"):
                yield (
                    f"images are shrunk to {side} pixels by {method.lower()} interpolation",
                    partial(_shrink, side, Image.Resampling[method]),
                )
    for quality in _COMMON_QUALITIES:
        yield f"images are saved as JPEG of quality {quality}", partial(_save_as_jpeg, quality)
    yield "images are made gray", lambda image: load_images(image).convert("L").convert("RGB")
    yield "images are reduced to 256 colors", _reduce_colors


def _shrink(side: int, method: Image.Resampling, image: Image.Image) -> Image.Image:
    image = load_images(image).copy()
    if max(image.size) > side:
        image.thumbnail((side, side), method, reducing_gap=None)
    return image


def _save_as_jpeg(quality: int, image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    load_images(image).save(file, format="JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def _reduce_colors(image: Image.Image) -> Image.Image:
    upright: Image.Image = load_images(image)
    return upright.quantize(256).convert("RGB")
