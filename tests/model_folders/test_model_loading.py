"""A model folder is loaded as it was saved, whole or without its towers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import drop_weights
from shared_models import CAPTIONS
from tiny import tiny_images
from tiny_folders import save_tiny_llm, save_tiny_vision

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModel
from modeling_llm2clip.configs.export_config import ExportConfig
from modeling_llm2clip.model_folders.model_loading import load_model, load_partial_model
from modeling_llm2clip.publishing.export_model import export_model

CLASSES: dict[str, Any] = {
    "full": LLM2CLIPModel,
    "text": LLM2CLIPTextModel,
    "vision": LLM2CLIPVisionModel,
}


@pytest.mark.parametrize("components", CLASSES)
def test_the_class_that_saved_a_folder_loads_it(
    components: str, good: Path, tmp_path: Path
) -> None:
    folder = export_model(good, tmp_path / "part", ExportConfig(components=components))
    model, processor = load_model(folder, device="cpu")
    assert type(model) is CLASSES[components]
    assert not model.training
    assert processor(text="a dog")["input_ids"].ndim == 2


def test_a_dtype_applies_to_all_but_the_temperature_and_folder_code_is_not_run(
    copy: Path,
) -> None:
    for file in copy.glob("*.py"):
        file.write_text("raise SystemExit('this code ran')", encoding="utf-8")
    model, _ = load_model(copy, device="cpu", dtype=torch.bfloat16)
    assert type(model) is LLM2CLIPModel
    assert model.dtype == torch.bfloat16
    assert model.logit_scale.log_scale.dtype == torch.float32


@pytest.mark.parametrize("save", [save_tiny_llm, save_tiny_vision])
def test_another_model_is_refused_with_the_command_that_accepts_it(
    save: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"llm2clip build .*An LLM2CLIP model is needed here"):
        load_model(save(tmp_path / "other"))


@pytest.mark.parametrize(
    ("with_llm", "with_vision_tower"), [(False, False), (True, False), (False, True)]
)
def test_a_model_without_towers_projects_like_the_whole_model(
    with_llm: bool, with_vision_tower: bool, good: Path
) -> None:
    model, processor = load_model(good, device="cpu")
    towers = {"with_llm": with_llm, "with_vision_tower": with_vision_tower}
    partial = load_partial_model(good, **towers, device="cpu")
    inputs = processor(text=CAPTIONS)
    pixels = processor(images=tiny_images(2))
    with torch.no_grad():
        captions, images = model.get_caption_embeds(**inputs), model.get_vision_embeds(**pixels)
        assert torch.equal(partial.to_text_embeds(captions), model.to_text_embeds(captions))
        assert torch.equal(partial.to_image_embeds(images), model.to_image_embeds(images))
        if with_llm:
            assert torch.equal(partial.get_caption_embeds(**inputs), captions)
        if with_vision_tower:
            assert torch.equal(partial.get_vision_embeds(**pixels), images)
    names = {name.split(".")[0] for name, _ in partial.named_parameters()}
    assert ("text_model" in names, "vision_model" in names) == (with_llm, with_vision_tower)


def test_weights_of_an_absent_tower_are_not_needed(copy: Path) -> None:
    for tower in ("text_model.", "vision_model."):
        drop_weights(copy, tower)
    load_partial_model(copy, device="cpu")
    with pytest.raises(ValueError, match=r"Missing .*vision_model\."):
        load_partial_model(copy, with_vision_tower=True, device="cpu")
