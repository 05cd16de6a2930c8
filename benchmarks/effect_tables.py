"""The tables of what the parts of the method change in the scores."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from markdown_tables import draw_table, percent


def _render_forgetting(report: dict[str, Any]) -> str:
    found: dict[str, list[dict[str, Any]]] = {}
    for run in report["runs"]:
        found.setdefault(run["condition"], []).append(run)
    columns = {"accuracy": "classification", "t2i_r1": "text to image", "i2t_r1": "image to text"}
    rows = [
        [condition, *(_show_runs([run[name] for run in runs]) for name in columns)]
        for condition, runs in found.items()
    ]
    counts = report["num_images"]
    seeds = len({run["seed"] for run in report["runs"]} - {None})
    note = (
        f"Top-1 accuracy on {counts['labeled']} held-out drawings of {report['num_categories']} "
        f"categories, and R@1 among {counts['test']} held-out photographs; means of {seeds} seeds "
        f"(lowest to highest). Dual encoder: {counts['all']:,} images at {report['image_size']} "
        f"pixels, {report['epochs']} epochs; alignment: {counts['aligned']:,} of these, "
        f"{report['steps']} steps of 64. {report['hardware']}; commit {report['commit']}."
    )
    return f"{draw_table(('weights', *columns.values()), rows)}\n{note}\n"


def _show_runs(scores: list[float]) -> str:
    if len(scores) == 1:
        return percent(scores[0])
    return f"{percent(fmean(scores))} ({percent(min(scores))} to {percent(max(scores))})"


EFFECT_TABLES: dict[str, Callable[[Any], str]] = {"forgetting": _render_forgetting}
