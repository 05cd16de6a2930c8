"""Show search results as an HTML page with links to the files, as a PNG sheet, or as text.

The sheet uses Pillow's built-in font, which covers little more than ASCII, so it labels non-ASCII
queries by number. The page and the text show every query.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias
from urllib.parse import quote

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ..data.atomic_files import is_unfinished, write_atomically
from ..image_loading_llm2clip import load_images, read_image_header

if TYPE_CHECKING:
    from torch import Tensor

RESULTS_FILES = ("search.png", "search.html")
ResultFormat: TypeAlias = Literal["table", "json", "csv"]
_COLUMNS = ("query", "rank", "cosine", "image")
_SIDE = 160
PAGE_SIDE = 320
_GONE = "#dddddd"
_GAP = 12
_TEXT_WIDTH, _CHARACTERS_PER_LINE = 330, 32
# The list is as wide as its page. Below each image is its caption: the end of the folder's path on
# one line, then the file name on as many lines as it needs. Colors are derived from the text
# color, to fit light and dark pages.
HITS_CSS = """
.hits { list-style: none; margin: 0; padding: 0; display: grid; gap: 1.25rem 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(11rem, 44%), 1fr)); }
.hits li { margin: 0; min-width: 0; max-width: 26rem; }
.hits a { display: block; color: inherit; text-decoration: none; border-radius: 8px; }
.hits a:hover .name { text-decoration: underline; }
.hits a:focus-visible { outline: 3px solid #2563eb; outline-offset: 3px; }
.hits img { display: block; box-sizing: border-box; width: 100%; aspect-ratio: 4 / 3;
  max-height: 320px; object-fit: contain; border-radius: 8px;
  background: color-mix(in srgb, currentColor 6%, transparent); }
.hits .caption { display: block; margin-top: .4rem; font-size: .875rem; line-height: 1.35; }
.hits .rank { font-weight: 600; margin-right: .35em; }
.hits .cosine, .hits .folder { color: color-mix(in srgb, currentColor 74%, transparent); }
.hits .cosine { font-variant-numeric: tabular-nums; }
.hits .folder { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  direction: rtl; text-align: left; }
.hits .name { display: block; overflow-wrap: anywhere; }
"""
# Written near the beginning of every page and PNG sheet.
_MARK = "search results by modeling_llm2clip"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{mark}">
<title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.45 system-ui, sans-serif; margin: 0;
  padding: 1.5rem clamp(1rem, 3vw, 3rem); color: #1f2328; background: #ffffff; }}
@media (prefers-color-scheme: dark) {{ body {{ color: #e6edf3; background: #0d1117; }} }}
h1 {{ font-size: 1.4rem; margin: 0; }}
h2 {{ font-size: 1.15rem; margin: 0 0 .75rem; overflow-wrap: anywhere; }}
p {{ margin: .25rem 0; color: color-mix(in srgb, currentColor 74%, transparent); }}
section {{ margin-top: 1.5rem; padding-top: 1.25rem;
  border-top: 1px solid color-mix(in srgb, currentColor 15%, transparent); }}
.query {{ max-width: 16rem; margin-bottom: 1.25rem; }}
{hits_css}</style></head><body><main><h1>{title}</h1><p>{note}</p>
{rows}
</main></body></html>
"""


@dataclass(frozen=True)
class SearchResult:
    """A query and the images found for it, best first.

    Attributes:
        query: The sentence or the name of the query image; the parts of a combined query are joined
            by " + ", and negatives follow after " - ".
        hits: Path and cosine of each image. With negatives, the cosine is to the query embedding
            that they moved; see `ImageIndex.search`.
        query_image: File of the query image; None if the query has no image file.
        columns: Index columns for each hit, such as `width` and `taken`; empty if the images do
            not come from an index.
        best_cosine: Cosine of the best image before the threshold was applied; None if no image was
            compared or the images do not come from an index.
    """

    query: str
    hits: Sequence[tuple[Path, float]]
    query_image: Path | None = None
    columns: Sequence[Mapping[str, Any]] = field(default=(), compare=False)
    best_cosine: float | None = field(default=None, compare=False)

    @property
    def note(self) -> str:
        """Why there are no hits; empty if there are some."""
        if self.hits:
            return ""
        if self.best_cosine is None:
            return "No image was found."
        return f"No image reaches the threshold; the best cosine is {self.best_cosine:.3f}."

    def __str__(self) -> str:
        lines = [self.query, f"  {self.note or 'rank  cosine  image'}"]
        for rank, (path, cosine) in enumerate(self.hits, start=1):
            lines.append(f"  {rank:>4}  {cosine:>6.3f}  {path}")
        return "\n".join(lines)


def rank_images(
    queries: Sequence[str], cosines: Tensor, paths: Sequence[Path], *, top_k: int = 6
) -> list[SearchResult]:
    """Return each query's `top_k` images with the highest `cosines`, (queries, images)."""
    require_top_k(top_k)
    if broken := int((~cosines.isfinite()).sum()):  # a NaN would rank first
        raise ValueError(
            f"{broken} of {cosines.numel()} cosines are NaN or infinite because the model's "
            "embeddings are broken. Check it with llm2clip doctor."
        )
    best = cosines.topk(min(top_k, len(paths)))
    return [
        SearchResult(query, [(paths[i], float(s)) for s, i in zip(scores, rows, strict=True)])
        for query, scores, rows in zip(queries, best.values, best.indices, strict=True)
    ]


def require_top_k(top_k: int) -> None:
    if top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1.")


class PageImage(NamedTuple):
    """A hit as shown on a page.

    Attributes:
        path: Path to display.
        image: URL of the displayed image.
        note: HTML to show before the path; see `note_rank`.
        link: URL to open on click; empty if the image has no link.
    """

    path: str
    image: str
    note: str
    link: str = ""


def note_rank(rank: int, cosine: float) -> str:
    return f'<span class="rank">{rank}.</span> <span class="cosine">{cosine:.3f}</span>'


def write_hits(hits: Iterable[PageImage]) -> str:
    """Return an HTML list of images with rank and path, styled by `HITS_CSS`."""
    return f'<ol class="hits">{"".join(map(_write_hit, hits))}</ol>'


def write_results_page(
    results: Sequence[SearchResult], path: Path, *, title: str, note: str
) -> None:
    """Write an HTML page with thumbnails and links to the files.

    Links are relative to the page, so the page can be moved together with the images.
    """
    rows = "\n".join(_write_section(result, path.parent) for result in results)
    page = _PAGE.format(
        title=html.escape(title), note=html.escape(note), rows=rows, mark=_MARK, hits_css=HITS_CSS
    )
    write_atomically(path, page.encode(errors="replace"))  # a path may not be Unicode


def write_results_sheet(results: Sequence[SearchResult], path: Path) -> None:
    """Write a PNG sheet with one row per query: the query, then its images with cosines."""
    width = _TEXT_WIDTH + max(len(result.hits) for result in results) * (_SIDE + _GAP) + _GAP
    rows = [_draw_row(result, number, width) for number, result in enumerate(results, start=1)]
    sheet = Image.new("RGB", (width, sum(row.height for row in rows) + _GAP), "white")
    top = _GAP
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    info = PngInfo()
    info.add_text("Software", _MARK)
    content = io.BytesIO()
    content.name = path.name  # Pillow takes the format from the suffix
    sheet.save(content, pnginfo=info)
    write_atomically(path, content.getvalue())


def is_results_file(path: Path) -> bool:
    """Return True if a search wrote this file, or was killed while writing it."""
    if is_unfinished(path):
        return path.name.startswith(RESULTS_FILES)
    is_named = path.name in RESULTS_FILES and path.is_file()
    return is_named and _MARK.encode() in path.read_bytes()[:1024]


def render_search_results(results: Sequence[SearchResult], style: ResultFormat = "table") -> str:
    """Render results as tables, JSON or CSV, without a trailing newline."""
    if style == "json":
        return json.dumps(list(_list_records(results)), ensure_ascii=False, indent=2)
    if style == "csv":
        rows = (record.values() for record in _list_records(results))
        return "\n".join(map(make_csv_row, (_COLUMNS, *rows)))
    return "\n\n".join(map(str, results))


def make_csv_row(values: Iterable[object]) -> str:
    """Return a CSV row; text with a comma, a quote or a line break is quoted.

    Text that looks like a formula is also quoted, so spreadsheets can import it as text.
    """
    return ",".join(
        '"{}"'.format(value.replace('"', '""'))
        if isinstance(value, str) and re.search(r'^[=+\-@\t]|[",\r\n]', value)
        else str(value)
        for value in values
    )


def _list_records(results: Sequence[SearchResult]) -> Iterator[dict[str, Any]]:
    for result in results:
        for rank, (path, cosine) in enumerate(result.hits, start=1):
            values = (result.query, rank, round(cosine, 6), str(path))
            yield dict(zip(_COLUMNS, values, strict=True))


def _draw_row(result: SearchResult, number: int, width: int) -> Image.Image:
    font, small = ImageFont.load_default(18), ImageFont.load_default(12)
    query = result.query if result.query.isascii() else f"query {number}"
    lines = [
        line for text in (query, result.note) for line in textwrap.wrap(text, _CHARACTERS_PER_LINE)
    ]
    text_height = 26 * len(lines)
    row = Image.new("RGB", (width, max(_SIDE + 14, text_height) + 2 * _GAP), "white")
    draw = ImageDraw.Draw(row)
    draw.multiline_text(
        (_GAP, max(0, (_SIDE - text_height) // 2)),
        "\n".join(lines),
        fill="#222222",
        font=font,
        spacing=8,
    )
    # Cover the overflow: a line of wide letters may exceed the text column.
    draw.rectangle((_TEXT_WIDTH - _GAP, 0, *row.size), fill="white")
    hits = zip(result.hits, _list_digests(result), strict=True)
    for column, ((image, cosine), sha256) in enumerate(hits):
        left = _TEXT_WIDTH + column * (_SIDE + _GAP)
        thumbnail, state = _shrink(image, sha256, _SIDE)
        row.paste(
            thumbnail, (left + (_SIDE - thumbnail.width) // 2, (_SIDE - thumbnail.height) // 2)
        )
        draw.text((left + 8, _SIDE // 2), state, fill="#222222", font=small)
        draw.text((left + _SIDE // 2 - 12, _SIDE + 3), f"{cosine:.2f}", fill="#777777", font=small)
    return row


def _write_section(result: SearchResult, folder: Path) -> str:
    heading = f"<h2>{html.escape(result.query)}</h2>"
    if result.query_image is not None:
        shown = write_hits([_make_hit(result.query_image, None, "Query", folder)])
        heading += f'<div class="query">{shown}</div>'
    hits = [
        _make_hit(image, sha256, note_rank(rank, cosine), folder)
        for rank, ((image, cosine), sha256) in enumerate(
            zip(result.hits, _list_digests(result), strict=True), start=1
        )
    ]
    return f"<section>{heading}{write_hits(hits) if hits else f'<p>{result.note}</p>'}</section>"


def _write_hit(hit: PageImage) -> str:
    path = hit.path.encode("utf-8", errors="replace").decode()  # a path may not be Unicode
    cut = max(path.rfind("/"), path.rfind(os.sep)) + 1
    folder, name = html.escape(path[:cut]), html.escape(path[cut:])
    link = f' href="{html.escape(hit.link)}" target="_blank"' if hit.link else ""
    # The caption next to it names the image, so `alt` is empty.
    return (
        f'<li><a{link} title="{html.escape(path)}">'
        f'<img alt="" src="{html.escape(hit.image)}">'
        f'<span class="caption">{hit.note} <span class="folder"><bdi>{folder}</bdi></span>'
        f'<span class="name">{name}</span></span></a></li>'
    )


def _list_digests(result: SearchResult) -> list[str | None]:
    """Return each hit's SHA-256 at indexing time; None if the hit is not from an index."""
    return [row["sha256"] for row in result.columns] or [None] * len(result.hits)


def _make_hit(image: Path, sha256: str | None, note: str, folder: Path) -> PageImage:
    thumbnail, state = _shrink(image, sha256, PAGE_SIDE)
    note = f"{note} {state}".rstrip()
    return PageImage(str(image), to_data_url(thumbnail), note, _find_address(image, folder))


def to_data_url(image: Image.Image) -> str:
    """Encode an image as a JPEG data URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _find_address(file: Path, folder: Path) -> str:
    """Return a file's URL for a page in a folder: relative, unless the file is on another drive."""
    try:
        return quote(os.fsencode(Path(os.path.relpath(file, folder)).as_posix()))
    except ValueError:
        return file.resolve().as_uri()


def _shrink(image: Path, sha256: str | None, side: int) -> tuple[Image.Image, str]:
    """Return a thumbnail and "", or a gray square and the reason the image cannot be shown."""
    try:
        return read_thumbnail(image, sha256, side), ""
    except ValueError as error:
        return Image.new("RGB", (side, side), _GONE), str(error)


def read_thumbnail(image: Path, sha256: str | None, side: int) -> Image.Image:
    """Decode and shrink an image file; raise ValueError with the reason if it cannot be shown.

    Args:
        image: The file.
        sha256: Expected digest of the file; None to accept any content.
        side: Longest side of the thumbnail in pixels.
    """
    try:
        content = image.read_bytes()
        if sha256 in (None, hashlib.sha256(content).hexdigest()):
            with read_image_header(io.BytesIO(content), name=str(image)) as opened:
                thumbnail: Image.Image = load_images(opened)
            thumbnail.thumbnail((side, side), Image.Resampling.LANCZOS)
            return thumbnail
    except (OSError, ValueError):
        raise ValueError("cannot be read" if image.exists() else "no longer there") from None
    raise ValueError("changed since indexed")
