"""The options of the whole method: sections, and what is given once for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modeling_llm2clip.configs.config_fields import make_config
from modeling_llm2clip.configs.train_config import TrainConfig

LEAST = {"vision_model": "embedded", "text_model": "embedded", "data": "images", "output": "runs"}


def make(**given: Any) -> TrainConfig:
    return make_config(TrainConfig, {**LEAST, **given})


def test_device_and_seed_are_given_once_for_all_stages() -> None:
    config = make(device="cpu", seed=7)
    assert config.finetune is not None and config.export is not None
    stages = (config.build, config.finetune, config.extract, config.align, config.export)
    assert {stage.device for stage in (*stages, config.evaluate)} == {"cpu"}
    assert config.build.seed == config.finetune.seed == config.align.seed == 7


def test_a_stage_with_a_seed_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match=r"align\.seed=3 differs from seed=0\. Give it once"):
        make(align={"seed": 3})


def test_stages_can_be_left_out() -> None:
    config = make(finetune=None, export=None)
    assert config.finetune is None and config.export is None


def test_sections_are_the_options_of_the_stages() -> None:
    config = make(build={"prompt": "chatml"}, align={"max_steps": 5, "learning_rate": 1e-3})
    assert config.build.prompt == "chatml" and config.align.max_steps == 5
    assert config.output == Path("runs")
    with pytest.raises(ValueError, match=r"align: max_step is not an option\. Did you mean max_st"):
        make(align={"max_step": 5})
