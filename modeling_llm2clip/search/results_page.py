"""Shows what a search found: one PNG to look at, one HTML page with links to the files."""

from __future__ import annotations

import base64
import html
import io
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from PIL import Image, ImageDraw, ImageFont

from ..image_loading_llm2clip import load_images
from .lettering import Font, find_font

_SIDE = 160
_PAGE_SIDE = 320
_GAP = 12
_TEXT_WIDTH = 330
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; }}
section + section {{ border-top: 1px solid #ddd; }}
h2 {{ font-size: 1.1rem; font-weight: 600; }}
.found {{ display: flex; flex-wrap: wrap; gap: 1rem; padding-bottom: 1rem; }}
figure {{ margin: 0; width: 320px; }}
img {{ max-width: 100%; max-height: 320px; border-radius: 6px; }}
figcaption {{ font-size: .8rem; color: #666; overflow-wrap: anywhere; }}
</style></head><body><h1>{title}</h1><p>{note}</p>
{rows}
</body></html>
"""


@dataclass(frozen=True)
class SearchResult:
    """One sentence and the images found for it, best first: path and cosine.

    Attributes:
        query_image: the image that was searched for; `sentence` is then its path.
    """

    sentence: str
    found: Sequence[tuple[Path, float]]
    query_image: Path | None = None


def write_contact_sheet(results: Sequence[SearchResult], path: Path) -> None:
    """Draw one row a sentence: the sentence, then its images with their cosines.

    A sentence in letters that no font here has is drawn as its number.
    """
    columns = max(len(result.found) for result in results)
    width = _TEXT_WIDTH + columns * (_SIDE + _GAP) + _GAP
    rows = [_draw_row(result, number, width) for number, result in enumerate(results, start=1)]
    sheet = Image.new("RGB", (width, sum(row.height for row in rows) + _GAP), "white")
    top = _GAP
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    sheet.save(path)


def _draw_row(result: SearchResult, number: int, width: int) -> Image.Image:
    font, small = find_font(result.sentence, size=18), ImageFont.load_default(12)
    sentence = result.sentence if font else f"sentence {number}: no font for its letters"
    font = font or ImageFont.load_default(18)
    text = _wrap(sentence, font, _TEXT_WIDTH - 2 * _GAP)
    text_height = 26 * (text.count("\n") + 1)
    row = Image.new("RGB", (width, max(_SIDE + 14, text_height) + 2 * _GAP), "white")
    draw = ImageDraw.Draw(row)
    place = (_GAP, max(0, (_SIDE - text_height) // 2))
    draw.multiline_text(place, text, fill="#222222", font=font, spacing=8)
    for column, (image, cosine) in enumerate(result.found):
        left = _TEXT_WIDTH + column * (_SIDE + _GAP)
        thumbnail = _shrink(image)
        row.paste(
            thumbnail, (left + (_SIDE - thumbnail.width) // 2, (_SIDE - thumbnail.height) // 2)
        )
        draw.text((left + _SIDE // 2 - 12, _SIDE + 3), f"{cosine:.2f}", fill="#777777", font=small)
    return row


def write_page(results: Sequence[SearchResult], path: Path, *, title: str, note: str) -> None:
    """Write the same as a page that holds small copies of the images and links to their files.

    Links are relative to the page, so that page and images may be moved together.
    """
    rows = "\n".join(_write_section(result, path.parent) for result in results)
    page = _PAGE.format(title=html.escape(title), note=html.escape(note), rows=rows)
    path.write_text(page, encoding="utf-8", errors="replace")  # a path may be no Unicode


def _write_section(result: SearchResult, folder: Path) -> str:
    query = ""
    if result.query_image is not None:
        query = f'<div class="query">{_write_figure(result.query_image, "query", folder)}</div>'
    figures = "".join(
        _write_figure(image, f"{rank}. {cosine:.3f}", folder)
        for rank, (image, cosine) in enumerate(result.found, start=1)
    )
    heading = html.escape(result.sentence)
    return f'<section><h2>{heading}</h2>{query}<div class="found">{figures}</div></section>'


def _write_figure(image: Path, caption: str, folder: Path) -> str:
    address, shown = html.escape(_find_address(image, folder)), html.escape(str(image))
    return (
        f'<figure><a href="{address}"><img alt="{shown}" src="{_inline(image)}"></a>'
        f'<figcaption>{caption} <a href="{address}">{shown}</a></figcaption></figure>'
    )


def _find_address(file: Path, folder: Path) -> str:
    """Where a page in the folder finds a file: relative, unless it lies on another drive."""
    try:
        return quote(os.fsencode(Path(os.path.relpath(file, folder)).as_posix()))
    except ValueError:
        return file.resolve().as_uri()


def _shrink(image: Path, side: int = _SIDE) -> Image.Image:
    thumbnail: Image.Image = load_images(str(image))
    thumbnail.thumbnail((side, side), Image.Resampling.LANCZOS)
    return thumbnail


def _inline(image: Path) -> str:
    buffer = io.BytesIO()
    _shrink(image, _PAGE_SIDE).save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _wrap(text: str, font: Font, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append("")
            longer = word
        while font.getlength(longer) > width and len(longer) > 1:  # no blanks in Japanese
            fitting = _count_fitting(longer, font, width)
            lines[-1:] = [longer[:fitting], ""]
            longer = longer[fitting:]
        lines[-1] = longer
    return "\n".join(lines)


def _count_fitting(word: str, font: Font, width: int) -> int:
    """How many of a word's letters a line has room for, at least one."""
    lengths = range(2, len(word) + 1)
    return 1 + bisect_right(
        lengths, float(width), key=lambda length: float(font.getlength(word[:length]))
    )
