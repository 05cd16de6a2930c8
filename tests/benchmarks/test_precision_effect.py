"""Where the guard accepts bfloat16 by itself, a real model finds the same images."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.accuracy.precision_effect import MOST_POINTS, Dataset, count_points
from benchmarks.accuracy.text_towers import build_tower
from modeling_llm2clip.building.pretrained_towers import EFFICIENTNET, MINILM, find_tower
from modeling_llm2clip.data.records.record_loading import find_example_data
from modeling_llm2clip.model_folders.guarded_loading import LEAST_COSINE

_NUM_IMAGES = 120


@pytest.mark.slow
def test_towers_that_run_in_bfloat16_by_themselves_find_the_same_images(tmp_path: Path) -> None:
    if not all(find_tower(each).is_dir() for each in (EFFICIENTNET, MINILM)):
        pytest.skip("a tower is not in the cache")
    emoji = find_example_data() / "emoji"
    dataset = Dataset.prepare(emoji, tmp_path / "emoji", (_NUM_IMAGES, _NUM_IMAGES))
    build_tower("minilm", tmp_path / "minilm")
    run = dataset.measure(dataset.align(tmp_path / "minilm"))
    assert run["num_test_images"] == _NUM_IMAGES
    for side in run["guard"].values():
        assert (side["dtype"] == "bfloat16") == (side["cosine"] >= LEAST_COSINE)
    # Rounding moves the convolutional network by more than the language models.
    assert [run["guard"][side]["dtype"] for side in ("text", "image")] == ["bfloat16", "float32"]
    assert run["cosine"]["text"]["min"] > LEAST_COSINE > run["cosine"]["image"]["min"]
    # One image of fewer than 500 is more than the bar.
    assert count_points(run["r1"], "auto") <= max(MOST_POINTS, 100 / _NUM_IMAGES) + 1e-9
