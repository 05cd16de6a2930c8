"""Finds a font that has the letters of a text; Pillow's own has those of ASCII and few others."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TypeAlias

from PIL import ImageFont

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

# As systems have them, wherever Pillow looks for fonts; the first that suffices is taken.
_SYSTEM_FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc", "msyh.ttc", "YuGothM.ttc", "malgun.ttf",
    "NotoSansDevanagari-Regular.ttf", "Nirmala.ttf", "NotoSansArabic-Regular.ttf",
    "Arial Unicode.ttf", "unifont.ttf",
)  # fmt: skip
_NO_LETTER = "\U0010fffd"  # which no font has, so it is drawn as what is missing


def find_font(text: str, *, size: int) -> Font | None:
    """Find a font with every letter of a text: Pillow's own, else one of the system's.

    Returns: None where there is none.
    """
    letters = {letter for letter in text if not letter.isspace()}
    return next((font for font in _list_fonts(size) if _has_letters(font, letters)), None)


def _list_fonts(size: int) -> Iterator[Font]:
    yield ImageFont.load_default(size)
    for name in _SYSTEM_FONTS:
        if (font := _load(name, size)) is not None:
            yield font


@cache
def _load(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:  # not on this system
        return None


def _has_letters(font: Font, letters: set[str]) -> bool:
    missing = _draw(font, _NO_LETTER)
    return all(_draw(font, letter) != missing for letter in letters)


def _draw(font: Font, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
