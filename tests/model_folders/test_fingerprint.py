"""Laws of fingerprints: copies of a model agree, and every other maker differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import CLIPVisionConfig, LlamaConfig

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor
from modeling_llm2clip.model_folders.fingerprint import (
    fingerprint_model,
    fingerprint_text,
    fingerprint_vision,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(), tmp_path_factory.mktemp("model"))


def save(parts: tuple[Any, Any], folder: Path, **options: Any) -> Path:
    model, processor = parts
    model.save_pretrained(folder, **options)
    processor.save_pretrained(folder)
    return folder


def difference(left: dict[str, str], right: dict[str, str]) -> set[str]:
    assert set(left) == set(right)
    return {name for name in left if left[name] != right[name]}


@pytest.mark.parametrize("vision", ["clip", "vit", "dinov2"])  # two have weights renamed on loading
def test_loading_and_saving_again_changes_nothing(vision: str, tmp_path: Path) -> None:
    first = save(tiny_model(vision), tmp_path / "first")
    loaded = LLM2CLIPModel.from_pretrained(first), LLM2CLIPProcessor.from_pretrained(first)
    loaded[1](text=["a dog"], return_tensors="pt")  # a call must leave no trace
    second = save(loaded, tmp_path / "second")
    assert fingerprint_text(first) == fingerprint_text(second)
    assert fingerprint_vision(first) == fingerprint_vision(second)


def test_saving_in_many_files_changes_nothing(folder: Path, tmp_path: Path) -> None:
    pieces = save(tiny_model(), tmp_path / "pieces", max_shard_size="50KB")
    assert len(list(pieces.glob("*.safetensors"))) > 1
    assert fingerprint_text(pieces) == fingerprint_text(folder)
    assert fingerprint_vision(pieces) == fingerprint_vision(folder)


def _change_weight(model: LLM2CLIPModel, _: Any) -> None:
    with torch.no_grad():
        next(model.text_model.parameters())[0, 0] += 1


def _change_theta(model: LLM2CLIPModel, _: Any) -> None:
    model.config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}


def _make_causal(model: LLM2CLIPModel, _: Any) -> None:
    model.config.bidirectional = False
    model.config.text_config.is_causal = True


def _add_a_word(_: Any, processor: LLM2CLIPProcessor) -> None:
    processor.tokenizer.add_tokens("photo")


@pytest.mark.parametrize(
    ("change", "entry"),
    [
        (_change_weight, "weights"),
        (_change_theta, "architecture"),
        (lambda model, _: setattr(model.config, "prompt_suffix_ids", [5]), "prompt"),
        (lambda model, _: setattr(model.config, "text_pooling", "last_token"), "pooling"),
        (_make_causal, "direction"),
        (lambda _, processor: setattr(processor, "max_text_length", 31), "max_text_length"),
        (lambda _, processor: setattr(processor, "tokenizer", tiny_tokenizer(begins=False)),
         "tokenizer"),
        (lambda _, processor: setattr(processor.tokenizer, "truncation_side", "left"),
         "tokenizer"),
        (_add_a_word, "tokenizer"),
    ],
)  # fmt: skip
def test_whatever_changes_a_captions_embedding_changes_one_entry(
    folder: Path, tmp_path: Path, change: Callable[[Any, Any], None], entry: str
) -> None:
    parts = tiny_model()
    change(*parts)
    changed = save(parts, tmp_path)
    assert difference(fingerprint_text(changed), fingerprint_text(folder)) == {entry}
    # Images do not depend on it.
    assert fingerprint_vision(changed) == fingerprint_vision(folder)


@pytest.mark.parametrize("fingerprint", [fingerprint_text, fingerprint_vision])
def test_fields_that_a_version_of_transformers_completes_change_nothing(
    fingerprint: Callable[[Path], dict[str, str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(folder)
    for family in (LlamaConfig, CLIPVisionConfig):
        to_diff_dict = family.to_diff_dict
        # As 5.6 does beside the frequencies of Gemma 3, and 5.24 does not.
        monkeypatch.setattr(
            family, "to_diff_dict", lambda self, f=to_diff_dict: {**f(self), "rope_theta": None}
        )
    assert fingerprint(folder) == before


def test_another_dtype_is_another_model(folder: Path, tmp_path: Path) -> None:
    half = fingerprint_text(save(tiny_model(dtype=torch.bfloat16), tmp_path))
    assert difference(half, fingerprint_text(folder)) == {"weights", "dtype"}
    assert half["dtype"] == "bfloat16"


def test_images_prepared_otherwise_are_another_model(folder: Path, tmp_path: Path) -> None:
    model, processor = tiny_model()
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    changed = fingerprint_vision(save((model, processor), tmp_path))
    assert difference(changed, fingerprint_vision(folder)) == {"image_processor"}


@pytest.mark.parametrize(
    "settings", [{"truncation_side": "left"}, {"split_special_tokens": True}], ids=str
)
def test_settings_beside_the_tokenizers_file_that_change_ids_count(
    settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    file = other / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **settings}), encoding="utf-8")
    text = "<|im_end|> a dog" * 40
    ids = [LLM2CLIPProcessor.from_pretrained(f)(text=[text])["input_ids"] for f in (folder, other)]
    assert ids[0].tolist() != ids[1].tolist()
    assert difference(fingerprint_text(other), fingerprint_text(folder)) == {"tokenizer"}


def test_another_class_of_image_processor_is_another_model(folder: Path, tmp_path: Path) -> None:
    # Its settings are the same, and it is free to do something else with them.
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    file = other / "processor_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["image_processor"]["image_processor_type"].startswith("CLIPImageProcessor")
    content["image_processor"]["image_processor_type"] = "ViTImageProcessor"
    file.write_text(json.dumps(content), encoding="utf-8")
    assert "image_processor" in difference(fingerprint_vision(other), fingerprint_vision(folder))


def test_the_library_that_prepares_images_does_not_count(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    file = other / "processor_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    name = content["image_processor"]["image_processor_type"]
    content["image_processor"]["image_processor_type"] = (
        name.removesuffix("Pil") if name.endswith("Pil") else f"{name}Pil"
    )
    file.write_text(json.dumps(content), encoding="utf-8")
    assert fingerprint_vision(other) == fingerprint_vision(folder)


def test_a_quantized_folder_is_another_model(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert difference(fingerprint_text(other), fingerprint_text(folder)) == {"architecture"}


def test_a_tower_of_another_checkpoint_folder_is_the_same(folder: Path, tmp_path: Path) -> None:
    # Where a tower came from, and what the tokenizer's special ids are called, changes no number.
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    config["eos_token_id"] = 5
    config["text_config"]["_name_or_path"] = "owner/other"
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert fingerprint_text(other) == fingerprint_text(folder)


def test_adapter_and_projections_do_not_count(folder: Path, tmp_path: Path) -> None:
    model, processor = tiny_model()
    with torch.no_grad():
        for module in (model.text_adapter, model.text_projection, model.visual_projection):
            for parameter in module.parameters():
                parameter += 1
    changed = save((model, processor), tmp_path)
    assert fingerprint_text(changed) == fingerprint_text(folder)
    assert fingerprint_vision(changed) == fingerprint_vision(folder)


def test_values_are_short_texts_that_json_keeps(folder: Path) -> None:
    found = {**fingerprint_text(folder), **fingerprint_vision(folder)}
    assert json.loads(json.dumps(found)) == found
    assert all(len(value) <= 200 for value in found.values())


def test_a_folder_without_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"none of model\.safetensors"):
        fingerprint_text(tmp_path)


def test_a_setting_of_the_head_that_no_weight_shows_is_another_model(
    folder: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    config["normalize_text_before_adapter"] = not config["normalize_text_before_adapter"]
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    models = fingerprint_model(folder), fingerprint_model(other)
    assert difference(*models) == {"normalize_text_before_adapter"}
    assert fingerprint_text(other) == fingerprint_text(folder)  # taken before the head
