"""Recorded tables keep measured models apart from tiny ones that only show a path."""

from __future__ import annotations

from typing import Any

from benchmarks.render_tables import _render_evaluation

LABEL = "tiny random weights: shows the path, not a score"


def emoji_row(model: str, hit_rate: float) -> dict[str, Any]:
    side = {"hit_rate_at_1": hit_rate, "chance_hit_rate_at_1": 0.01}
    directions = {"t2i": side}
    return {
        "model": model,
        "task": "cross-lingual",
        "dataset": "emoji",
        "scores": {"mean": directions, "languages": {"en": directions}},
        "counts": {"languages": {"en": {"images": 100}}},
    }


def cra_row(model: str, accuracy: float, cut: int) -> dict[str, Any]:
    return {
        "model": model,
        "task": "cra",
        "dataset": "long ones",
        "scores": {"cra": {"value": accuracy}, "chance": 0.1},
        "counts": {"images": 10, "texts": 20, "texts_truncated": cut},
    }


def test_tiny_models_share_no_table_with_measured_ones_and_are_labeled() -> None:
    rows = [emoji_row("ours", 0.36), emoji_row("tiny", 0.02)]
    rows += [cra_row("ours", 0.7, 0), cra_row("cut", 0.5, 19), cra_row("tiny", 0.1, 20)]
    report = {"hardware": "a machine", "results": rows}
    tiny = {"models": ["tiny"], "label": LABEL}
    measured, shown = _render_evaluation({**report, "tiny": tiny}).split(f"{LABEL}:")
    assert "tiny" not in measured and "| ours | 70.0 % | 0 of 20 |" in measured
    assert "| cut | 50.0 % | 19 of 20 |" in measured and "no image is used" in measured
    assert "| tiny | cross-lingual | emoji | 2.0 % |" in shown
    assert "| tiny | cra | long ones | 10.0 % |" in shown
    # A record without such models has no such table.
    assert LABEL not in _render_evaluation({**report, "results": rows[:1]})
