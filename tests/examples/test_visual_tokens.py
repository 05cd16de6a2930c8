"""LLaVA's classes see of a vision tower what is found, or it is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_images, tiny_llm, tiny_vision
from transformers import (
    AutoConfig,
    AutoModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from visual_tokens import LLAVA_LAYER, find_visual_tokens

LLAVA_FAMILIES = ("clip", "siglip", "dinov2", "vit")
REGISTERS = 4


def tower_with_registers() -> tuple[PreTrainedModel, Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "dinov2_with_registers", **sizes, patch_size=8, image_size=32,
        num_register_tokens=REGISTERS,
    )  # fmt: skip
    return AutoModel.from_config(config).eval(), tiny_vision("clip")[1]


def count_llava_tokens(tower: Any, image_processor: Any, **options: Any) -> list[int]:
    """Run an image through LLaVA's classes; returns the tokens that it makes of the image."""
    config = LlavaConfig(vision_config=tower.config, text_config=tiny_llm().config, **options)
    llava = LlavaForConditionalGeneration(config).eval()
    pixels = image_processor(images=tiny_images(1), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = llava.get_image_features(pixel_values=pixels).pooler_output
    return [len(feature) for feature in features]


@pytest.mark.parametrize("vision", [*LLAVA_FAMILIES, "registers"])
def test_llava_gets_as_many_tokens_as_are_found(vision: str) -> None:
    tower, image_processor = (
        tower_with_registers() if vision == "registers" else tiny_vision(vision)
    )
    tokens = find_visual_tokens(tower, image_processor)
    assert tokens.num_patches == 16  # 32 pixels, patches of 8
    # Before the patches: nothing, CLS, or CLS and registers; LLaVA drops CLS only.
    prefix = {"siglip": 0, "registers": 1 + REGISTERS}.get(vision, 1)
    assert tokens.num_prefix_tokens == prefix
    options = {
        "vision_feature_layer": LLAVA_LAYER,
        "vision_feature_select_strategy": tokens.select_strategy,
    }
    assert count_llava_tokens(tower, image_processor, **options) == [tokens.num_tokens]
    assert tokens.num_tokens == 16 + max(prefix - 1, 0)


def test_llava_reads_every_layer_that_is_accepted_and_others_are_refused() -> None:
    tower, image_processor = tiny_vision("clip")
    for layer in (-2, -1, 1, 2):
        tokens = find_visual_tokens(tower, image_processor, layer=layer)
        counts = count_llava_tokens(tower, image_processor, vision_feature_layer=layer)
        assert counts == [tokens.num_tokens]
    for layer in (-9, -3, 0, 3):
        message = rf"layer={layer}, and CLIPVisionModel has 2 layers\. Give 1 to 2, or -2 to -1"
        with pytest.raises(ValueError, match=message):
            find_visual_tokens(tower, image_processor, layer=layer)


def test_a_tower_without_a_sequence_of_states_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"TimmWrapperModel gives hidden states of shape \(1, 64"):
        find_visual_tokens(*tiny_vision("timm"))


def test_a_tower_that_wants_more_than_pixels_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"pixel_attention_mask and spatial_shapes.*siglip"):
        find_visual_tokens(*tiny_vision("siglip2"))


def test_a_tower_whose_tokens_are_not_its_patches_is_refused() -> None:
    config = AutoConfig.for_model(
        "swin", image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2],
        window_size=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="64 tokens of width 16 for 256 patches"):
        find_visual_tokens(AutoModel.from_config(config), tiny_vision("clip")[1])
