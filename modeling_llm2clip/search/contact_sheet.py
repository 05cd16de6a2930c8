"""Shows what a search found: one PNG to look at, one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
import io
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..processing_llm2clip import load_pictures
from .lettering import Font, find_font

_SIDE = 96
_GAP = 12
_TEXT_WIDTH = 330
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; color: #222; }}
.row {{ display: flex; gap: 1rem; align-items: center; padding: .8rem 0; }}
.row + .row {{ border-top: 1px solid #ddd; }}
.row h2 {{ font-size: 1rem; font-weight: 600; width: 18rem; margin: 0; flex: none; }}
figure {{ margin: 0; text-align: center; width: 7rem; }}
img {{ max-width: 96px; max-height: 96px; border-radius: 6px; }}
figcaption {{ font-size: .75rem; color: #666; }}
</style></head><body><h1>{title}</h1><p>{note}</p>
{rows}
</body></html>
"""


@dataclass(frozen=True)
class SearchResult:
    """One sentence and the pictures found for it, best first: path and cosine."""

    sentence: str
    found: Sequence[tuple[Path, float]]


def write_contact_sheet(results: Sequence[SearchResult], path: Path) -> None:
    """Draw one row a sentence: the sentence, then its pictures with their cosines.

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
    for column, (picture, cosine) in enumerate(result.found):
        left = _TEXT_WIDTH + column * (_SIDE + _GAP)
        thumbnail = _shrink(picture)
        row.paste(
            thumbnail, (left + (_SIDE - thumbnail.width) // 2, (_SIDE - thumbnail.height) // 2)
        )
        draw.text((left + 30, _SIDE + 3), f"{cosine:.2f}", fill="#777777", font=small)
    return row


def write_page(results: Sequence[SearchResult], path: Path, *, title: str, note: str) -> None:
    """Write the same as a page with the pictures inside it."""
    rows = []
    for result in results:
        figures = "".join(
            f'<figure><img alt="{html.escape(picture.stem)}" src="{_inline(picture)}">'
            f"<figcaption>{cosine:.2f}</figcaption></figure>"
            for picture, cosine in result.found
        )
        rows.append(f'<div class="row"><h2>{html.escape(result.sentence)}</h2>{figures}</div>')
    page = _PAGE.format(title=html.escape(title), note=html.escape(note), rows="\n".join(rows))
    path.write_text(page, encoding="utf-8")


def _shrink(picture: Path) -> Image.Image:
    image: Image.Image = load_pictures(str(picture))
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return image


def _inline(picture: Path) -> str:
    buffer = io.BytesIO()
    _shrink(picture).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


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
