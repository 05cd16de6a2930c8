"""What the demo trains on, and what it leaves to the evaluation."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from modeling_llm2clip.demo.run_demo import DemoArguments, read_images


def test_a_seed_that_trains_on_emoji_of_the_evaluation_dataset_is_warned_of(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_images(DemoArguments(output=tmp_path / "demo", seed=0))
    with pytest.warns(UserWarning, match="Seed 1 trains on emoji that the evaluation dataset"):
        read_images(DemoArguments(output=tmp_path / "demo", seed=1))
