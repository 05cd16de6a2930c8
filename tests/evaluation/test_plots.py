"""What plots show, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from modeling_llm2clip.evaluation.plots import plot_lengths
from modeling_llm2clip.evaluation.results import (
    read_evaluation_results,
)


def test_the_plot_has_a_line_per_model(results: Path, tmp_path: Path) -> None:
    found = [result for result in read_evaluation_results(results) if result.task == "length"]
    plot_lengths(found, tmp_path / "lengths.png")
    assert Image.open(tmp_path / "lengths.png").size[0] > 400
    with pytest.raises(ValueError, match=r"takes results of the task 'length'"):
        plot_lengths(read_evaluation_results(results), tmp_path / "other.png")
    other = replace(found[0], dataset="another")
    with pytest.raises(ValueError, match=r"different datasets: another, folder"):
        plot_lengths([found[1], other], tmp_path / "other.png")


def test_results_on_different_data_or_of_different_scoring_share_no_plot(
    results: Path, tmp_path: Path
) -> None:
    clip, siglip = (r for r in read_evaluation_results(results) if r.task == "length")
    task = {**siglip.protocol["task"], "ties": "ties count for the model"}
    other = replace(siglip, protocol={**siglip.protocol, "task": task})
    with pytest.raises(ValueError, match=r"clip and siglip cannot be .*ties was 'ties count"):
        plot_lengths([clip, other], tmp_path / "lengths.png")
    data = {**siglip.protocol["data"], "lang": "de"}
    other = replace(siglip, protocol={**siglip.protocol, "data": data})
    with pytest.raises(ValueError, match=r"cannot be compared .*data\.lang was 'en' and is 'de'"):
        plot_lengths([clip, other], tmp_path / "lengths.png")
