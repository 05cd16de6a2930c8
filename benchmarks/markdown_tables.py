"""Tables in Markdown, for what `render_tables.py` writes."""

from __future__ import annotations

from collections.abc import Sequence


def draw_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Draw a table.

    Args:
        heads: Over the columns.
        rows: Cells of each row.
    """
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def percent(share: float) -> str:
    """Write a share in percent.

    Args:
        share: From 0 to 1.
    """
    return f"{100 * share:.1f} %"
