"""What a search found, as a table to read or as records for another program."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .results_page import SearchResult

FORMATS = ("table", "json", "csv")
COLUMNS = ("query", "rank", "cosine", "image")


def render_search_results(results: Sequence[SearchResult], style: str) -> str:
    """Render search results as text.

    Args:
        results: queries with the images found for them.
        style: `"table"`, one table per query; `"json"`, a list of objects, and `"csv"`, lines
            below a header, with the keys and columns `query`, `rank`, `cosine` and `image`.
    """
    if style == "json":
        return json.dumps(list(_list_records(results)), ensure_ascii=False, indent=2)
    if style == "csv":
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(_list_records(results))
        return buffer.getvalue().rstrip("\n")
    return "\n\n".join(map(_draw_table, results))


def _list_records(results: Sequence[SearchResult]) -> Iterator[dict[str, Any]]:
    for result in results:
        for rank, (path, cosine) in enumerate(result.found, start=1):
            values = (result.sentence, rank, round(cosine, 6), str(path))
            yield dict(zip(COLUMNS, values, strict=True))


def _draw_table(result: SearchResult) -> str:
    lines = [result.sentence, "  rank  cosine  image"]
    for rank, (path, cosine) in enumerate(result.found, start=1):
        lines.append(f"  {rank:>4}  {cosine:>6.3f}  {path}")
    return "\n".join(lines)
