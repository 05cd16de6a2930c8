"""Draws which class was taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_LARGEST_SIDE = 1000
_MOST_NAMED = 60
_LARGEST_CELL = 24
_MARGIN = 8


def plot_confusion(confusion: Tensor, names: Sequence[str]) -> Image.Image:
    """Draw a confusion matrix: rows are the images' own classes, darker is more.

    Each row is scaled to its number of images. Up to 60 classes are named; where the font has
    no letters for a name, and above that, a class goes by its number, counted from 0.

    Args:
        confusion: (C, C) whole numbers.
    """
    number = len(confusion)
    cell = max(1, min(_LARGEST_CELL, _LARGEST_SIDE // number))
    shares = confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    pixels = (255 * (1 - shares)).round().byte().numpy()
    matrix = Image.fromarray(pixels).resize((number * cell,) * 2, Image.Resampling.NEAREST)
    if number > _MOST_NAMED:
        return matrix.convert("RGB")
    font = ImageFont.load_default(size=max(8, cell // 2))
    shown = [_printable(name, row) for row, name in enumerate(names)]
    margin = 2 * _MARGIN + int(max(font.getlength(name) for name in shown))
    sheet = Image.new("RGB", (margin + matrix.width, margin + matrix.height), "white")
    sheet.paste(matrix, (margin, margin))
    sheet.paste(_write_names(shown, margin, cell, font, anchor="rm"), (0, margin))
    # Turned by a quarter to the left, names begin at the matrix and are read upwards.
    columns = _write_names(shown, margin, cell, font, anchor="lm")
    sheet.paste(columns.transpose(Image.Transpose.ROTATE_90), (margin, 0))
    return sheet


def _write_names(
    names: Sequence[str], margin: int, cell: int, font: Any, *, anchor: str
) -> Image.Image:
    """Names one below the other, as high as the cells: against the right edge or the left one."""
    strip = Image.new("RGB", (margin, len(names) * cell), "white")
    left = _MARGIN if anchor == "lm" else margin - _MARGIN
    for row, name in enumerate(names):
        place = (left, row * cell + cell // 2)
        ImageDraw.Draw(strip).text(place, name, fill="black", font=font, anchor=anchor)
    return strip


def _printable(name: str, row: int) -> str:
    # Pillow's own font has few other letters; they would all be the same empty box.
    return name if name.isascii() else str(row)
