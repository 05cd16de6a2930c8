"""Hits as a list in HTML, for the page of a search and for the page of the server."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable
from typing import NamedTuple

# The list is as wide as its page. A caption is below its image: the end of the folder in one line,
# the name in as many as it takes. Colors are mixed from that of the text, for light and dark pages.
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


class Hit(NamedTuple):
    """What a page shows of an image that was found.

    Attributes:
        path: Path, as a user reads it.
        image: Address of the image that is shown.
        link: Address that it leads to.
        note: HTML before the path; see `note_rank`.
    """

    path: str
    image: str
    link: str
    note: str


def note_rank(rank: int, cosine: float) -> str:
    """Return rank and cosine of a hit in HTML."""
    return f'<span class="rank">{rank}.</span> <span class="cosine">{cosine:.3f}</span>'


def write_hits(hits: Iterable[Hit]) -> str:
    """Write a list whose entries are links, each with an image, its rank and its path."""
    return f'<ol class="hits">{"".join(map(_write_hit, hits))}</ol>'


def _write_hit(hit: Hit) -> str:
    path = hit.path.encode("utf-8", errors="replace").decode()  # a path may not be Unicode
    cut = max(path.rfind("/"), path.rfind(os.sep)) + 1
    folder, name = html.escape(path[:cut]), html.escape(path[cut:])
    # The text beside it names the image, so that its own description is blank.
    return (
        f'<li><a href="{html.escape(hit.link)}" target="_blank" title="{html.escape(path)}">'
        f'<img alt="" src="{html.escape(hit.image)}">'
        f'<span class="caption">{hit.note} <span class="folder"><bdi>{folder}</bdi></span>'
        f'<span class="name">{name}</span></span></a></li>'
    )
