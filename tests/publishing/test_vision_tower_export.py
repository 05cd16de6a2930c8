"""The exported vision tower is the model's own, bit for bit."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from breaking import edit_json
from shared_models import mostly_slow, shared_model
from tiny import JOINED, VISION_FAMILIES, draw_noise, tiny_images, tiny_model
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel

from modeling_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.image_cropping_llm2clip import LLM2CLIPImageProcessor
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.publishing.export_model import export_vision_tower


def hidden_states_of(tower: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        output = tower(**inputs, output_hidden_states=True)
    return [*output.hidden_states, output.last_hidden_state]


@pytest.mark.parametrize("vision", mostly_slow(VISION_FAMILIES))
def test_the_exported_tower_gives_the_models_own_hidden_states(vision: str, tmp_path: Path) -> None:
    model, processor = shared_model(vision)
    source = save_model(model, processor, tmp_path / "model")
    folder = export_vision_tower(source, tmp_path / "tower")
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


def test_the_folder_of_a_tower_has_nothing_of_ours(good: Path, tmp_path: Path) -> None:
    folder = export_vision_tower(good, tmp_path / "tower", license="mit")
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip
    for name in ("config.json", "preprocessor_config.json"):
        assert "auto_map" not in (folder / name).read_text(encoding="utf-8")
    assert "license: mit" in (folder / "README.md").read_text(encoding="utf-8")


def change_byte(folder: Path, prefix: str) -> None:
    """Flip the lowest bit of one weight, which moves no recorded embedding visibly."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    name = next(name for name in sorted(header) if name.startswith(prefix))
    content[start + header[name]["data_offsets"][0]] ^= 1
    file.write_bytes(content)


def test_neither_llm_nor_tokenizer_is_read(good: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(good, tmp_path / "model"))
    change_byte(source, "text_model.")
    (source / "tokenizer.json").write_text("{", encoding="utf-8")
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_vision_tower(source, tmp_path / "tower")


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "vision_model."])
def test_a_changed_vision_tower_is_refused(name: str, good: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(good, tmp_path / "model"))
    if name.endswith(".json"):
        edit_json(name, lambda content: content.update(max_text_length=9))(source)
    else:
        change_byte(source, name)
    with pytest.raises(ValueError, match="Nothing was written from"):
        export_vision_tower(source, tmp_path / "tower")


def test_a_tower_whose_images_are_cropped_brings_the_code_of_the_crop(tmp_path: Path) -> None:
    model, processor = shared_model()
    own = LLM2CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    source = save_model(model, LLM2CLIPProcessor(own, processor.tokenizer), tmp_path / "model")
    folder = export_vision_tower(source, tmp_path / "tower")
    assert (folder / "image_cropping_llm2clip.py").is_file()
    assert "trust_remote_code=True" in (folder / "README.md").read_text(encoding="utf-8")
    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert settings["auto_map"].keys() == {"AutoImageProcessor"}
    image = draw_noise(32, 35)
    wanted, found = (
        one(image, return_tensors="pt")["pixel_values"]
        for one in (own, AutoImageProcessor.from_pretrained(folder))
    )
    assert torch.equal(found, wanted)


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(FileExistsError, match="Choose a new folder"):
        export_vision_tower(tmp_path / "not even looked for", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("vision", "kind"),
    [("altclip", "'altclip_vision_model' tower"), (JOINED, "joined towers (A+B)")],
)
def test_a_tower_that_automodel_does_not_know_is_not_exported_alone(
    vision: str, kind: str, tmp_path: Path
) -> None:
    source = save_model(*tiny_model(vision), tmp_path / "model")
    with pytest.raises(ValueError, match=f"AutoModel has no {re.escape(kind)}"):
        export_vision_tower(source, tmp_path / "tower")
    assert not (tmp_path / "tower").exists()
