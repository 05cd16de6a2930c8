"""The exported tower is the model's own, bit for bit, and LLaVA's classes take it as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from shared_models import every_vision, shared_model
from tiny import tiny_images, tiny_llm, tiny_vision
from tiny_folders import export_tiny_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.publishing.vision_tower_export import (
    LLAVA_LAYER,
    export_vision_tower,
    find_visual_tokens,
    save_vision_tower,
)

LLAVA_FAMILIES = ("clip", "siglip", "dinov2", "vit")
REGISTERS = 4


def hidden_states_of(tower: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        output = tower(**inputs, output_hidden_states=True)
    return [*output.hidden_states, output.last_hidden_state]


def tower_with_registers() -> tuple[PreTrainedModel, Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "dinov2_with_registers", **sizes, patch_size=8, image_size=32,
        num_register_tokens=REGISTERS,
    )  # fmt: skip
    return AutoModel.from_config(config).eval(), tiny_vision("clip")[1]


@every_vision
def test_the_exported_tower_gives_the_models_own_hidden_states(vision: str, tmp_path: Path) -> None:
    model, processor = shared_model(vision)
    folder = save_vision_tower(model, processor.image_processor, tmp_path / "tower")
    tower, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    # AutoImageProcessor may choose another backend, which resizes a little differently.
    image_processor = type(processor.image_processor).from_pretrained(folder)
    pixels, inside = (
        dict(make(images=tiny_images(2), return_tensors="pt"))
        for make in (image_processor, processor.image_processor)
    )
    assert all(torch.equal(pixels[name], inside[name]) for name in inside)
    states = hidden_states_of(tower.eval(), pixels)
    assert len(states) > 2
    for ours, theirs in zip(hidden_states_of(model.vision_model, inside), states, strict=True):
        assert torch.equal(ours, theirs)


def test_a_whole_folder_gives_the_same_tower_and_nothing_of_ours(tmp_path: Path) -> None:
    source = export_tiny_model(tmp_path / "model")
    folder = export_vision_tower(source, tmp_path / "tower", license_id="mit")
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip
    assert "auto_map" not in (folder / "config.json").read_text(encoding="utf-8")
    assert "license: mit" in (folder / "README.md").read_text(encoding="utf-8")
    model = LLM2CLIPModel.from_pretrained(source)
    kept = AutoModel.from_pretrained(folder).state_dict()
    inside = model.vision_model.state_dict()
    assert kept.keys() == inside.keys()
    assert all(torch.equal(kept[name], inside[name]) for name in kept)


def test_the_command_writes_the_tower_alone_and_refuses_what_a_tower_has_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = export_tiny_model(tmp_path / "whole")
    command = ["export", str(source), str(tmp_path / "tower"), "--components", "vision-tower"]
    assert main([*command, "--dtype", "bfloat16"]) == 2
    assert "--components vision-tower has no use for --dtype." in capsys.readouterr().err
    assert main([*command, "--license", "mit"]) == 0
    assert AutoConfig.from_pretrained(tmp_path / "tower").model_type == "clip_vision_model"


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(FileExistsError, match="Name a new folder"):
        export_vision_tower(tmp_path / "not even looked for", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("vision", [*LLAVA_FAMILIES, "registers"])
def test_llava_gets_as_many_tokens_as_are_found(vision: str) -> None:
    tower, image_processor = (
        tower_with_registers() if vision == "registers" else tiny_vision(vision)
    )
    tokens = find_visual_tokens(tower, image_processor)
    assert tokens.num_patches == 16  # 32 pixels, patches of 8
    # What stands before the patches: nothing, CLS, or CLS and registers; LLaVA drops CLS alone.
    prefix = {"siglip": 0, "registers": 1 + REGISTERS}.get(vision, 1)
    assert tokens.num_prefix_tokens == prefix
    config = LlavaConfig(
        vision_config=tower.config, text_config=tiny_llm().config,
        vision_feature_layer=LLAVA_LAYER, vision_feature_select_strategy=tokens.select_strategy,
    )  # fmt: skip
    llava = LlavaForConditionalGeneration(config).eval()
    pixels = image_processor(images=tiny_images(1), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = llava.get_image_features(pixel_values=pixels).pooler_output
    assert [len(feature) for feature in features] == [tokens.num_tokens]
    assert tokens.num_tokens == 16 + max(prefix - 1, 0)


@pytest.mark.parametrize("layer", [-9, -3, 0, 3])
def test_a_layer_that_is_not_there_is_refused_with_those_that_are(layer: int) -> None:
    tower, image_processor = tiny_vision("clip")
    wanted = rf"layer={layer}, and CLIPVisionModel has 2 layers\. Give 1 to 2, or -2 to -1"
    with pytest.raises(ValueError, match=wanted):
        find_visual_tokens(tower, image_processor, layer=layer)


@pytest.mark.parametrize("layer", [-2, -1, 1, 2])
def test_llava_reads_every_layer_that_is_accepted(layer: int) -> None:
    tower, image_processor = tiny_vision("clip")
    tokens = find_visual_tokens(tower, image_processor, layer=layer)
    config = LlavaConfig(
        vision_config=tower.config, text_config=tiny_llm().config, vision_feature_layer=layer
    )
    llava = LlavaForConditionalGeneration(config).eval()
    pixels = image_processor(images=tiny_images(1), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = llava.get_image_features(pixel_values=pixels).pooler_output
    assert [len(feature) for feature in features] == [tokens.num_tokens]


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
