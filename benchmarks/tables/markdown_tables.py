"""Tables in Markdown, for `render_tables.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev


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


def percent_with_error(mean: float, error: float | None) -> str:
    """Write a mean with its standard error, which a single value does not have.

    Args:
        mean: From 0 to 1.
        error: In the same unit; None for a single value.
    """
    return percent(mean) if error is None else f"{100 * mean:.1f} ± {100 * error:.1f} %"


def find_standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of a mean, or None for a single value.

    Args:
        values: The numbers that are averaged.
    """
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def show_range(values: Sequence[float] | None) -> str:
    """Write the mean of shares with the lowest and the highest; a dash without any."""
    if not values:
        return "–"
    if len(values) == 1:
        return percent(values[0])
    return f"{percent(fmean(values))} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def list_versions(versions: Mapping[str, str], *names: str) -> str:
    """Join the recorded versions of some packages, or of all: `torch 2.13.0+cpu, timm 1.0.31`."""
    return ", ".join(f"{name} {versions[name]}" for name in names or versions)
