"""Tables show recorded measurements alone, with what they were compared with."""

from __future__ import annotations

import json
from typing import Any

from tiny import MORE_VISION_FAMILIES, VISION_FAMILIES

from benchmarks.compatibility.vision_towers import FAMILIES
from benchmarks.tables.render_tables import RESULTS, _render_evaluation, _render_vision_towers


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


def test_tiny_models_that_only_show_a_path_are_in_no_table() -> None:
    rows = [emoji_row("ours", 0.36), emoji_row("tiny", 0.02)]
    rows += [cra_row("ours", 0.7, 0), cra_row("cut", 0.5, 19), cra_row("tiny", 0.1, 20)]
    report = {"hardware": "a machine", "results": rows, "tiny": {"models": ["tiny"]}}
    measured = _render_evaluation(report)
    assert "tiny" not in measured and "| ours | 70.0 % | 0 of 20 |" in measured
    assert "| cut | 50.0 % | 19 of 20 |" in measured and "no image is used" in measured


def test_every_family_of_vision_towers_has_its_recorded_row() -> None:
    assert sorted(FAMILIES.values()) == sorted(VISION_FAMILIES + MORE_VISION_FAMILIES)
    recorded = json.loads((RESULTS / "vision_towers.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in recorded["rows"]] == list(FAMILIES)


def test_a_vision_tower_that_fails_is_in_the_table_with_its_reason() -> None:
    row = {"text_encoder": False, "pooling": "pooler"}
    rows = [
        {"name": "first", **row, "error": "ValueError: no pooler"},
        {"name": "second", **row, "largest_difference": 0.25, "failed_checks": ["golden"]},
        {"name": "third", **row, "largest_difference": 1e-7, "failed_checks": []},
    ]
    table = _render_vision_towers({"rows": rows, "versions": {"torch": "2"}})
    for name, result in (("first", "ValueError: no pooler"), ("second", "golden"), ("third", "ok")):
        assert f"| {name} | – | pooler | {result} |" in table
    assert "differ by at most 2e-01" in table
