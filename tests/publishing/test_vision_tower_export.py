"""The exported vision tower is the model's own, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shared_models import every_vision, shared_model
from tiny import tiny_images
from tiny_folders import export_tiny_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedModel,
)

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.publishing.vision_tower_export import (
    export_vision_tower,
    save_vision_tower,
)


def hidden_states_of(tower: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        output = tower(**inputs, output_hidden_states=True)
    return [*output.hidden_states, output.last_hidden_state]


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
    folder = export_vision_tower(source, tmp_path / "tower", license="mit")
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
