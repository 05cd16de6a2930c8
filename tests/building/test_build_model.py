"""Towers are joined, and folders written, only if they load as the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llm, tiny_timm, tiny_tokenizer, tiny_vision
from torch import nn

from modeling_llm2clip.building.build_model import build_model, join_towers
from modeling_llm2clip.configs.build_config import BuildConfig

CONFIG = BuildConfig(prompt="llama-3", projection_dim=16, max_text_length=32, text_adapter_layers=0)


def make_llm() -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer()
    return tiny_llm(vocabulary_size=len(tokenizer)), tokenizer


@pytest.mark.parametrize(
    ("architecture", "depth", "error"),
    [
        ("swin_tiny_patch4_window7_224", 1, r"again.*position.*does not describe its"),
        # No table depends on its windows.
        ("swinv2_tiny_window8_256", 2, r"as another one: the 'timm_wrapper' tower .* off by"),
    ],
)
def test_a_network_that_was_changed_behind_its_configuration_is_refused(
    architecture: str, depth: int, error: str
) -> None:
    sizes = {"img_size": 64, "embed_dim": 16, "depths": [depth], "num_heads": [2], "window_size": 4}
    tower, image_processor = tiny_timm(architecture, sizes)
    tower.timm_model.set_input_size(window_size=(8, 8))
    with pytest.raises(ValueError, match=error):
        join_towers((tower, image_processor), make_llm(), CONFIG)


def test_layers_that_a_configuration_does_not_state_are_refused() -> None:
    llm, tokenizer = make_llm()
    llm.layers[0].mlp.act_fn = nn.Tanh()  # the configuration says SiLU
    with pytest.raises(ValueError, match=r"as another one: the 'llama' tower .* off by"):
        join_towers(tiny_vision(), (llm, tokenizer), CONFIG)
    llm, tokenizer = make_llm()
    llm.layers[0].self_attn.q_proj = nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"not be loaded again.*q_proj.bias"):
        join_towers(tiny_vision(), (llm, tokenizer), CONFIG)


def test_a_folder_that_loads_with_other_embeddings_is_not_left(tmp_path: Path) -> None:
    vision, image_processor = tiny_vision()
    with (
        pytest.warns(UserWarning, match="different dtypes"),
        pytest.raises(ValueError, match=r"is not saved: loaded again, .*image_embeds moved"),
    ):
        # All weights of a folder are loaded in one dtype.
        build_model((vision, image_processor), make_llm_in_half(), tmp_path / "model", CONFIG)
    assert list(tmp_path.iterdir()) == []


def make_llm_in_half() -> tuple[Any, Any]:
    llm, tokenizer = make_llm()
    return llm.to(torch.bfloat16), tokenizer
