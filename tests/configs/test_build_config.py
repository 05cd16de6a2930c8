"""Options of building: a prompt is chosen once, and never guessed."""

from __future__ import annotations

from typing import get_args

import pytest

from modeling_llm2clip import configuration_llm2clip
from modeling_llm2clip.configs.build_config import (
    CHAT_TEMPLATE,
    PROMPT_NAMES,
    PROMPT_PRESETS,
    BuildConfig,
    TextPooling,
    VisionPooling,
)


def test_a_prompt_excludes_a_prefix_and_a_suffix() -> None:
    for parts in ({"prompt_prefix": ""}, {"prompt_suffix": "x"}):
        with pytest.raises(ValueError, match="prompt=none excludes prompt_prefix"):
            BuildConfig(prompt="none", **parts)  # type: ignore[arg-type]


def test_a_prompt_is_never_guessed() -> None:
    with pytest.raises(ValueError, match=r"Choose a prompt, one of llama-3, .*never guessed"):
        BuildConfig().require_prompt()
    BuildConfig(prompt="none").require_prompt()
    BuildConfig(prompt_suffix="").require_prompt()


def test_the_choices_are_those_of_the_model() -> None:
    assert (
        get_args(TextPooling) == tuple(configuration_llm2clip.TEXT_POOLINGS)[:2]
    )  # others: embedders
    assert get_args(VisionPooling) == configuration_llm2clip.VISION_POOLINGS
    assert PROMPT_NAMES == (*PROMPT_PRESETS, CHAT_TEMPLATE)
